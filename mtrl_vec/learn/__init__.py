"""PPO for many tasks: advantages, loss, update, acting. Knows nothing of runs and files."""
