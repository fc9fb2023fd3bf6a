"""`Draw`: how the vector that tells one episode of a task from another is drawn (Meta-World's ``rand_vec``).

Shapes: ``V`` numbers in a vector, in metres: object position [3], then goal position [3]; or one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError

_MAX_TRIES = 10_000


@dataclass(frozen=True)
class Draw:
    """Uniformly from a box, again while what was drawn is too close to something in the xy plane."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    min_distance: float = 0.0
    """Least distance in metres of the first two entries from the goal's, which are the last but two."""
    keep_from: tuple[float, float] | None = None
    """Measure it from this point instead."""

    def __post_init__(self) -> None:
        """Raises InputError on a box that is none, or a distance that nothing has."""
        if len(self.low) != len(self.high) or any(a > b for a, b in zip(self.low, self.high, strict=False)):
            raise InputError(f"draw is from {self.low} to {self.high}: give a box, low before high")
        if self.min_distance and self.keep_from is None and len(self.low) < 6:
            raise InputError(f"draw of {len(self.low)} numbers with min_distance {self.min_distance}: there is no goal")

    def sample(self, rng: np.random.Generator | np.random.RandomState) -> NDArray[np.float64]:
        """Draw a vector, [V]. Raises InputError where nothing is far enough apart."""
        low, high = np.array(self.low), np.array(self.high)
        for _ in range(_MAX_TRIES):
            vector = rng.uniform(low, high)
            if not self.min_distance or self._distance(vector) >= self.min_distance:
                return vector
        raise InputError(f"draw from {self.low} to {self.high}: nothing is {self.min_distance} m apart, make it less")

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
