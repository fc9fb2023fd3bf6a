"""The command ``profile``: where every millisecond of training goes, in a few iterations in steady state.

Times come from iterations without torch's profiler, whose own cost would distort them; the profiler then watches one
more iteration, for the trace and the counts.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from mtrl_vec.commands.arguments import ProfileCommand
from mtrl_vec.commands.output import check_json, write_json
from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.learn.device import resolve_device, wait_for
from mtrl_vec.machine import machine, versions
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.tasks.layout import OBSERVATION_SIZE
from mtrl_vec.timing import Timer
from mtrl_vec.train import Trainer
from mtrl_vec.train.run_dir import DUMP_NAME, TRACE_NAME

LAUNCHES = ("cudaLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync", "cuLaunchKernel")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")

ACTING = ("simulate", "infer", "transfer")
PARTS = (*ACTING, "collect, other", "load", "advantages", "update")

Report = dict[str, Any]
"""Flat names and values; times in seconds."""


def profile(command: ProfileCommand, arguments: Sequence[str]) -> None:
    """Profile training and print a table.

    Args:
        command: what to run.
        arguments: as they were typed, to be written down.

    Raises:
        InputError: see `profile_training`.
    """
    if command.resume is not None:
        raise InputError(f"resume is {command.resume}: profile starts a run of its own, leave --resume out")
    if command.iterations < 1:
        raise InputError(f"iterations is {command.iterations}: it must be positive")
    check_json(command.json)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks about itself on the terminal
    config = command.config()
    if config.runtime.run_dir is None:
        config = config.replace(run_dir=Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-profile")
    report = profile_training(config, command.iterations)
    print("\n".join(describe(report)))
    about = {"command": shlex.join(["python", "-m", "mtrl_vec", *arguments]), **machine(), **versions()}
    write_json(command.json, report | about)


def flops_per_sample(config: TrainConfig) -> float:
    """Floating-point operations of matrix products that one frame costs in one optimiser step, forward and backward.

    Only of what a frame needs: its own task's heads, however many are computed on the way.
    """
    k = config.num_tasks
    policy, task_idx = SharedPolicy.for_tasks(config.policy, config.tasks), torch.arange(64 * k) % k
    one_hot = torch.nn.functional.one_hot(task_idx, k).float()
    inputs = torch.randn(len(task_idx), OBSERVATION_SIZE), one_hot, task_idx
    with FlopCounterMode(display=False) as counter:
        hidden = policy.torso.module(*inputs[:2])
        loc, scale = policy.actor_heads[0].module(hidden, task_idx)
        (loc.sum() + scale.sum() + policy.critic_heads.module(hidden, task_idx).sum()).backward()
    return counter.get_total_flops() / len(task_idx)


def matmul_flops_per_second(config: TrainConfig, device: torch.device, seconds: float = 1.0) -> float:
    """What square matrix products reach on the device, in the precision of training: the best of many."""
    size = 8192 if device.type == "cuda" else 512  # without bf16 units a CPU takes a second for that
    dtype = torch.bfloat16 if config.runtime.precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        wait_for(device)
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * size**3 / best


def profile_training(config: TrainConfig, iterations: int = 5, warmup: int = 3) -> Report:
    """Profile training with a configuration; a trace for https://ui.perfetto.dev is left in the run's folder.

    Args:
        config: of the run; no more than ``warmup + iterations + 1`` iterations of it are run, without evaluations.
        iterations: how many to measure.
        warmup: how many to run before that. On a GPU the first one compiles, and the second captures the update.

    Raises:
        InputError: see `Trainer`.
        WorkerDied: a simulation worker ended on its own.
    """
    # The last iteration of a run has nothing to overlap with: there is one more to come.
    frames = (warmup + iterations + 2) * config.frames_per_batch
    # No recovery: a replaced simulator would count as time to collect.
    config = config.replace(total_frames=max(config.total_frames, frames), max_restarts=0)
    trainer = Trainer(config, timer=Timer(synchronize=resolve_device(config.runtime.device).type == "cuda"))
    trace = trainer.run_dir / TRACE_NAME
    with trainer.lock, _removed_on_failure(trainer.run_dir), contextlib.closing(trainer.pipeline):
        seconds, busy = _measure(trainer, iterations, warmup)
        profiler = _trace(trainer, trace)
    return _report(trainer, seconds, busy, profiler, trace)


def _measure(trainer: Trainer, iterations: int, warmup: int) -> tuple[dict[str, float], float]:
    """Seconds of the sections per iteration, ``total`` among them; and how many cores the learner keeps busy."""
    timer = trainer.timer
    for _ in range(warmup):
        trainer.iterate()
    before, cpu_before, start = dict(timer.seconds), time.process_time(), time.perf_counter()
    for _ in range(iterations):
        trainer.iterate()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_before
    seconds = {name: (total - before.get(name, 0.0)) / iterations for name, total in timer.seconds.items()}
    return seconds | {"total": wall / iterations}, cpu / wall


def _trace(trainer: Trainer, file: Path) -> torch.profiler.profile:
    """Watch one iteration, and write its trace."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (trainer.device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        trainer.iterate()
        wait_for(trainer.device)
    profiler.export_chrome_trace(str(file))
    return profiler


