"""Soak test: a long run in which workers are killed, and which is terminated and resumed as a whole.

Checks that the run finishes all its frames, that memory does not grow, that no processes or shared memory are left, and
that the policy has learned. Also reports what checkpoints cost.
"""

from __future__ import annotations

import contextlib
import math
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro
from common import check_arguments, progress, run_benchmark, write_results

from mtrl_vec.commands.curves import read_metrics
from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError, RunFailed
from mtrl_vec.policy.checkpoint import checkpoints, load_checkpoint

MAX_GROWTH = 0.05
MAX_CHECKPOINT_SHARE = 0.02
MIN_SUCCESS = 0.9
SAMPLE_SECONDS = 5.0
SPACING = 3
"""Iterations from one disturbance to the next: until then, the metrics tell of the first one."""


@dataclass(frozen=True)
class Args:
    """Train while worker processes are killed, and the run is terminated and resumed, at random moments.

    Example: python benchmarks/soak.py --total-frames 10000000 --json benchmarks/results/soak.json
    """

    total_frames: int = 10_000_000
    """Environment steps of the run. The default takes about half an hour on 2 cores."""
    kills: int = 5
    """How often to kill a simulator process (SIGKILL)."""
    terminations: int = 2
    """How often to terminate the whole run (SIGTERM) and resume it."""
    seed: int = 1
    """Seed of the moments, and of the run."""
    warmup_seconds: float = 120.0
    """Memory is not measured for this long after a start or a loss, until the evaluation processes have started too."""
    run_dir: Path = Path("runs") / "soak"
    """Folder of the run. It must not exist."""
    json: Path | None = None
    """Also write the results to this file."""


@dataclass
class Sample:
    """Memory of all processes of the run at one moment."""

    seconds: float
    frames: int
    megabytes: float
    warm: bool


def tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def simulators(process: psutil.Process) -> list[psutil.Process]:
    """Simulator processes of training and evaluation: the children of the fork servers."""
    servers: set[int] = set()
    found = []
    for child in process.children(recursive=True):  # parents come before their children
        with contextlib.suppress(psutil.Error):
            if child.ppid() in servers:
                found.append(child)
            elif "forkserver" in " ".join(child.cmdline()):
                servers.add(child.pid)
    return found


def shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Files in /dev/shm that these processes have mapped and that are not deleted yet."""
    found: set[str] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            paths = {m.path for m in process.memory_maps()}
            found |= {path for path in paths if path.startswith("/dev/shm/") and Path(path).exists()}
    return found


def survivors(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Processes that do not end within ten seconds."""
    return psutil.wait_procs(list(processes), timeout=10)[1]


