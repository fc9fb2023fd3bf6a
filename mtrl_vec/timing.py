"""Where the time goes: named sections, which also show up in the traces of torch's profiler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


class Timer:
    """Seconds spent in named sections, cumulative. Sections of different names may overlap, also in different threads.

    Args:
        synchronize: wait for the GPU at the end of each section, so that what it was given to do counts there. For
            profiling only: training has no use for the waiting.
    """

    def __init__(self, synchronize: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time spent inside the ``with`` block towards ``name``."""
        start = time.perf_counter()
        try:
            with record_function(name):
                yield
                if self._synchronize:
                    torch.cuda.current_stream().synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
