"""How fast and how well training learns: the default settings on several seeds, and with some of its choices undone.

A study is a list of cells: one training run each, evaluated under Meta-World's official protocol. A cell that has its
row in the results is skipped, one that was trained but not evaluated is only evaluated, and one whose training was
interrupted goes on. Everything lands in ``benchmarks/learning/``: the metrics of each run as ``<cell>.csv``,
``results.csv`` with a row per cell, written as each ends, and a picture.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import tyro
from common import progress

import mtrl_vec
from mtrl_vec.checkpoint import BEST_NAME, PRETRAINED, load_latest
from mtrl_vec.cli import parse_train
from mtrl_vec.errors import InputError
from mtrl_vec.machine import machine, versions
from mtrl_vec.plotting import plot_runs, read_metrics
from mtrl_vec.tasks import TASKS

FOLDER = Path(__file__).parent / "learning"
RESULTS = FOLDER / "results.csv"
RUNS = Path("runs") / "learning"
TASK_NAMES = tuple(task.name for task in TASKS)
THRESHOLDS = (0.9, 0.98)

ABLATION = {
    "no-reward-scale": "--no-normalize-reward",
    "no-per-task-advantage": "--no-per-task-advantage",
    "no-random-phase": "--no-random-phase",
    "constant-lr": "--target-kl None",
    "absolute-inputs": "--no-relative-inputs",
    "tutorial": "--preset tutorial",
    **{f"{name}-alone": f"--tasks {name}" for name in TASK_NAMES},
}
"""What is changed in each cell of the ablation, all with seed 1: to be compared with the cell ``seed1``."""

VARIANTS = {
    "bf16": "--seed 1 --precision bf16",
    "bf16-seed2": "--seed 2 --precision bf16",
    "bf16-seed3": "--seed 3 --precision bf16",
    "overlap": "--seed 1 --overlap",
    "gpu-preset": "--seed 1 --preset gpu --device cpu",
}
"""Other ways to run the same: what do they cost in learning?"""

Row = dict[str, object]


@dataclass(frozen=True)
class Args:
    """Train with the defaults for each seed, evaluate, and draw the learning curves.

    Example: python benchmarks/learning.py --seeds 1 2 3
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    """Training seeds."""
    eval_seeds: tuple[int, ...] = (100, 200, 300)
    """Seeds of the official evaluation, 50 goals a task each."""
    ablation: bool = False
    """Also leave out one choice at a time, with seed 1, and learn each task alone; after the seeds."""
    variants: bool = False
    """Also learn in bf16, with collecting and learning overlapped, and with the settings for GPUs."""
    ship: str | None = None
    """Put the best policy of this cell into the package, as `eval pretrained`, with its provenance beside it."""
    report_only: bool = False
    """Measure nothing: print the tables and draw the picture of what there is."""


def cells(args: Args) -> dict[str, list[str]]:
    """The training flags of every cell, by its name."""
    study = {f"seed{seed}": ["--seed", str(seed)] for seed in args.seeds}
    if args.ablation:
        study |= {name: ["--seed", "1", *shlex.split(flags)] for name, flags in ABLATION.items()}
    if args.variants:
        study |= {name: shlex.split(flags) for name, flags in VARIANTS.items()}
    return study


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "mtrl_vec", *arguments]
    progress(shlex.join(["python", *command[1:]]))
    process = subprocess.Popen(command)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.wait()  # it was told as well, and is saving
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def is_trained(run_dir: Path, flags: Sequence[str]) -> bool:
    """Whether a run with these flags and today's defaults has come to its end."""
    wanted = parse_train([*flags, "--run-dir", str(run_dir)])
    try:
        config = json.loads((run_dir / "config.json").read_text())
        frames = read_metrics(run_dir / "metrics.csv")["frames"][-1]
    except (OSError, ValueError, InputError):  # missing or torn
        return False
    return config == wanted.to_dict() and frames >= wanted.total_frames


def train(run_dir: Path, flags: Sequence[str]) -> None:
    """Train to the end: go on where an earlier attempt with the same settings was interrupted, or start anew."""
    if is_trained(run_dir, flags):
        return
    wanted = parse_train([*flags, "--run-dir", str(run_dir)])
    try:
        checkpoint, _ = load_latest(run_dir)
        resumable = checkpoint["config"] == wanted.to_dict()
    except InputError:
        resumable = False
    if resumable:
        run("train", "--resume", str(run_dir))
        return
    if run_dir.exists():  # with other settings, or nothing to go on from
        run_dir.rename(run_dir.with_name(f"{run_dir.name}-until-{datetime.now():%Y%m%d-%H%M%S}"))
    run("train", *flags, "--run-dir", str(run_dir))


def first_reached(metrics: dict[str, np.ndarray], reached: np.ndarray) -> tuple[float, float]:
    """Frames and minutes until the first of the iterations [N] that have reached something, or NaN."""
    iterations = np.flatnonzero(reached)
    if not len(iterations):
        return math.nan, math.nan
    return float(metrics["frames"][iterations[0]]), round(metrics["time/elapsed"][iterations[0]] / 60, 2)


