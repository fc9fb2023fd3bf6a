"""How fast and how well the default training learns: one run per seed, evaluated under Meta-World's official protocol.

Seeds that are in the results already are skipped, so that a study can be continued. Everything lands in
``benchmarks/learning/``: the metrics of each run, ``results.csv`` with a row per seed, and a picture.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from machine import machine, progress, versions

from mtrl_vec.tasks import TASKS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "learning"
TASK_NAMES = tuple(task.name for task in TASKS)
THRESHOLDS = (0.9, 0.98)


@dataclass(frozen=True)
class Args:
    """Train with the defaults for each seed, evaluate, and draw the learning curves."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """Training seeds."""
    eval_seeds: tuple[int, ...] = (100, 200, 300)
    """Seeds of the official evaluation, 50 goals a task each."""
    plot_only: bool = False
    """Only draw the picture of what has been measured."""


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "mtrl_vec", *arguments]
    progress(shlex.join(["python", *command[1:]]))
    subprocess.run(command, check=True)


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a ``metrics.csv``."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def first_reached(metrics: dict[str, np.ndarray], task: str, threshold: float) -> tuple[float | None, float | None]:
    """Frames and minutes until the success rate of the last 50 training episodes first reached a threshold."""
    reached = np.flatnonzero(metrics[f"train/{task}/success_rate"] >= threshold)
    if not len(reached):
        return None, None
    return metrics["frames"][reached[0]], round(metrics["time/elapsed"][reached[0]] / 60, 1)


def study(seed: int, eval_seeds: tuple[int, ...]) -> dict[str, object]:
    """Train and evaluate one seed. Returns its row of ``results.csv``."""
    run_dir = Path("runs") / "learning" / f"seed{seed}"
    train = ["train", "--seed", str(seed), "--run-dir", str(run_dir)]
    run(*train, *(["--overwrite"] if run_dir.exists() else []))
    scores: list[dict[str, float]] = []
    for eval_seed in eval_seeds:
        out = run_dir.parent / f"seed{seed}-eval{eval_seed}.json"
        run("eval", str(run_dir), "--seed", str(eval_seed), "--json", str(out))
        scores.append(json.loads(out.read_text()))
    shutil.copy(run_dir / "metrics.csv", FOLDER / f"seed{seed}.csv")

    metrics = read_metrics(run_dir / "metrics.csv")
    row: dict[str, object] = {"seed": seed, "frames": int(metrics["frames"][-1])}
    row["minutes"] = round(metrics["time/elapsed"][-1] / 60, 1)
    for name in scores[0]:
        row[name] = round(float(np.mean([score[name] for score in scores])), 4)
    for task in TASK_NAMES:
        for threshold in THRESHOLDS:
            frames, minutes = first_reached(metrics, task, threshold)
            row[f"{task}/frames_to_{threshold}"], row[f"{task}/minutes_to_{threshold}"] = frames, minutes
    row["eval_seeds"] = " ".join(map(str, eval_seeds))
    row["command"] = shlex.join(["python", "-m", "mtrl_vec", *train])
    return row | machine() | versions()


def draw(seeds: list[int]) -> None:
    """Success and return per task over frames and over wall-clock: a thin line per seed, their mean in bold."""
    runs = [read_metrics(FOLDER / f"seed{seed}.csv") for seed in seeds]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharey="row", layout="constrained")
    colors = dict(zip(TASK_NAMES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    clocks = (("frames", 1e6, "million frames"), ("time/elapsed", 60, "minutes"))
    for column, (clock, unit, label) in enumerate(clocks):
        grid = np.linspace(0, min(m[clock][-1] for m in runs), 200)
        for row, value in enumerate(("success_rate", "return")):
            axis = axes[row, column]
            for task in TASK_NAMES:
                curves = [np.interp(grid, m[clock], m[f"train/{task}/{value}"]) for m in runs]
                for curve in curves:
                    axis.plot(grid / unit, curve, color=colors[task], alpha=0.35, linewidth=0.8)
                axis.plot(grid / unit, np.mean(curves, axis=0), color=colors[task], linewidth=2, label=task)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("success rate, last 50 episodes")
    axes[1, 0].set_ylabel("return")
    axes[0, 0].legend()
    figure.suptitle(
        f"Training with exploration noise, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    )
    figure.savefig(FOLDER / "learning.png", dpi=110)
    plt.close(figure)


def main() -> int:
    args = tyro.cli(Args)
    FOLDER.mkdir(exist_ok=True)
    results = FOLDER / "results.csv"
    rows: list[dict[str, object]] = []
    if results.exists():
        with results.open() as file:
            rows = list(csv.DictReader(file))
    done = {int(str(row["seed"])) for row in rows}
    for seed in () if args.plot_only else args.seeds:
        if seed in done:
            progress(f"seed {seed} is in {results} already")
            continue
        rows.append(study(seed, args.eval_seeds))
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
            writer.writeheader()
            writer.writerows(rows)
        done.add(seed)
    if not done:
        print("error: nothing has been measured yet: run without --plot-only", file=sys.stderr)
        return 2
    draw(sorted(done))
    for row in rows:
        print(f"seed {row['seed']}: {row['frames']} frames, {row['minutes']} minutes", end="")
        print("".join(f", {task} {float(str(row[f'eval/{task}/success_rate'])):.3f}" for task in TASK_NAMES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
