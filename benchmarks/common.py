"""What the benchmarks share: telling what they are at, and timing calls."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mtrl_vec.device import wait_for
from mtrl_vec.machine import machine, versions


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def seconds_per_call(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median over rounds of several calls each, for about as long as told, after a warm-up."""

    def timed(calls: int) -> float:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait_for(device)
        return (time.perf_counter() - start) / calls

    timed(2)
    calls = max(1, round(seconds / 10 / timed(3)))
    rounds = [timed(calls)]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        rounds.append(timed(calls))
    return statistics.median(rounds)


def write_results(path: Path | None, results: dict[str, object]) -> None:
    """As JSON, with the machine, the versions and the command in front; no path, no file."""
    if path is not None:
        about = {"machine": machine(), "versions": versions(), "command": shlex.join(["python", *sys.argv])}
        path.write_text(json.dumps(about | results, indent=2) + "\n")
