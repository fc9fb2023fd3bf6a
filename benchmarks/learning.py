"""How fast and how well training learns: the default settings on several seeds, and an ablation.

A study is a list of cells: one training run each, evaluated under Meta-World's official protocol. Cells that already
have a row in the results are skipped, cells that were trained but not evaluated are only evaluated, and interrupted
training is resumed. Results go to ``benchmarks/learning/`` for three tasks, and to ``benchmarks/learning_mt10/`` and
``benchmarks/learning_mt50/``: ``results.csv`` with a row per cell, written as soon as the cell finishes,
``curves.csv.xz`` with the metrics of all iterations (see ``curves.py``), and a picture.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import curves
import numpy as np
import tyro
from common import progress, run_benchmark
from torch import Tensor

import mtrl_vec.policy
from mtrl_vec.commands.curves import read_metrics
from mtrl_vec.commands.parsing import parse_train
from mtrl_vec.config import RuntimeConfig, TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.files import sha256_of, write_atomically
from mtrl_vec.machine import machine, versions
from mtrl_vec.policy.checkpoint import BEST_NAME, CRITIC, PRETRAINED, load_checkpoint, load_latest, save_checkpoint
from mtrl_vec.policy.migrations import STATISTICS
from mtrl_vec.tasks.suite import MT3, TASK_SETS
from mtrl_vec.train.resolve import resolve
from mtrl_vec.train.run_dir import resumed_config

FOLDER = Path(__file__).parent / "learning"
RUNS = Path("runs") / "learning"
RESULTS = "results.csv"
PACKAGE = Path(mtrl_vec.policy.__file__).parent
"""Folder of the pretrained policy."""
TASK_NAMES = tuple(task.name for task in MT3)
LARGEST = 2_500_000
"""Bytes above which an included policy is stored as float16 and, if it is still larger, without its critic."""
THRESHOLDS = (0.9, 0.98)
ALONE_FRAMES = 500_000
"""Length of the runs of single tasks beside ten or fifty: at least a task's part of the frames of all."""

ABLATION = {
    "no-reward-scale": "--no-normalize-reward",
    "no-per-task-advantage": "--no-per-task-advantage",
    "no-random-phase": "--no-random-phase",
    "constant-lr": "--target-kl None",
    "absolute-inputs": "--no-relative-features",
    "tutorial": "--preset tutorial",
}
"""The flags of each cell of the ablation, all with seed 1. Compare with the cell ``seed1`` of the same length."""

EXPLORATION = {
    "plain": "--noise-correlation 0 --no-hold-std --no-bounded-mean --no-popart --task-sampling uniform "
    "--no-direct-features",
    "white-noise": "--noise-correlation 0",
    "free-std": "--no-hold-std",
    "unbounded-mean": "--no-bounded-mean",
    "no-popart": "--no-popart",
    "uniform-sampling": "--task-sampling uniform",
    "360-envs": "--num-envs 360",
    "half-kl": "--final-kl-fraction 0.5",
}
"""The same for ten and fifty tasks: what finds the tasks that are hard to find, and how the KL target is annealed."""

VARIANTS = {
    "bf16": "--seed 1 --precision bf16",
    "bf16-seed2": "--seed 2 --precision bf16",
    "bf16-seed3": "--seed 3 --precision bf16",
    "overlap": "--seed 1 --overlap",
    "gpu-preset": "--seed 1 --preset gpu --device cpu --precision fp32 --compile off",
}
"""Settings that are there for speed. How do they affect learning?"""

Row = dict[str, object]


@dataclass(frozen=True)
class Args:
    """Train with the default settings on each seed, evaluate, and draw the learning curves.

    Example: python benchmarks/learning.py --suite MT10 --seeds 1 2 3
    """

    suite: Literal["MT3", "MT10", "MT50"] = "MT3"
    """Tasks to train on together."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Training seeds."""
    total_frames: int | None = None
    """Length of the runs of the seeds and of the ablation, if not the default; their cells are named after it."""
    eval_seeds: tuple[int, ...] = (100, 200, 300)
    """Seeds of the official evaluation, 50 goals per task each."""
    ablation: bool = False
    """Also run the ablation: one design choice removed at a time."""
    ablation_seeds: tuple[int, ...] = (1,)
    """Its training seeds. Cells of others than 1 have the seed in their names."""
    only: tuple[str, ...] = ()
    """Cells of the ablation to run, by default all."""
    alone: bool = False
    """Also train on each task alone, with seed 1."""
    variants: bool = False
    """Also train three tasks in bf16, with collecting and learning overlapped, and with the GPU preset's batch size."""
    ship: str | None = None
    """Make the best policy of this cell the pretrained one of the package, with its row of the results beside it."""
    report_only: bool = False
    """Measure nothing: print the table and draw the picture of the existing results."""


