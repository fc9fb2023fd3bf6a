"""What the benchmarks share: telling what they are at, and timing calls."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def seconds_per_call(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median over rounds of several calls each, for about as long as told, after a warm-up."""

    def timed(calls: int) -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        return (time.perf_counter() - start) / calls

    timed(2)
    calls = max(1, round(seconds / 10 / timed(3)))
    rounds = [timed(calls)]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        rounds.append(timed(calls))
    return statistics.median(rounds)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
