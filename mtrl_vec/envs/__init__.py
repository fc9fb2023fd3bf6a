"""Simulations as TorchRL environments, and the worker processes that hold them. Knows nothing of policies."""

import os

# TorchRL's workers give up after as many seconds without a message, 10,000 by default: in long runs, evaluations are
# further apart. It reads this when it is imported, here or in a worker; `poll` takes 2**31 ms at most.
os.environ.setdefault("BATCHED_PIPE_TIMEOUT", "2000000")

from mtrl_vec.envs.make import make_env
from mtrl_vec.envs.metaworld import MetaWorldEnv
from mtrl_vec.envs.pool import SimulatorPool

__all__ = ["MetaWorldEnv", "SimulatorPool", "make_env"]
