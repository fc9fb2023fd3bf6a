"""The real Meta-World as an oracle: its environments, its scripted experts, its tasks."""

from __future__ import annotations

import pickle

import metaworld
import numpy as np
from metaworld.policies import ENV_POLICY_MAP
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.types import Task as MetaWorldTask

from mtrl_vec.tasks.suite import TASKS


def make_env(task_name: str) -> SawyerXYZEnv:
    return metaworld.ALL_V3_ENVIRONMENTS[task_name]()


def set_vector(env: SawyerXYZEnv, vector: np.ndarray) -> np.ndarray:
    """Reset `env` with the given object and goal, through Meta-World's own `set_task` and `reset`."""
    data = {"env_cls": type(env), "rand_vec": vector, "partially_observable": False}
    env.set_task(MetaWorldTask(env_name="", data=pickle.dumps(data)))
    observation, _ = env.reset()
    return observation


def expert(task_name: str):
    return ENV_POLICY_MAP[task_name]()


TASK_NAMES = [task.name for task in TASKS]
