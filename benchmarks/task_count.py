"""Training with 3, 10 and 50 tasks: steps per second, where the time goes, and what routing rows to heads costs.

Whole training runs of each set take turns. What routing costs is the time of the heads of all tasks, forward and
backward on the rows of a minibatch, less that of one head on the same rows; it is compared with an optimiser step.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro
from common import check_arguments, progress, run_benchmark, seconds_per_call, write_results
from learner import update_call
from ranks import config_of, speeds

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.routing import TaskHeads
from mtrl_vec.tasks.layout import ACTION_SIZE
from mtrl_vec.tasks.suite import TASK_SETS

CPU = torch.device("cpu")
PARTS = ("simulate", "infer", "advantages", "update")


@dataclass(frozen=True)
class Args:
    """Train on each set of tasks in turn, and time its heads.

    Example: python benchmarks/task_count.py --rounds 3 --json task_count.json
    """

    suites: tuple[str, ...] = ("MT3", "MT10", "MT50")
    """Sets of tasks."""
    rounds: int = 3
    """Runs of each set."""
    iterations: int = 8
    """Iterations of each run, of which the first two do not count."""
    json: Path | None = None
    """Also write the results to this file."""


def heads_call(config: TrainConfig, num_tasks: int) -> Callable[[], object]:
    """Heads of actor and critic on the rows of a minibatch, sorted by task, forward and backward."""
    hidden = SharedPolicy.for_tasks(config.policy, config.tasks).torso.module.out_features
    rows = config.minibatch_size
    features = torch.randn(rows, hidden, requires_grad=True)
    task_idx = (torch.arange(rows) * num_tasks) // rows
    head = config.policy.head_width(num_tasks)
    heads = [TaskHeads(num_tasks, hidden, head, outputs, 1.0) for outputs in (ACTION_SIZE, 1)]

    def call() -> None:
        torch.cat([of_one(features, task_idx) for of_one in heads], dim=1).sum().backward()

    return call


def routing(config: TrainConfig, rounds: int) -> dict[str, float]:
    """Milliseconds of the heads, of a single head and of a whole optimiser step: medians of rounds in turn."""
    config = config.replace(num_epochs=1, num_minibatches=2, num_envs=2 * config.minibatch_size // 32, num_steps=32)
    calls = {
        "heads": heads_call(config, config.num_tasks),
        "one_head": heads_call(config, 1),
        "step": update_call(config, CPU),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(1000 * seconds_per_call(call, CPU, 0.5) / (2 if name == "step" else 1))
    return {name: median(values) for name, values in found.items()}


def measure(args: Args) -> dict[str, object]:
    """By set: seconds of an iteration and its parts, steps per second, and what routing costs."""
    check_arguments(args.json, rounds=args.rounds)
    if args.iterations < 3:
        raise InputError(f"iterations is {args.iterations}: it must be at least 3, since the first two do not count")
    for suite in args.suites:
        if suite not in TASK_SETS:
            raise InputError(f"suites: there is no set {suite}: there are {', '.join(TASK_SETS)}")
    runs: dict[str, list[dict[str, float]]] = {suite: [] for suite in args.suites}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            progress(f"round {turn + 1} of {args.rounds}")
            for suite in args.suites:
                run = Path(folder) / f"{suite} {turn}"
                runs[suite].append(speeds([sys.executable], 2, args.iterations, f"--tasks {suite}", run))
    return {
        suite: {
            "steps_per_second": median(run["frames"] / run["iteration"] for run in of_suite),
            "seconds": {name: median(run[name] for run in of_suite) for name in of_suite[0]},
            "routing_ms": routing(config_of(f"--tasks {suite}"), args.rounds),
        }
        for suite, of_suite in runs.items()
    }


def report(results: dict) -> str:
    """A Markdown table with a row per set."""
    lines = ["| tasks | steps/s | " + " | ".join(PARTS) + " | routing, of an optimiser step |"]
    lines += ["|---|" + "---:|" * (2 + len(PARTS))]
    for suite, found in results.items():
        seconds, routed = found["seconds"], found["routing_ms"]
        shares = [f"{seconds[part] / seconds['iteration']:.0%}" for part in PARTS]
        extra = (routed["heads"] - routed["one_head"]) / routed["step"]
        lines.append(f"| {suite} | {found['steps_per_second']:,.0f} | {' | '.join(shares)} | {extra:.0%} |")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    results = measure(args)
    print(report(results))
    write_results(args.json, results)


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
