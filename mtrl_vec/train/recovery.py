"""Replacing simulator processes that died."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mtrl_vec.errors import WorkerDied
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.train.progress import Progress

T = TypeVar("T")


class Recovery:
    """Retries a call when simulators die in it, at most ``max_restarts`` times in all.

    Where those of one rank die, all ranks retry.

    Args:
        max_restarts: limit over all calls.
        progress: where restarts are counted.
        ranks: which make the same calls.

    Attributes:
        notify: is told of every restart.
    """

    def __init__(self, max_restarts: int, progress: Progress, ranks: Ranks = ALONE) -> None:
        self._limit, self._used, self._progress, self._ranks = max_restarts, 0, progress, ranks
        self.notify: Callable[[str], None] = lambda message: None

    def __call__(self, call: Callable[[], T], restart: Callable[[], None]) -> T:
        """``call()``; where a simulator dies in it, ``restart()`` and ``call()`` again.

        Raises:
            WorkerDied: simulators died more often than allowed.
        """
        attempt = call

        def restart_and_call() -> T:
            restart()
            return call()

        while True:
            try:
                return self._ranks.together(attempt)
            except WorkerDied as error:  # also of those that took the place of others
                if self._used == self._limit:
                    error.args = (f"{error}, and --max-restarts is {self._limit}",)
                    raise
                self._used += 1
                self._progress.restarts += 1
                count = f"restart {self._used} of at most {self._limit}"
                self.notify(f"{error}; continuing after {self._progress.frames:,} frames, {count}")
                attempt = restart_and_call
