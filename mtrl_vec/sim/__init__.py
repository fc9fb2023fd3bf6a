"""Batches of exact MuJoCo simulations, NumPy in and out. Knows nothing of torch, processes or policies."""

from mtrl_vec.sim.batch import SimBatch, Step
from mtrl_vec.sim.world import World

__all__ = ["SimBatch", "Step", "World"]
