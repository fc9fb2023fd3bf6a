"""Simulations as TorchRL environments, and the worker processes that hold them. Knows nothing of policies."""

from mtrl_vec.envs.make import make_env
from mtrl_vec.envs.metaworld import MetaWorldEnv
from mtrl_vec.envs.pool import SimulatorPool

__all__ = ["MetaWorldEnv", "SimulatorPool", "make_env"]
