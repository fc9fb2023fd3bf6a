"""Fast multi-task reinforcement learning on Meta-World: one PPO policy for reach, push and pick-place."""
