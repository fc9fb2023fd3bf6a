"""Runs in processes of their own: starting them, watching their processes, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from soak import shared_memory

from helpers import SMALL


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end within some seconds after the process that started them.

    One that has ended stays a zombie where nobody waits for orphans, as in many containers.
    """
    deadline = time.monotonic() + 15
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers_of(processes: list[psutil.Process]) -> list[int]:
    """Process ids of the simulators: children of the process that they are copies of."""
    about = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
            about[process.pid] = process.ppid(), "forkserver" in " ".join(process.cmdline())
    return [pid for pid, (parent, _) in about.items() if about.get(parent, (0, False))[1]]


def shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that they have mapped: semaphores, as all else there loses its name at once.

    Not all that is in there: other processes on the machine may come and go meanwhile.
    """
    if not Path("/dev/shm").exists():
        return set()
    found = {Path(path) for path in shared_memory(processes)}
    assert found
    return found


def left(files: set[Path]) -> set[Path]:
    return {path for path in files if path.exists()}


def at_ctrl_c() -> None:
    """As in a terminal, also where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait for something that a process, which leads a group of its own, brings about.

    Fails if the process ends before, or takes long.
    """
    deadline = time.monotonic() + 180
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"the run took too long or ended: {process.stderr.read()}")
        time.sleep(0.01)


def rows_of(run: Path) -> int:
    """Number of iterations in its metrics."""
    path = run / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def start_training(run: Path, *flags: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A long run in a process group of its own, some iterations in; and all of its processes."""
    command = [sys.executable, "-m", "mtrl_vec", "train", *SMALL, "--num-workers", "2", "--run-dir", str(run)]
    pipes = {"stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--quiet", *flags], **pipes, start_new_session=True, preexec_fn=at_ctrl_c)
    wait_for(lambda: rows_of(run) >= 3, process)
    return process, descendants(process.pid)


def start_workers(run: Path, count: int, *flags: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A run whose workers start, far from the end of its first iteration, in a group of its own; all its processes."""
    command = [sys.executable, "-u", "-m", "mtrl_vec", "train", *SMALL, "--num-steps", "8192", "--run-dir", str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *flags], **pipes, start_new_session=True, preexec_fn=at_ctrl_c)
    assert process.stdout.readline().startswith("training")
    wait_for(lambda: len(workers_of(descendants(process.pid))) >= count, process)
    return process, descendants(process.pid)
