"""What the benchmarks share: progress messages, checks of arguments, exit codes, timing, and writing results."""

from __future__ import annotations

import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mtrl_vec.commands.output import check_json, write_json
from mtrl_vec.errors import InputError, RunFailed
from mtrl_vec.learn.device import wait_for
from mtrl_vec.machine import machine, versions


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def check_arguments(json: Path | None, **positive: float | None) -> None:
    """Check the arguments that most benchmarks have.

    Args:
        json: the file to write results to, if any.
        positive: numbers by the name of their argument; None passes.

    Raises:
        InputError: one of the numbers is not positive and finite, or the folder of the file does not exist.
    """
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} is {value}: it must be positive and finite")
    check_json(json)


def run_benchmark(benchmark: Callable[[], None]) -> int:
    """Run a benchmark and print its errors as one line.

    Returns:
        The exit code: 0, 1 if something that it ran failed, 2 for bad input, 130 after Ctrl-C.
    """
    try:
        benchmark()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: {shlex.join(error.cmd)} ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def seconds_per_call(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Time a function, after a warm-up: the median over rounds of several calls each.

    Args:
        call: the function.
        device: to wait for at the end of each round.
        seconds: approximate length of all rounds together.
    """

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


def write_results(path: Path | None, results: Mapping[str, object]) -> None:
    """Write results as JSON, with machine, versions and command in front. Writes nothing if there is no path.

    Raises:
        InputError: the file cannot be written.
    """
    write_json(path, provenance() | dict(results))


def provenance() -> dict[str, Any]:
    """Machine, versions and command that results come from."""
    return {"machine": machine(), "versions": versions(), "command": shlex.join(["python", *sys.argv])}