def measure(
    name: str, flags: Sequence[str], eval_seeds: Sequence[int], folder: Path | None = None, runs: Path | None = None
) -> Row:
    """Train and evaluate one cell, with its metrics left in ``folder``. Returns its row of ``results.csv``."""
    folder, runs = folder or FOLDER, runs or RUNS
    run_dir = runs / name
    train(run_dir, flags)
    out = runs / f"{name}-eval.json"
    run("eval", str(run_dir), "--seeds", *map(str, eval_seeds), "--json", str(out))
    (score,) = json.loads(out.read_text())
    shutil.copy(run_dir / "metrics.csv", folder / f"{name}.csv")

    metrics = read_metrics(run_dir / "metrics.csv")
    row: Row = {"cell": name, "frames": int(metrics["frames"][-1])}
    row["minutes"] = round(metrics["time/elapsed"][-1] / 60, 1)
    row["evaluation_share"] = round(metrics["time/evaluate"][-1] / metrics["time/elapsed"][-1], 4)
    for task in TASK_NAMES:
        success = f"eval/{task}/success_rate"
        row[success] = round(score[success], 4) if success in score else ""
        for threshold in THRESHOLDS:
            columns = f"{task}/frames_to_{threshold}", f"{task}/minutes_to_{threshold}"
            row |= dict.fromkeys(columns, "")
            if success in score:
                row |= zip(
                    columns, first_reached(metrics, metrics[f"train/{task}/success_rate"] >= threshold), strict=True
                )
    mean = "eval/mean_success_rate"
    row[mean] = round(score[mean], 4)
    row["evaluated"], row["evaluated_frames"] = Path(score["checkpoint"]).name, score["frames"]
    row["sha256"] = hashlib.sha256((run_dir / BEST_NAME).read_bytes()).hexdigest()
    row["eval_seeds"] = " ".join(map(str, eval_seeds))
    row["command"] = shlex.join(["python", "-m", "mtrl_vec", "train", *flags])
    return row | machine() | versions()


def write_results(rows: Sequence[Row], results: Path) -> None:
    """All rows, in place of those written before."""
    temporary = results.with_suffix(".tmp")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(results)


def ship(cell: str) -> None:
    """Make the best policy of a cell the one that comes with the package, with its row of the results beside it."""
    with RESULTS.open() as file:
        row = next(row for row in csv.DictReader(file) if row["cell"] == cell)
    best = RUNS / cell / BEST_NAME
    if not best.exists() or hashlib.sha256(best.read_bytes()).hexdigest() != row["sha256"]:
        raise InputError(f"--ship {cell}: {best} is not the policy that {RESULTS} tells of; remove the row to redo it")
    package = Path(mtrl_vec.__file__).parent
    shutil.copy(best, package / f"{PRETRAINED}.pt")
    (package / f"{PRETRAINED}.json").write_text(json.dumps(row, indent=2) + "\n")


def report(rows: Sequence[Row]) -> str:
    """A table of cells in Markdown: success per task, then what it took to reach it."""
    short = [name.removesuffix("-v3") for name in TASK_NAMES]
    head = ["cell", *short, "mean", "frames", "minutes"]
    head += [f"{task} to {threshold:.0%}" for task in short for threshold in THRESHOLDS]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        line = [str(row["cell"])]
        line += [_number(row[f"eval/{task}/success_rate"], "{:.3f}") for task in TASK_NAMES]
        line += [_number(row["eval/mean_success_rate"], "{:.3f}")]
        line += [f"{float(str(row['frames'])) / 1e6:.1f}M", _number(row["minutes"], "{:.1f}")]
        for task in TASK_NAMES:
            for threshold in THRESHOLDS:
                frames, minutes = row[f"{task}/frames_to_{threshold}"], row[f"{task}/minutes_to_{threshold}"]
                if frames != "" and math.isnan(float(str(frames))):
                    line.append("never")
                else:
                    scaled = "" if frames == "" else float(str(frames)) / 1e6
                    line.append(f"{_number(scaled, '{:.2f}M')} {_number(minutes, '({:.1f} min)')}".strip())
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: object, form: str) -> str:
    return "" if value == "" else form.format(float(str(value)))


def study(args: Args) -> None:
    """Measure what is missing, write it down, and report."""
    FOLDER.mkdir(exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            rows = list(csv.DictReader(file))
    measured, wanted = {row["cell"] for row in rows}, {} if args.report_only else cells(args)
    if args.ship is not None and args.ship not in measured | wanted.keys():
        raise InputError(f"--ship {args.ship}: no such cell; there are {', '.join(sorted(measured | wanted.keys()))}")
    for name, flags in wanted.items():
        if name in measured:
            progress(f"{name} is in {RESULTS} already")
            continue
        rows.append(measure(name, flags, args.eval_seeds))
        write_results(rows, RESULTS)
    if not rows:
        raise InputError("nothing has been measured yet: run without --report-only")
    print(report(rows))
    if seeds := [str(row["cell"]) for row in rows if str(row["cell"]).startswith("seed")]:
        plot_runs([FOLDER / f"{seed}.csv" for seed in seeds], FOLDER / "learning")
    if args.ship is not None:
        ship(args.ship)


def run_study(study: Callable[[], None]) -> int:
    """Returns the exit code; what goes wrong is one line."""
    try:
        study()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {shlex.join(error.cmd)} ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> int:
    args = tyro.cli(Args)
    return run_study(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
