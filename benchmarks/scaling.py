"""What other machines would do: a model of training from parts that are measured here, checked by training here.

An iteration collects ``T`` steps of ``B`` environments, and then learns from ``B T`` frames::

    collect = T (simulate ceil(B / W) + parent(W) + infer B) + snapshot B
    learn   = B T (advantages + epochs / samples_per_second) + sums

Simulation and acting are timed while they take turns, the other parts each by itself. Every rank has its own cores,
``B`` environments of its own, and one process that drives its ``W`` workers. The samples per second of more threads
follow Amdahl's law through those of one and of two. Sums of gradients over ``R`` ranks go round in a ring, with the
latency and the bandwidth that benchmarks/ranks.py found. A GPU takes over acting and learning, with the figures in
`Gpu`, which are estimates as long as none has been measured; on a machine with one, the check trains on it.
"""

from __future__ import annotations

import csv
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from common import check_arguments, progress, run_benchmark, seconds_per_call, write_results
from learner import make_policy, random_rollout, update_call
from ranks import ring_sum

from mtrl_vec.commands.parsing import parse_train
from mtrl_vec.config import TrainConfig
from mtrl_vec.envs import make_env
from mtrl_vec.envs.make import default_num_workers
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.learn.exploration import exploration
from mtrl_vec.learn.ppo import PPO
from mtrl_vec.machine import available_cores
from mtrl_vec.timing import Timer
from mtrl_vec.train.resolve import resolve

CPU = torch.device("cpu")
COLLECTED = 8
"""Rollouts over which collecting is timed."""
ON_GPU = ["--device", "cuda", "--precision", "bf16", "--compile", "on", "--cuda-graphs"]
"""What the estimates for a GPU are of."""
SKIPPED = 2
"""Iterations of the check, with which processes warm up."""


@dataclass(frozen=True)
class Args:
    """Measure the parts of training, check their model on this machine, and work out what others would do.

    Example: python benchmarks/scaling.py --suite MT10 --json scaling.json
    """

    suite: Literal["MT3", "MT10", "MT50"] = "MT10"
    """The tasks."""
    parent: tuple[float, float] = (0.05, 0.0065)
    """Milliseconds per step of the process that drives workers: constant, and per worker. See benchmarks/pool.py."""
    sum_ms: tuple[float, float] = (0.11, 2.0)
    """Milliseconds of a sum over two ranks: of one number, and of gradients. See benchmarks/ranks.py."""
    iterations: int = 8
    """Iterations of the training run that the model is checked by."""
    json: Path | None = None
    """Also write the results to this file."""


@dataclass(frozen=True)
class Parts:
    """What one core does, in seconds, if nothing else is said."""

    simulate: float  # a step of an environment, with a worker on every core
    infer: float  # a step of an environment
    snapshot: float  # an environment
    advantages: float  # a frame
    one_thread: float  # samples per second of updates
    two_threads: float
    parent: tuple[float, float]  # a step, and more for each worker
    sum: tuple[float, float]  # over two ranks, of one number and of gradients


@dataclass(frozen=True)
class Gpu:
    """Estimates for an H100."""

    samples_per_second: float = 20e6
    step: float = 0.25e-3  # of the optimiser, at least: some hundred kernels, however small
    infer: float = 0.3e-3  # a step of all environments
    advantages: float = 0.2e-6  # a frame


@dataclass(frozen=True)
class Prediction:
    speed: float  # steps/s of all ranks
    bound: str  # what takes longest


def measure_parts(args: Args, config: TrainConfig) -> Parts:
    """The parts on this machine."""
    tasks = list(config.environment.tasks)
    workers, steps = default_num_workers(), config.learner.num_steps
    progress(f"simulation by {workers} workers, with the actions of a new policy")
    pool = make_env(tasks, num_workers=workers, num_envs=config.num_envs, max_episode_steps=config.max_episode_steps)
    pool.timer = timer = Timer()
    acting = ActingPolicy(make_policy(config, CPU), config, timer)
    nothing = np.zeros(config.num_tasks)
    explores = exploration(nothing, nothing.astype(int), config.exploration_delay, unknown=nothing)
    acting.noise.set_correlation(config.learner.noise_correlation * explores)
    try:
        pool.reset()
        pool.collect(acting, steps)  # which shares memory with the workers
        before = dict(timer.seconds)
        for _ in range(COLLECTED):
            pool.collect(acting, steps)
        simulate, infer = ((timer.seconds[part] - before[part]) / COLLECTED / steps for part in ("simulate", "infer"))
        snapshot = seconds_per_call(pool.snapshot, CPU, 1.0)
    finally:
        pool.close()
    parent = args.parent[0] / 1e3, args.parent[1] / 1e3
    per_step = simulate - parent[0] - parent[1] * workers
    progress("learning")
    rates = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        call = update_call(config, CPU)
        samples = config.minibatch_size * config.learner.num_minibatches * config.learner.num_epochs
        rates[threads] = samples / seconds_per_call(call, CPU, 8.0)
    torch.set_num_threads(available_cores())
    ppo = PPO(config, make_policy(config, CPU))
    rollout = random_rollout(config)
    advantages = seconds_per_call(lambda: ppo.add_advantages(rollout.clone(recurse=False)), CPU, 2.0)
    return Parts(
        simulate=per_step / math.ceil(config.num_envs / workers),
        infer=infer / config.num_envs,
        snapshot=snapshot / config.num_envs,
        advantages=advantages / config.frames_per_batch,
        one_thread=rates[1],
        two_threads=rates[2],
        parent=parent,
        sum=(args.sum_ms[0] / 1e3, args.sum_ms[1] / 1e3),
    )


