"""Where a benchmark's numbers come from."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mtrl_vec.envs import available_cores

PACKAGES = ("torch", "torchrl", "tensordict", "metaworld", "mujoco", "gymnasium", "envpool", "numpy")


def machine() -> dict[str, str | int | None]:
    """Where the numbers come from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


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
