"""Rewards of Meta-World's tasks by family, vectorised over rows, in float64.

They reproduce ``compute_reward`` and the success of ``evaluate_state`` in ``metaworld/envs/sawyer_*_v3.py`` (reward
version "v2", the default there), quirks included: being comparable means computing what it computes. Every function
takes `RewardInputs` and returns the reward [n], in [0, 10], and success [n]. Tasks of one formula share a function,
which reads what is different from ``params``.
"""
