"""Fast multi-task reinforcement learning on Meta-World: one PPO policy for any of its fifty tasks, or your own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mtrl_vec.registration import register_envs

if TYPE_CHECKING:
    from mtrl_vec.config import TrainConfig
    from mtrl_vec.envs import make_env
    from mtrl_vec.policy import load_policy
    from mtrl_vec.tasks.suite import register_task
    from mtrl_vec.train import Trainer

__version__ = "0.2.0"

__all__ = ["TrainConfig", "Trainer", "load_policy", "make_env", "register_task"]

register_envs()

_MODULES = {
    "TrainConfig": "config",
    "Trainer": "train",
    "load_policy": "policy",
    "make_env": "envs",
    "register_task": "tasks.suite",
}


def __getattr__(name: str) -> Any:
    # Only when asked for: every simulator process imports this package, and has no use for the learner.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