def _report(
    trainer: Trainer, seconds: dict[str, float], busy: float, profiler: torch.profiler.profile, trace: Path
) -> Report:
    config, device = trainer.config, trainer.device
    seconds["collect, other"] = max(0.0, seconds["collect"] - sum(seconds.get(name, 0.0) for name in ACTING))
    steps = config.learner.num_epochs * config.learner.num_minibatches
    updated = config.minibatch_size * steps
    report: Report = {
        "device": str(device),
        "precision": config.runtime.precision,
        "workers": config.runtime.num_workers,
        "num_envs": config.num_envs,
        "frames_per_batch": config.frames_per_batch,
        "minibatch_size": config.minibatch_size,
        "optimiser_steps": steps,
        "overlap": config.learner.overlap,
        "double_buffer": config.runtime.double_buffer,
        "trace": str(trace),
        **{f"seconds/{name}": value for name, value in seconds.items()},
        "steps_per_second": config.frames_per_batch / seconds["total"],
        "simulation_steps_per_second": config.frames_per_batch / seconds["simulate"],
        "learner_cores_busy": busy,
        "update_samples_per_second": updated / seconds["update"],
        "flops_per_sample": flops_per_sample(config),
        "matmul_flops_per_second": matmul_flops_per_second(config, device),
    }
    if not config.learner.overlap:  # else what acts meanwhile would count as the update's
        report |= _counts(profiler.events(), steps)
    report["update_flops_per_second"] = report["flops_per_sample"] * report["update_samples_per_second"]
    report["model_flop_utilisation"] = report["update_flops_per_second"] / report["matmul_flops_per_second"]
    return report


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if not (folder / DUMP_NAME).exists():
            shutil.rmtree(folder)
        raise


def _counts(events: Iterable[Any], steps: int) -> Report:
    """What torch's profiler counted; for the update, all that it launches divided by its optimiser steps."""
    events = list(events)
    gpu = torch.autograd.DeviceType.CUDA
    on_gpu = [e.time_range for e in events if e.device_type == gpu and not e.is_user_annotation]
    update = next(e.time_range for e in events if e.name == "update" and e.device_type == torch.autograd.DeviceType.CPU)
    called = [e.name for e in events if update.start <= e.time_range.start <= update.end]
    counts: Report = {"operators_per_step": sum(name.startswith("aten::") for name in called) / steps}
    if on_gpu:
        first, last = min(r.start for r in on_gpu), max(r.end for r in on_gpu)
        counts["device_busy_share"] = _covered((r.start, r.end) for r in on_gpu) / (last - first)
        counts["kernels_per_step"] = sum(update.start <= r.start <= update.end for r in on_gpu) / steps
        counts["launches_per_step"] = sum(name.startswith(LAUNCHES) for name in called) / steps
        counts["waits_in_update"] = sum(name.startswith(WAITS) for name in called)
    return counts


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def describe(report: Report) -> Iterator[str]:
    """The report in lines of text: a table of shares, then what the update reaches, and what to do next."""
    total = report["seconds/total"]
    shape = f"{report['num_envs']} simulations, {report['workers']} workers, {report['frames_per_batch']:,} frames"
    yield f"one iteration on {report['device']} in {report['precision']}: {shape}"
    yield ""
    yield f"  {'section':<16}{'ms':>10}{'share':>9}"
    known = {name: report.get(f"seconds/{name}", 0.0) for name in PARTS}
    # What is done while collecting counts there; with overlap the sections go on at the same time.
    rest = max(0.0, total - sum(known.values()))
    for name, seconds in [*known.items(), ("rest", rest), ("total", total)]:
        yield f"  {name:<16}{1e3 * seconds:>10.1f}{seconds / total:>9.1%}"
    if report["overlap"]:
        yield "  (collecting and learning overlap, so that the shares add up to more than the whole)"
    yield ""
    speed, alone = report["steps_per_second"], report["simulation_steps_per_second"]
    hidden = report["overlap"] or report["double_buffer"]  # while simulating, others work too
    share = "" if hidden else f"; simulating goes at {alone:,.0f}, of which that is {speed / alone:.2f}"
    yield f"training {speed:,.0f} steps/s{share}"
    rate, peak = report["update_flops_per_second"], report["matmul_flops_per_second"]
    yield (
        f"update {report['update_samples_per_second']:,.0f} samples/s in {report['optimiser_steps']} steps of "
        f"{report['minibatch_size']:,}: {rate / 1e9:,.0f} GFLOP/s, "
        f"{report['model_flop_utilisation']:.0%} of a large matrix product's {peak / 1e9:,.0f}"
    )
    if "kernels_per_step" in report:
        yield (
            f"device busy {report['device_busy_share']:.0%} of the time; per optimiser step "
            f"{report['kernels_per_step']:.1f} kernels and copies from {report['launches_per_step']:.1f} launches; "
            f"{report['waits_in_update']} waits in the whole update (for its metrics, and for this table)"
        )
    elif "operators_per_step" in report:
        yield (
            f"{report['operators_per_step']:,.0f} operators per optimiser step, nested ones included; "
            f"the learner keeps {report['learner_cores_busy']:.1f} cores busy on average"
        )
    ranked = sorted(known, key=lambda name: known[name], reverse=True)
    first, second = ranked[:2]
    if report["overlap"]:
        yield f"bound by {first}; next would be {second}"
    else:
        yield (
            f"bound by {first}: without it training would be {total / (total - known[first]):.1f} times as fast, "
            f"and {second} its largest part"
        )
    yield f"trace: {report['trace']} (open it in https://ui.perfetto.dev)"
