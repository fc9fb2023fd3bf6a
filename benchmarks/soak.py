"""A long run that is treated badly: workers are killed, the whole run is terminated and resumed, and memory is watched.

Checks that it ends with all of its frames, that memory stays flat, that nothing is left behind, and that the policy has
learned; and tells what checkpoints cost.
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
from common import progress, write_results

from mtrl_vec.checkpoint import checkpoints, load_checkpoint
from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.plotting import read_metrics

MAX_GROWTH = 0.05
MAX_CHECKPOINT_SHARE = 0.02
MIN_SUCCESS = 0.9
SAMPLE_SECONDS = 5.0


@dataclass(frozen=True)
class Args:
    """Train, with worker processes killed and the run terminated and resumed at random moments.

    Example: python benchmarks/soak.py --total-frames 10000000 --json benchmarks/results/soak.json
    """

    total_frames: int = 10_000_000
    """Of the run: about half an hour on 2 cores."""
    kills: int = 5
    """Simulation workers to kill with SIGKILL."""
    terminations: int = 2
    """Times that the whole run gets SIGTERM, to be resumed."""
    seed: int = 1
    """Of the moments, and of the run."""
    warmup_seconds: float = 120.0
    """After a start or a loss, until memory is looked at: the evaluation's processes start in it as well."""
    run_dir: Path = Path("runs") / "soak"
    """Must not exist."""
    json: Path | None = None
    """Also write the results to this file."""


@dataclass
class Sample:
    """Resident memory of all processes of the run, in MB."""

    seconds: float
    frames: int
    megabytes: float
    warm: bool


def tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def simulators(process: psutil.Process) -> list[psutil.Process]:
    """Workers of training or evaluation: children of the process that they are copies of."""
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
    """Files in /dev/shm that these processes have mapped, and that still have a name: others' are none of ours."""
    found: set[str] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            paths = {m.path for m in process.memory_maps()}
            found |= {path for path in paths if path.startswith("/dev/shm/") and Path(path).exists()}
    return found


