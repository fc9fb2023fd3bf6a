"""What task sampling and gradient methods cost: whole iterations of training, all variants in turn.

Every variant is a training run with its own simulators, which wait while another variant runs an iteration. The first
variant is there twice: the difference between the two is noise.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from common import check_arguments, progress, run_benchmark, write_results
from task_sampling import METHODS

from mtrl_vec.commands.parsing import parse_train
from mtrl_vec.errors import InputError
from mtrl_vec.train import Trainer

WARMUP = 2
"""Iterations of each variant that do not count. On a GPU the first one compiles, and the second one captures."""
AGAIN = "uniform, again"


@dataclass(frozen=True)
class Args:
    """Time iterations of training with each method in turn, relative to uniform sampling.

    Example: python benchmarks/task_sampling_cost.py --rounds 20 --json cost.json
    """

    rounds: int = 20
    """Iterations of each method."""
    only: tuple[str, ...] = tuple(METHODS)
    """Methods to time besides uniform sampling. By default all."""
    flags: str = ""
    """Flags of `train` for all of them, for example --flags="--num-envs 720"."""
    json: Path | None = None
    """Also write the results to this file."""


@dataclass(frozen=True)
class Seconds:
    """Time of an iteration, and parts of it."""

    whole: float
    update: float
    task_sampling: float


def measure(args: Args) -> dict[str, float]:
    """Median seconds of an iteration and of its task sampling, and median ratios to ``uniform`` in the same round."""
    check_arguments(args.json, rounds=args.rounds)
    for name in args.only:
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}: known are {', '.join(METHODS)}")
    torch._dynamo.config.recompile_limit = 64  # if compiled, every variant compiles the same functions
    flags = {"uniform": "", AGAIN: "", **{name: METHODS[name] for name in args.only if name != "uniform"}}
    rounds: dict[str, list[Seconds]] = {name: [] for name in flags}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainers = {}
        for i, (name, flag) in enumerate(flags.items()):
            progress(f"starting {name}")
            trainers[name] = started(f"{args.flags} {flag}".split(), args.rounds, folder / str(i), stack)
        order = np.random.default_rng(0)  # otherwise every variant always follows the same one
        for turn in range(args.rounds):
            progress(f"round {turn + 1} of {args.rounds}")
            for name in order.permutation(list(trainers)):
                rounds[name].append(timed_iteration(trainers[name]))
    return summary(rounds)


def started(flags: list[str], rounds: int, run_dir: Path, stack: contextlib.ExitStack) -> Trainer:
    """A training run after its warm-up, to be ended by ``stack``."""
    config = parse_train([*flags, "--eval-interval", "0", "--quiet", "--run-dir", str(run_dir)])
    iterations = WARMUP + rounds + 1  # with overlap, the last iteration of a run has nothing to collect
    config = config.replace(total_frames=max(config.total_frames, iterations * config.frames_per_batch))
    trainer = Trainer(config)
    stack.enter_context(trainer.lock)
    stack.enter_context(contextlib.closing(trainer.pipeline))
    for _ in range(WARMUP):
        trainer.iterate()
    return trainer


def timed_iteration(trainer: Trainer) -> Seconds:
    """Run an iteration and time it."""
    sections = trainer.timer.seconds
    before, start = dict(sections), time.perf_counter()
    trainer.iterate()
    whole = time.perf_counter() - start
    return Seconds(whole, *(sections[name] - before[name] for name in ("update", "task_sampling")))


def summary(rounds: dict[str, list[Seconds]]) -> dict[str, float]:
    """See `measure`."""
    results = {}
    for name, seconds in rounds.items():
        pairs = list(zip(seconds, rounds["uniform"], strict=True))
        results[f"seconds/{name}"] = float(np.median([s.whole for s in seconds]))
        results[f"task_sampling_seconds/{name}"] = float(np.median([s.task_sampling for s in seconds]))
        results[f"ratio/{name}"] = float(np.median([s.whole / uniform.whole for s, uniform in pairs]))
        results[f"update_ratio/{name}"] = float(np.median([s.update / uniform.update for s, uniform in pairs]))
    return results


def report(results: dict[str, float]) -> str:
    """A Markdown table."""
    lines = [
        "| | s per iteration | relative to uniform | update relative to uniform | ms for task sampling |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in (key.removeprefix("seconds/") for key in results if key.startswith("seconds/")):
        seconds, ratios = results[f"seconds/{name}"], [results[f"{kind}/{name}"] for kind in ("ratio", "update_ratio")]
        own = 1e3 * results[f"task_sampling_seconds/{name}"]
        lines.append(f"| {name} | {seconds:.3f} | {ratios[0]:.3f} | {ratios[1]:.3f} | {own:.2f} |")
    return "\n".join(lines)


def benchmark(args: Args) -> None:
    """Measure, report, and write the results."""
    results = measure(args)
    print(report(results))
    write_results(args.json, results)


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
