"""What schedules and balanced gradients cost: whole iterations of training, each variant in its turn.

Every variant is a training of its own with its own simulators; while one runs an iteration, the others wait. A second
training like the first one tells how far two equal ones are apart.
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
from common import progress, write_results
from learning import run_study
from schedules import SCHEDULES

from mtrl_vec.cli import parse_train
from mtrl_vec.errors import InputError
from mtrl_vec.trainer import Trainer

WARMUP = 2
"""Iterations of each before the first that counts. On a GPU the first one compiles, and the second captures."""
AGAIN = "uniform, again"


@dataclass(frozen=True)
class Args:
    """Time iterations of training with each schedule in turn, relative to the uniform one.

    Example: python benchmarks/schedule_cost.py --rounds 20 --json cost.json
    """

    rounds: int = 20
    """Iterations of each."""
    only: tuple[str, ...] = tuple(SCHEDULES)
    """What to time besides the uniform one."""
    flags: str = ""
    """Flags of `train` for all of them, for example "--num-envs 720"."""
    json: Path | None = None
    """Also write the results to this file."""


def measure(args: Args) -> dict[str, float]:
    """Seconds of the median iteration, and of its schedule; ratios to ``uniform``, medians over the rounds."""
    if args.rounds < 1:
        raise InputError(f"rounds is {args.rounds}: it must be positive")
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: give a file in an existing folder")
    for name in args.only:
        if name not in SCHEDULES:
            raise InputError(f"unknown schedule {name!r}: known are {', '.join(SCHEDULES)}")
    torch._dynamo.config.recompile_limit = 64  # on a GPU each of them compiles the same functions
    flags = {"uniform": "", AGAIN: "", **{name: SCHEDULES[name] for name in args.only if name != "uniform"}}
    whole: dict[str, list[float]] = {name: [] for name in flags}
    update: dict[str, list[float]] = {name: [] for name in flags}
    schedule: dict[str, list[float]] = {name: [] for name in flags}
    with contextlib.ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        iterations = {}
        for i, (name, flag) in enumerate(flags.items()):
            common = ["--eval-interval", "0", "--quiet", "--run-dir", str(folder / str(i))]
            trainer = Trainer(parse_train([*args.flags.split(), *flag.split(), *common]))
            closing.enter_context(trainer.lock)
            iterations[name] = closing.enter_context(trainer.running()), trainer.timer
            for _ in range(WARMUP):
                iterations[name][0]()
        names, order = list(iterations), np.random.default_rng(0)
        for turn in range(args.rounds):
            progress(f"round {turn + 1} of {args.rounds}")
            for name in order.permutation(names):  # nobody always comes after the same
                iterate, timer = iterations[name]
                before, start = dict(timer.seconds), time.perf_counter()
                iterate()
                whole[name].append(time.perf_counter() - start)
                update[name].append(timer.seconds["update"] - before["update"])
                schedule[name].append(timer.seconds["schedule"] - before["schedule"])
    results = {}
    for name in flags:
        results[f"seconds/{name}"] = float(np.median(whole[name]))
        results[f"schedule_seconds/{name}"] = float(np.median(schedule[name]))
        results[f"ratio/{name}"] = float(np.median(np.divide(whole[name], whole["uniform"])))
        results[f"update_ratio/{name}"] = float(np.median(np.divide(update[name], update["uniform"])))
    return results


def report(results: dict[str, float]) -> str:
    """A table in Markdown."""
    lines = [
        "| | s an iteration | to uniform | its update to uniform's | ms for the schedule |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in (key.removeprefix("seconds/") for key in results if key.startswith("seconds/")):
        seconds, ratios = results[f"seconds/{name}"], [results[f"{kind}/{name}"] for kind in ("ratio", "update_ratio")]
        own = 1e3 * results[f"schedule_seconds/{name}"]
        lines.append(f"| {name} | {seconds:.3f} | {ratios[0]:.3f} | {ratios[1]:.3f} | {own:.2f} |")
    return "\n".join(lines)


def main() -> int:
    args = tyro.cli(Args)

    def study() -> None:
        results = measure(args)
        print(report(results))
        write_results(args.json, dict(results))

    return run_study(study)


if __name__ == "__main__":
    sys.exit(main())