def survivors(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end within some seconds after the run."""
    return psutil.wait_procs(list(processes), timeout=10)[1]


def busy(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that work: workers of the evaluation sleep most of the time, and nobody would miss them for long."""
    before = {process: process.cpu_times().user for process in processes}
    time.sleep(2.0)
    return [process for process, start in before.items() if process.cpu_times().user - start > 0.1]


def frames_of(run_dir: Path) -> int:
    try:
        return int(read_metrics(run_dir / "metrics.csv")["frames"][-1])
    except InputError:
        return 0


def megabytes(processes: list[psutil.Process]) -> float:
    """Memory that is not shared counts once for each; of what is shared, each process's part of it."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


def start(args: Args, resume: bool) -> subprocess.Popen[bytes]:
    flags = ["--resume", str(args.run_dir)] if resume else ["--run-dir", str(args.run_dir), "--seed", str(args.seed)]
    flags += ["--total-frames", str(args.total_frames), "--max-restarts", str(2 * args.kills)]
    command = [sys.executable, "-m", "mtrl_vec", "train", *flags]
    progress(shlex.join(["python", *command[1:]]))
    return subprocess.Popen(command)


def soak(args: Args) -> dict[str, Any]:
    """Runs it all. Returns what was measured; raises InputError where there is a run already."""
    if args.run_dir.exists():
        raise InputError(f"{args.run_dir} exists: remove it, or choose another --run-dir")
    rng = random.Random(args.seed)
    moments = [(rng.uniform(0.05, 0.95), "kill") for _ in range(args.kills)]
    moments += [((i + rng.uniform(0.7, 1.0)) / (args.terminations + 1), "terminate") for i in range(args.terminations)]
    pending = sorted((int(share * args.total_frames), what) for share, what in moments)
    shared: set[str] = set()
    begun = calm_since = time.monotonic()
    samples: list[Sample] = []
    seen: set[psutil.Process] = set()
    process = start(args, resume=False)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SAMPLE_SECONDS)
            break
        frames, now = frames_of(args.run_dir), time.monotonic()
        try:
            parent = psutil.Process(process.pid)
            processes = tree(parent)
        except psutil.NoSuchProcess:  # it has just ended
            continue
        seen |= set(processes)
        shared |= shared_memory(processes)
        samples.append(Sample(now - begun, frames, megabytes(processes), now - calm_since > args.warmup_seconds))
        if not pending or frames < pending[0][0]:
            continue
        what = pending[0][1]
        if what == "kill":
            try:
                victim = rng.choice(busy(simulators(parent)))
                victim.kill()
            except (psutil.Error, IndexError):  # none there, or none busy: at the next look
                continue
            progress(f"{frames:,} frames: killed simulator process {victim.pid}")
        else:
            progress(f"{frames:,} frames: terminating the run")
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=120)
            if code != 130:
                raise RuntimeError(f"the run ended with exit code {code} after SIGTERM")
            if left := survivors(seen):
                raise RuntimeError(f"processes are left after SIGTERM: {left}")
            process = start(args, resume=True)
        pending.pop(0)
        calm_since = time.monotonic()

    metrics = read_metrics(args.run_dir / "metrics.csv")
    content = load_checkpoint(checkpoints(args.run_dir)[0])
    config = TrainConfig.from_dict(content["config"])
    warm = [sample.megabytes for sample in samples if sample.warm] or [math.nan]
    tenth = max(1, len(warm) // 10)
    first, last = statistics.median(warm[:tenth]), statistics.median(warm[-tenth:])
    success = {name: values[-1] for name, values in metrics.items() if name.endswith("/success_rate")}
    training = {name: float(value) for name, value in success.items() if name.startswith("train/")}
    return {
        "exit_code": process.returncode,
        "frames": int(metrics["frames"][-1]),
        "expected_frames": config.num_iterations * config.frames_per_batch,  # of an undisturbed run
        "checkpoint_frames": content["frames"],
        "rows_in_order": bool((metrics["iteration"] == range(1, len(metrics["iteration"]) + 1)).all()),
        "restarts": int(metrics["train/restarts"][-1]),
        "terminations": args.terminations,
        "minutes": (time.monotonic() - begun) / 60,
        "training_minutes": float(metrics["time/elapsed"][-1]) / 60,
        "checkpoint_share": float(metrics["time/checkpoint"][-1] / metrics["time/elapsed"][-1]),
        "megabytes_first": first,
        "megabytes_last": last,
        "megabytes_highest": max(warm),
        "growth": last / first - 1,
        "shared_memory_seen": len(shared),
        "processes_left": len(survivors(seen)),
        "shared_memory_left": sum(Path(name).exists() for name in shared),
        **training,
    }


def problems(results: dict[str, Any], args: Args) -> list[str]:
    """What is not as it should be."""
    seen = not math.isnan(results["growth"])
    memory = f"memory grew by {results['growth']:.1%}" if seen else "memory was at no time past --warmup-seconds"
    checks = {
        "exit code": results["exit_code"] == 0,
        "frames": results["frames"] == results["expected_frames"] == results["checkpoint_frames"],
        "metrics with gaps or repetitions": results["rows_in_order"],
        "worker losses noticed": results["restarts"] >= args.kills,
        memory: abs(results["growth"]) <= MAX_GROWTH,
        f"checkpoints took {results['checkpoint_share']:.1%}": results["checkpoint_share"] <= MAX_CHECKPOINT_SHARE,
        "processes left": not results["processes_left"],
        "shared memory left": not results["shared_memory_left"],
        "success": min(v for k, v in results.items() if k.endswith("success_rate")) >= MIN_SUCCESS,
    }
    return [name for name, fine in checks.items() if not fine]


def main() -> int:
    args = tyro.cli(Args)
    try:
        results = soak(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in results.items():
        print(f"{name} {value}")
    write_results(args.json, results)
    if wrong := problems(results, args):
        print(f"not as it should be: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
