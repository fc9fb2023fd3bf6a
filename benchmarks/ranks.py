"""What several ranks cost: whole training runs of one process and of two ranks in turn, and one message between ranks.

From the parts measured it works out what more ranks would do with as many environments each (weak scaling).
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import check_arguments, progress, run_benchmark, write_results

from mtrl_vec.commands.parsing import parse_train
from mtrl_vec.config import TrainConfig
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.torchrun import join

WARMUP = 2
"""Iterations of each run that do not count."""


@dataclass(frozen=True)
class Args:
    """Train with one process of two workers and with two ranks of one worker, in turn.

    Example: python benchmarks/ranks.py --rounds 5 --json ranks.json
    """

    rounds: int = 5
    """Pairs of runs; either kind goes first in every other one."""
    iterations: int = 12
    """Iterations of each run."""
    flags: str = ""
    """Flags of `train` for both, for example --flags="--tasks MT10"."""
    json: Path | None = None
    """Also write the results to this file."""


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def config_of(flags: str) -> TrainConfig:
    return parse_train(flags.split())


def speeds(launch: list[str], workers: int, iterations: int, flags: str, folder: Path) -> dict[str, float]:
    """Seconds per iteration of a run, and of its parts."""
    frames = str(iterations * config_of(flags).frames_per_batch)
    given = ["--total-frames", frames, "--eval-interval", "0", "--num-workers", str(workers), *flags.split()]
    command = [*launch, "-m", "mtrl_vec", "train", "--quiet", *given, "--run-dir", str(folder)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    frames_per_iteration = int(rows[0]["frames"])
    seconds = [frames_per_iteration / float(row["time/sps"]) for row in rows[WARMUP:]]
    parts = {
        name: (float(rows[-1][f"time/{name}"]) - float(rows[WARMUP - 1][f"time/{name}"])) / (len(rows) - WARMUP)
        for name in ("collect", "simulate", "infer", "advantages", "update", "checkpoint")
    }
    return {"frames": frames_per_iteration, "iteration": statistics.median(seconds), **parts}


def message(flags: str) -> dict[str, float]:
    """One sum over the ranks that run this, of all gradients and of one number: bytes, and median milliseconds."""
    torch.set_num_threads(1)
    config, ranks = config_of(flags), join("cpu")
    policy = SharedPolicy.for_tasks(config.policy, config.tasks)
    gradients = torch.zeros(sum(parameter.numel() for parameter in policy.parameters()))
    found = {"bytes": 4 * gradients.numel()}
    for name, tensor in {"milliseconds": gradients, "milliseconds_empty": torch.zeros(1)}.items():
        times = []
        for _ in range(300):
            ranks.sum(torch.zeros(1))  # they start together
            start = time.perf_counter()
            ranks.add(tensor)
            times.append(time.perf_counter() - start)
        found[name] = 1000 * statistics.median(times)
    first = ranks.first
    ranks.close()
    return found if first else {}


def measure(args: Args) -> dict[str, object]:
    """Seconds of an iteration of either kind, their ratios, and a message."""
    check_arguments(args.json, rounds=args.rounds)
    kinds = {"one process": ([sys.executable], 2), "two ranks": (torchrun(2), 1)}
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            progress(f"round {turn + 1} of {args.rounds}")
            for kind in list(kinds)[:: 1 if turn % 2 == 0 else -1]:
                launch, workers = kinds[kind]
                runs[kind].append(speeds(launch, workers, args.iterations, args.flags, Path(folder) / f"{kind} {turn}"))
    output = subprocess.run(
        [*torchrun(2), __file__, "--message", args.flags], check=True, capture_output=True, text=True
    ).stdout
    sent = json.loads(output.splitlines()[-1])
    pairs = zip(runs["one process"], runs["two ranks"], strict=True)
    ratios = [one["iteration"] / two["iteration"] for one, two in pairs]
    medians = {
        kind: {name: statistics.median(run[name] for run in of_kind) for name in of_kind[0]}
        for kind, of_kind in runs.items()
    }
    return {
        "seconds": medians,
        "ratios": ratios,
        "message": sent,
        "weak_scaling": weak_scaling(config_of(args.flags), medians["two ranks"], sent),
    }


def weak_scaling(config: TrainConfig, parts: dict[str, float], sent: dict[str, float]) -> dict[int, float]:
    """Speed of so many ranks together as a fraction of their speeds alone, with as many environments each as measured.

    Assumes that a sum goes round in a ring, as gloo's does: ``2 (R - 1)`` messages of ``1 / R`` of the bytes each, with
    the latency and the bandwidth that two ranks have on this machine; that all ranks draw the noise of all
    environments; and that everything else takes a rank as long as it took one of two.
    """
    learner = config.learner
    sums = learner.num_epochs * learner.num_minibatches
    draws = learner.num_steps * draw_seconds(int(parts["frames"]) // learner.num_steps // 2)
    empty, full = sent["milliseconds_empty"] / 1000, sent["milliseconds"] / 1000
    alone = parts["iteration"] - sums * full - draws

    def together(ranks: int) -> float:
        return alone + sums * ring_sum(ranks, empty, full) + (ranks - 1) * draws

    return {ranks: alone / together(ranks) for ranks in (2, 8, 64)}


def ring_sum(ranks: int, empty: float, full: float) -> float:
    """Seconds of a sum over ranks, from those of a sum over two: of one number, and of everything."""
    return (ranks - 1) * (empty + 2 / ranks * (full - empty))


def draw_seconds(environments: int) -> float:
    """Seconds to draw the noise of so many environments."""
    start = time.perf_counter()
    for _ in range(200):
        torch.randn(environments, 4)
    return (time.perf_counter() - start) / 200


def report(results: dict) -> str:
    one, two = (results["seconds"][kind] for kind in ("one process", "two ranks"))
    lines = ["| seconds per iteration | one process, 2 workers | 2 ranks, 1 worker each |", "|---|---:|---:|"]
    lines += [f"| {name} | {one[name]:.3f} | {two[name]:.3f} |" for name in one if name != "frames"]
    ratios = sorted(results["ratios"])
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    lines += [f"steps/s of two ranks to those of one process: {statistics.median(ratios):.2f} ({spread})"]
    sent = results["message"]
    lines += [f"one sum of gradients: {sent['bytes']:,} bytes, {sent['milliseconds']:.2f} ms"]
    lines += [f"one sum of a number: {sent['milliseconds_empty']:.2f} ms"]
    lines += [
        f"{ranks} ranks, model: {100 * share:.0f} % of their single speeds"
        for ranks, share in results["weak_scaling"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    results = measure(args)
    print(report(results))
    write_results(args.json, results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--message"]:  # what torchrun starts
        if result := message(sys.argv[2]):
            print(json.dumps(result))
    else:
        sys.exit(run_benchmark(main))