def cells(args: Args) -> dict[str, list[str]]:
    """The training flags of all cells by name."""
    of_three = args.suite == "MT3"
    tasks = [] if of_three else ["--tasks", args.suite]
    length, suffix = ([], "")
    if args.total_frames is not None:
        length, suffix = ["--total-frames", str(args.total_frames)], f"-{args.total_frames / 1e6:g}M"
    study = {f"seed{seed}{suffix}": [*tasks, "--seed", str(seed), *length] for seed in args.seeds}
    if args.ablation:
        removed = ABLATION if of_three else EXPLORATION
        for seed, (name, flags) in itertools.product(args.ablation_seeds, removed.items()):
            if name in args.only or not args.only:
                cell = f"{name}{suffix}" if seed == 1 else f"{name}-seed{seed}{suffix}"
                study[cell] = [*tasks, "--seed", str(seed), *shlex.split(flags), *length]
    if args.alone:
        length = [] if of_three else ["--total-frames", str(ALONE_FRAMES)]
        study |= {f"{name}-alone": ["--seed", "1", "--tasks", name, *length] for name in task_names(args.suite)}
    if args.variants:
        study |= {name: shlex.split(flags) for name, flags in VARIANTS.items()}
    return study


def task_names(suite: str) -> tuple[str, ...]:
    """Names of the tasks of a set."""
    return tuple(task.name for task in TASK_SETS[suite])


def runs_of(suite: str) -> Path:
    """Where the runs of a set go."""
    return RUNS if suite == "MT3" else RUNS.with_name(f"{RUNS.name}_{suite.lower()}")


def folder_of(suite: str) -> Path:
    """Where the results of a set go."""
    return FOLDER if suite == "MT3" else FOLDER.with_name(f"{FOLDER.name}_{suite.lower()}")