def busy(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Processes that are working. Simulators of the evaluation are mostly idle, and not missed for a long time."""
    before = {process: process.cpu_times().user for process in processes}
    time.sleep(2.0)
    return [process for process, start in before.items() if process.cpu_times().user - start > 0.1]


def frames_of(run_dir: Path) -> int:
    try:
        return int(read_metrics(run_dir / "metrics.csv")["frames"][-1])
    except InputError:
        return 0


def megabytes(processes: list[psutil.Process]) -> float:
    """Memory in MB; what processes share is divided between them (PSS)."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


class Soak:
    """The test: `run` it once."""

    def __init__(self, args: Args) -> None:
        self._args, self._rng = args, random.Random(args.seed)
        self._pending = self._plan()
        self._done = {"kill": 0, "terminate": 0}
        self._earliest = 0  # frames before which nothing is done to the run
        self._samples: list[Sample] = []
        self._processes: set[psutil.Process] = set()
        self._shared_memory: set[str] = set()

    def _plan(self) -> list[tuple[int, str]]:
        """What to do to the run after how many frames."""
        uniform, kills, terminations = self._rng.uniform, self._args.kills, self._args.terminations
        moments = [(uniform(0.05, 0.95), "kill") for _ in range(kills)]
        moments += [((i + uniform(0.7, 1.0)) / (terminations + 1), "terminate") for i in range(terminations)]
        return sorted((int(fraction * self._args.total_frames), what) for fraction, what in moments)

    def run(self) -> dict[str, Any]:
        """Run the test. Returns what was measured.

        Raises:
            RunFailed: the run does not end properly after SIGTERM.
        """
        self._begun = self._calm_since = time.monotonic()
        self._start("--run-dir", str(self._args.run_dir), "--seed", str(self._args.seed))
        try:
            while not self._has_ended():
                frames = frames_of(self._args.run_dir)
                self._look(frames)
                if self._pending and frames >= max(self._pending[0][0], self._earliest):
                    self._disturb(frames)
        finally:
            if self._process.poll() is None:
                self._process.terminate()
                self._process.wait()
        return self._results()

    def _start(self, *flags: str) -> None:
        args = self._args
        command = [sys.executable, "-m", "mtrl_vec", "train", *flags]
        command += ["--total-frames", str(args.total_frames), "--max-restarts", str(2 * args.kills)]
        progress(shlex.join(["python", *command[1:]]))
        self._process = subprocess.Popen(command)

    def _has_ended(self) -> bool:
        """Whether the run has ended, waiting until the next sample."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=SAMPLE_SECONDS)
        return self._process.poll() is not None

    def _look(self, frames: int) -> None:
        """Note processes and memory."""
        now = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended in the meantime
            processes = tree(psutil.Process(self._process.pid))
            self._processes |= set(processes)
            self._shared_memory |= shared_memory(processes)
            warm = now - self._calm_since > self._args.warmup_seconds
            self._samples.append(Sample(now - self._begun, frames, megabytes(processes), warm))

    def _disturb(self, frames: int) -> None:
        """Do what is next to the run. Where that is impossible, nothing is done, and it stays next."""
        what = self._pending[0][1]
        if what == "kill":
            try:
                victim = self._rng.choice(busy(simulators(psutil.Process(self._process.pid))))
                victim.kill()
            except (psutil.Error, IndexError):  # none is busy
                return
            progress(f"{frames:,} frames: killed simulator process {victim.pid}")
        else:
            progress(f"{frames:,} frames: terminating the run")
            self._terminate()
        self._pending.pop(0)
        self._done[what] += 1
        self._calm_since = time.monotonic()
        self._earliest = frames_of(self._args.run_dir) + SPACING * TrainConfig().frames_per_batch

    def _terminate(self) -> None:
        """Terminate the run, and resume it."""
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(timeout=120)
        if code != 130:
            raise RunFailed(f"the run ended with exit code {code} after SIGTERM")
        if left := survivors(self._processes):
            raise RunFailed(f"processes are left after SIGTERM: {left}")
        self._start("--resume", str(self._args.run_dir))

    def _results(self) -> dict[str, Any]:
        run_dir = self._args.run_dir
        metrics = read_metrics(run_dir / "metrics.csv")
        content = load_checkpoint(checkpoints(run_dir)[0])
        config = TrainConfig.from_dict(content["config"])
        warm = [sample.megabytes for sample in self._samples if sample.warm] or [math.nan]
        tenth = max(1, len(warm) // 10)
        first, last = statistics.median(warm[:tenth]), statistics.median(warm[-tenth:])
        success = [f"train/{task}/success_rate" for task in config.tasks]
        return {
            "exit_code": self._process.returncode,
            "frames": int(metrics["frames"][-1]),
            "expected_frames": config.num_iterations * config.frames_per_batch,  # of an undisturbed run
            "checkpoint_frames": content["frames"],
            "rows_in_order": bool((metrics["iteration"] == range(1, len(metrics["iteration"]) + 1)).all()),
            "kills": self._done["kill"],
            "restarts": int(metrics["train/restarts"][-1]),
            "terminations": self._done["terminate"],
            "minutes": (time.monotonic() - self._begun) / 60,
            "training_minutes": float(metrics["time/elapsed"][-1]) / 60,
            "checkpoint_share": float(metrics["time/checkpoint"][-1] / metrics["time/elapsed"][-1]),
            "megabytes_first": first,
            "megabytes_last": last,
            "megabytes_highest": max(warm),
            "growth": last / first - 1,
            "shared_memory_seen": len(self._shared_memory),
            "processes_left": len(survivors(self._processes)),
            "shared_memory_left": sum(Path(name).exists() for name in self._shared_memory),
            **{name: float(metrics[name][-1]) for name in success},
        }


def problems(results: dict[str, Any], args: Args) -> list[str]:
    """The checks that failed."""
    measured = not math.isnan(results["growth"])
    memory = f"memory grew by {results['growth']:.1%}" if measured else "no memory measured after --warmup-seconds"
    checks = {
        f"exit code {results['exit_code']}": results["exit_code"] == 0,
        "wrong number of frames": results["frames"] == results["expected_frames"] == results["checkpoint_frames"],
        "missing or repeated metrics": results["rows_in_order"],
        "too short for all kills": results["kills"] == args.kills,
        "too short for all terminations": results["terminations"] == args.terminations,
        "unnoticed worker losses": results["restarts"] >= results["kills"],
        memory: abs(results["growth"]) <= MAX_GROWTH,
        f"checkpoints took {results['checkpoint_share']:.1%}": results["checkpoint_share"] <= MAX_CHECKPOINT_SHARE,
        "processes left": not results["processes_left"],
        "shared memory left": not results["shared_memory_left"],
        "low success": min(v for k, v in results.items() if k.endswith("success_rate")) >= MIN_SUCCESS,
    }
    return [name for name, passed in checks.items() if not passed]


def benchmark(args: Args) -> None:
    """Run the test, report, and write the results.

    Raises:
        InputError: bad arguments, or the folder exists.
        RunFailed: checks failed.
    """
    check_arguments(args.json, total_frames=args.total_frames)
    if args.run_dir.exists():
        raise InputError(f"{args.run_dir} exists: remove it, or choose another --run-dir")
    results = Soak(args).run()
    for name, value in results.items():
        print(f"{name} {value}")
    write_results(args.json, results)
    if failed := problems(results, args):
        raise RunFailed(f"checks failed: {'; '.join(failed)}")


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
