"""The shared policy: networks, routing, and trained policies for users. Knows nothing of simulators."""

from mtrl_vec.policy.network import SharedPolicy
from mtrl_vec.policy.trained import TrainedPolicy, load_policy

__all__ = ["SharedPolicy", "TrainedPolicy", "load_policy"]