def predict(parts: Parts, config: TrainConfig, cores: int, ranks: int = 1, gpu: Gpu | None = None) -> Prediction:
    """Speed of ``ranks`` ranks, each with its part of the cores and, if any, with a GPU of its own."""
    own = cores // ranks
    workers = min(default_num_workers(own), config.num_envs)
    learner, steps, frames = config.learner, config.learner.num_steps, config.frames_per_batch
    constant, per_worker = parts.parent
    samples_per_second = gpu.samples_per_second if gpu else with_threads(parts, own)
    updates = learner.num_epochs * learner.num_minibatches
    seconds = {
        "simulation": steps * parts.simulate * math.ceil(config.num_envs / workers),
        "parent": steps * (constant + per_worker * workers),
        "acting": steps * (gpu.infer if gpu else parts.infer * config.num_envs),
        "snapshots": parts.snapshot * config.num_envs,
        "advantages": frames * (gpu.advantages if gpu else parts.advantages),
        "updates": updates * max(config.minibatch_size / samples_per_second, gpu.step if gpu else 0.0),
        "sums": updates * ring_sum(ranks, *parts.sum),
    }
    return Prediction(ranks * frames / sum(seconds.values()), max(seconds, key=lambda name: seconds[name]))


def with_threads(parts: Parts, threads: int) -> float:
    """Samples per second of updates with so many threads, by Amdahl's law."""
    serial = min(1.0, max(0.0, 2 * parts.one_thread / parts.two_threads - 1))
    return parts.one_thread / (serial + (1 - serial) / threads)


def trained(args: Args, config: TrainConfig, device: list[str]) -> float:
    """Steps/s of a short training run, the median of its iterations."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mtrl_vec", "train", "--quiet", "--tasks", args.suite, *device]
        command += ["--total-frames", str(args.iterations * config.frames_per_batch), "--eval-interval", "0"]
        subprocess.run([*command, "--run-dir", f"{folder}/run"], check=True)
        with Path(folder, "run", "metrics.csv").open() as file:
            speeds = [float(row["time/sps"]) for row in csv.DictReader(file)]
    return statistics.median(speeds[SKIPPED:])


def predictions(parts: Parts, config: TrainConfig) -> dict[str, Prediction]:
    """By machine."""
    found = {}
    for cores in (2, 16, 64, 128):
        found[f"{cores} cores"] = predict(parts, config, cores)
        if cores > 2:
            found[f"{cores} cores, {cores // 2} ranks"] = predict(parts, config, cores, ranks=cores // 2)
            found[f"{cores} cores, 1 GPU"] = predict(parts, config, cores, gpu=Gpu())
            found[f"{cores} cores, 8 GPUs, 8 ranks"] = predict(parts, config, cores, ranks=8, gpu=Gpu())
    return found


def report(found: dict[str, Prediction]) -> str:
    """A Markdown table."""
    lines = ["| machine | steps/s | bound by |", "|---|---:|---|"]
    return "\n".join(lines + [f"| {name} | {p.speed:,.0f} | {p.bound} |" for name, p in found.items()])


def benchmark(args: Args) -> None:
    """Measure, check, report, and write the results."""
    check_arguments(args.json, sum_ms=min(args.sum_ms), iterations=args.iterations)
    gpu = torch.cuda.is_available()
    config = resolve(parse_train(["--tasks", args.suite, "--device", "cpu"]))
    parts = measure_parts(args, config)
    progress("training, as a check")
    here = predict(parts, config, available_cores(), gpu=Gpu() if gpu else None)
    measured = trained(args, config, ON_GPU if gpu else ["--device", "cpu"])
    found = predictions(parts, config)
    print(f"here: {here.speed:,.0f} steps/s predicted, {measured:,.0f} measured: {here.speed / measured:.2f}\n")
    print(report(found))
    results = {"parts": asdict(parts), "predicted_here": here.speed, "measured_here": measured}
    write_results(args.json, results | {name: asdict(p) for name, p in found.items()})


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
