"""`SavedStarts`: starts of episodes whose settling depends on the draw, simulated once for each drawn vector."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtrl_vec.tasks.task import Array, Task

NUM_STARTS = 500
"""Vectors per task that fresh draws come from, where settling depends on them."""


class SavedStart(NamedTuple):
    """What a reset leaves in a slot's rows."""

    state: Array
    raw: Array
    kept: Array
    fixture: Array


class SavedStarts:
    """Starts by task and vector, filled as they come up. A start takes about 3 KB."""

    def __init__(self) -> None:
        self._starts: dict[tuple[int, bytes], SavedStart] = {}

    def get(self, k: int, vector: Array) -> SavedStart | None:
        """The start of task ``k`` with a vector, if it is known."""
        return self._starts.get((k, vector.tobytes()))

    def add(self, k: int, vector: Array, start: SavedStart) -> None:
        """Keep copies of what it holds."""
        self._starts[k, vector.tobytes()] = SavedStart(*(array.copy() for array in start))


def pools(tasks: Sequence[Task], seed: int) -> list[Array | None]:
    """For tasks that settle at each reset a pool of vectors [500, V] to draw from; None for the others.

    A pool depends on the seed and the task's name alone, so that it is the same in all workers.
    """
    return [_pool(task, seed) if task.settles else None for task in tasks]


def _pool(task: Task, seed: int) -> Array:
    rng = np.random.default_rng((seed, zlib.crc32(task.name.encode())))
    return np.stack([task.draw.sample(rng) for _ in range(NUM_STARTS)])