def run(*arguments: str) -> None:
    """Run a command of the package. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "mtrl_vec", *arguments]
    progress(shlex.join(["python", *command[1:]]))
    process = subprocess.Popen(command)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.wait()  # it received Ctrl-C too, and is saving its state
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def is_same_run(config: TrainConfig, other: TrainConfig) -> bool:
    """Whether resolved settings mean the same run: of the runtime settings only length and precision matter."""

    def key(config: TrainConfig) -> TrainConfig:
        runtime = RuntimeConfig(total_frames=config.total_frames, precision=config.runtime.precision)
        return dataclasses.replace(config, runtime=runtime)

    return key(config) == key(other)


def is_trained(run_dir: Path, wanted: TrainConfig) -> bool:
    """Whether a folder has a finished run with these resolved settings."""
    try:
        config = TrainConfig.from_dict(json.loads((run_dir / "config.json").read_text()))
        frames = read_metrics(run_dir / "metrics.csv")["frames"][-1]
    except (OSError, ValueError, KeyError, TypeError, InputError):  # missing, incomplete, or of another version
        return False
    return is_same_run(config, wanted) and frames >= wanted.total_frames


def is_resumable(run_dir: Path, wanted: TrainConfig) -> bool:
    """Whether a folder has an interrupted run with these resolved settings."""
    try:
        checkpoint, _ = load_latest(run_dir)
        return is_same_run(resumed_config(run_dir, checkpoint), wanted)
    except InputError:  # no checkpoint, or one of another version
        return False


def train(run_dir: Path, flags: Sequence[str]) -> None:
    """Train with these flags and the current defaults until the run is finished: resume it, or start a new one."""
    wanted = resolve(parse_train(flags))
    if is_trained(run_dir, wanted):
        return
    if is_resumable(run_dir, wanted):
        run("train", "--resume", str(run_dir))
        return
    if run_dir.exists():  # other settings, or nothing to resume from
        run_dir.rename(run_dir.with_name(f"{run_dir.name}-until-{datetime.now():%Y%m%d-%H%M%S}"))
    run("train", *flags, "--run-dir", str(run_dir))


def first_reached(metrics: dict[str, np.ndarray], reached: np.ndarray) -> tuple[float, float]:
    """Frames and minutes until the end of the first iteration for which ``reached`` [N] is true, NaN if none is."""
    iterations = np.flatnonzero(reached)
    if not len(iterations):
        return math.nan, math.nan
    return float(metrics["frames"][iterations[0]]), round(metrics["time/elapsed"][iterations[0]] / 60, 2)


def measure(
    name: str,
    flags: Sequence[str],
    eval_seeds: Sequence[int],
    *,
    folder: Path | None = None,
    runs: Path | None = None,
    tasks: Sequence[str] = TASK_NAMES,
) -> Row:
    """Train and evaluate a cell, and add its metrics to the curves in ``folder``. Returns its row of the results.

    Args:
        name, flags: of the cell.
        eval_seeds: of the official evaluation.
        folder, runs: of the results, and of the runs.
        tasks: that have columns in the results, whether the cell trains on them or not.
    """
    folder, runs = folder or FOLDER, runs or RUNS
    run_dir = runs / name
    train(run_dir, flags)
    out = runs / f"{name}-eval.json"
    run("eval", str(run_dir), "--seeds", *map(str, eval_seeds), "--json", str(out))
    (score,) = json.loads(out.read_text())
    metrics = read_metrics(run_dir / "metrics.csv")
    curves.add(folder, name, metrics)

    row: Row = {"cell": name, "frames": int(metrics["frames"][-1])}
    row["minutes"] = round(metrics["time/elapsed"][-1] / 60, 1)
    row["evaluation_share"] = round(metrics["time/evaluate"][-1] / metrics["time/elapsed"][-1], 4)
    trained = [task for task in tasks if f"eval/{task}/success_rate" in score]
    for task in tasks:
        success = f"eval/{task}/success_rate"
        row[success] = round(score[success], 4) if task in trained else ""
        for threshold in THRESHOLDS:
            columns = f"{task}/frames_to_{threshold}", f"{task}/minutes_to_{threshold}"
            row |= dict.fromkeys(columns, "")
            if task in trained:
                reached = first_reached(metrics, metrics[f"train/{task}/success_rate"] >= threshold)
                row |= zip(columns, reached, strict=True)
    rates = np.array([metrics[f"train/{task}/success_rate"] for task in trained])
    for threshold in THRESHOLDS:
        columns = f"all/frames_to_{threshold}", f"all/minutes_to_{threshold}"
        row |= zip(columns, first_reached(metrics, (rates >= threshold).all(0)), strict=True)
    mean = "eval/mean_success_rate"
    row[mean] = round(score[mean], 4)
    row["evaluated"], row["evaluated_frames"] = Path(score["checkpoint"]).name, score["frames"]
    row["sha256"] = sha256_of(run_dir / BEST_NAME)
    row["eval_seeds"] = " ".join(map(str, eval_seeds))
    row["command"] = shlex.join(["python", "-m", "mtrl_vec", "train", *flags])
    return row | machine() | versions()


def read_results(results: Path) -> list[Row]:
    """The rows of a file that `write_results` wrote. Empty if there is no file."""
    if not results.exists():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def write_results(rows: Sequence[Row], results: Path) -> None:
    """Replace the rows of a file."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(results, text.getvalue().encode())


def ship(cell: str, suite: str) -> None:
    """Make the best policy of a cell the pretrained one of its tasks, with its row of the results beside it."""
    results = folder_of(suite) / RESULTS
    row = next(row for row in read_results(results) if row["cell"] == cell)
    best = runs_of(suite) / cell / BEST_NAME
    policy = best.read_bytes() if best.exists() else b""
    if hashlib.sha256(policy).hexdigest() != row["sha256"]:
        raise InputError(f"--ship {cell}: {best} is not the policy of its row in {results}; remove the row to redo it")
    name = PRETRAINED[suite]
    provenance = {column: value for column, value in row.items() if value != ""}
    if len(policy) > LARGEST:
        provenance["weights"] = save_smaller(PACKAGE / f"{name}.pt", load_checkpoint(best))
        provenance["sha256"] = sha256_of(PACKAGE / f"{name}.pt")
    else:
        write_atomically(PACKAGE / f"{name}.pt", policy)
    write_atomically(PACKAGE / f"{name}.json", (json.dumps(provenance, indent=2) + "\n").encode())


