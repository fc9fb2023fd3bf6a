"""The real Meta-World as an oracle: its environments, its scripted experts, its tasks."""

from __future__ import annotations

import pickle

import metaworld
import mujoco
import numpy as np
from metaworld.policies import ENV_POLICY_MAP
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.types import Task as MetaWorldTask

from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import MT3


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


def judge(env: SawyerXYZEnv, sim: SimBatch, slot: int, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
    """What Meta-World's own `_get_obs` and `evaluate_state` say of a slot's state, without simulating.

    `env` was reset with the slot's vector and sees all of its steps, since it keeps the frame before.
    """
    world, state, _, _ = sim.view(slot)
    mujoco.mj_setState(env.model, env.data, state, world.state_signature)
    mujoco.mj_forward(env.model, env.data)
    space = env.sawyer_observation_space
    observation = np.clip(env._get_obs(), space.low, space.high)
    reward, info = env.evaluate_state(observation, action)
    return observation, float(reward), bool(info["success"])


TASK_NAMES = [task.name for task in MT3]
