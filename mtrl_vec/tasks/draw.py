"""`Draw`: how the vector that tells one episode of a task from another is drawn (Meta-World's ``rand_vec``).

Shapes: ``V`` numbers in a vector, in metres: object position [3], then goal position [3]; or one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Draw:
    """Uniformly from a box, again while what was drawn is too close to something in the xy plane."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    min_distance: float = 0.0
    """Least distance in metres of the first two entries from the goal's, which are the last but two."""
    keep_from: tuple[float, float] | None = None
    """Measure it from this point instead."""

    def sample(self, rng: np.random.Generator | np.random.RandomState) -> NDArray[np.float64]:
        """Draw a vector, [V]."""
        low, high = np.array(self.low), np.array(self.high)
        vector = rng.uniform(low, high)
        while self.min_distance and self._distance(vector) < self.min_distance:
            vector = rng.uniform(low, high)
        return vector

    def _distance(self, vector: NDArray[np.float64]) -> float:
        other = vector[-3:-1] if self.keep_from is None else np.array(self.keep_from)
        return float(np.linalg.norm(vector[:2] - other))


def benchmark_vectors(draws: Sequence[Draw], seed: int, count: int = 50) -> list[NDArray[np.float64]]:
    """The vectors of a Meta-World benchmark with these tasks in its order, [count, V] each.

    One task gives those of ``metaworld.MT1(name, seed)``; those of MT10 and MT50 give the benchmarks'. A single random
    stream runs through all tasks, so that a task's vectors depend on the tasks before it.

    Source: ``metaworld._make_tasks``, which resets environments under NumPy's global generator; each of its resets
    draws twice and keeps the second vector.
    """
    rng = np.random.RandomState(seed)
    return [np.stack([[draw.sample(rng), draw.sample(rng)][1] for _ in range(count)]) for draw in draws]