def save_smaller(path: Path, content: dict[str, Any]) -> str:
    """Save a checkpoint with weights of half the precision; without its critic if it is too large even so.

    Statistics of observations need all of their precision.

    Returns:
        What its weights are now.
    """
    policy: dict[str, Tensor] = content["policy"]
    weights = {name: t.half() for name, t in policy.items() if t.dim() > 1 and not name.startswith(STATISTICS)}
    save_checkpoint(path, content | {"policy": policy | weights})
    if path.stat().st_size <= LARGEST:
        return "float16"
    acting = {name: t for name, t in (policy | weights).items() if not name.startswith(CRITIC)}
    save_checkpoint(path, content | {"policy": acting})
    return "float16, without the critic"


def report(rows: Sequence[Row], tasks: Sequence[str] = TASK_NAMES) -> str:
    """A Markdown table of cells: success per task, then the frames and minutes until it was reached in training.

    Of more than three tasks, until all of them had reached it at once.
    """
    short = [name.removesuffix("-v3") for name in tasks]
    timed = dict(zip(tasks, short, strict=True)) if len(tasks) <= 3 else {"all": "all"}
    head = ["cell", *short, "mean", "frames", "minutes"]
    head += [f"{name} to {threshold:.0%}" for name in timed.values() for threshold in THRESHOLDS]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        line = [str(row["cell"])]
        line += [_number(row[f"eval/{task}/success_rate"], "{:.3f}") for task in tasks]
        line += [_number(row["eval/mean_success_rate"], "{:.3f}")]
        line += [f"{float(str(row['frames'])) / 1e6:.1f}M", _number(row["minutes"], "{:.1f}")]
        for name in timed:
            for threshold in THRESHOLDS:
                frames, minutes = row[f"{name}/frames_to_{threshold}"], row[f"{name}/minutes_to_{threshold}"]
                if frames != "" and math.isnan(float(str(frames))):
                    line.append("never")
                else:
                    scaled = "" if frames == "" else float(str(frames)) / 1e6
                    line.append(f"{_number(scaled, '{:.2f}M')} {_number(minutes, '({:.1f} min)')}".strip())
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: object, form: str) -> str:
    return "" if value == "" else form.format(float(str(value)))


def in_picture(cells: Sequence[str]) -> list[str]:
    """The seeds of the default length, if there are any, else of all lengths: others are annealed at another pace."""
    seeds = [cell for cell in cells if cell.startswith("seed")]
    return [cell for cell in seeds if cell.removeprefix("seed").isdigit()] or seeds


def study(args: Args) -> None:
    """Measure the cells that are missing, and report all."""
    if args.ship is not None and args.suite not in PRETRAINED:
        raise InputError(
            f"--ship {args.ship}: no policy is included for {args.suite}, only for {', '.join(PRETRAINED)}"
        )
    if args.variants and args.suite != "MT3":
        raise InputError(f"--variants is given with --suite {args.suite}: the variants are of MT3")
    if unknown := set(args.only) - (ABLATION if args.suite == "MT3" else EXPLORATION).keys():
        raise InputError(f"--only {min(unknown)}: the ablation of {args.suite} has no such cell")
    folder, runs, tasks = folder_of(args.suite), runs_of(args.suite), task_names(args.suite)
    folder.mkdir(exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    results = folder / RESULTS
    rows = read_results(results)
    measured, wanted = {row["cell"] for row in rows}, {} if args.report_only else cells(args)
    if args.ship is not None and args.ship not in measured | wanted.keys():
        known = ", ".join(sorted(map(str, measured | wanted.keys())))
        raise InputError(f"--ship {args.ship}: there is no such cell, only {known}")
    for name, flags in wanted.items():
        if name in measured:
            progress(f"{name} is in {results} already")
            continue
        rows.append(measure(name, flags, args.eval_seeds, folder=folder, runs=runs, tasks=tasks))
        write_results(rows, results)
    if not rows:
        raise InputError("nothing has been measured yet: run without --report-only")
    print(report(rows, tasks))
    if shown := in_picture([str(row["cell"]) for row in rows]):
        curves.draw(folder, shown, folder / "learning.png")
    if args.ship is not None:
        ship(args.ship, args.suite)


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
