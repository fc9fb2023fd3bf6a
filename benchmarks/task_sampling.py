"""Which task sampling method to use: all methods are screened on one seed, then some of them run on several.

Methods that combine gradients or normalise values are included. Cells are skipped and resumed as in ``learning.py``.
Results go to ``benchmarks/task_sampling/``: ``results.csv``, ``curves.csv.xz``, and pictures.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import curves
import learning
import numpy as np
import tyro
from common import progress, run_benchmark
from scipy.stats import permutation_test

from mtrl_vec.commands.parsing import parse_train
from mtrl_vec.errors import InputError

FOLDER = Path(__file__).parent / "task_sampling"
RUNS = Path("runs") / "task_sampling"
MEAN_SUCCESS, EACH_SUCCESS = 0.9, 0.98
TO_MEAN, TO_ALL = f"frames_to_mean_{MEAN_SUCCESS}", f"frames_to_all_{EACH_SUCCESS}"
MINUTES_TO_MEAN = f"minutes_to_mean_{MEAN_SUCCESS}"

BEFORE = (
    "--target-kl 0.02 --final-kl-fraction 0.2 --noise-correlation 0 --no-hold-std --no-bounded-mean "
    "--no-direct-features --num-epochs 6 --num-minibatches 6"
)
"""The defaults at the time of the study, but for what its cells differ in."""
METHODS = {
    "uniform": "--task-sampling uniform --no-popart",
    "random": "--task-sampling random --no-popart",
    "curriculum": "--task-sampling curriculum --no-popart",
    "curriculum-no-floor": "--task-sampling curriculum --min-task-prob 0 --no-popart",
    "difficulty": "--task-sampling difficulty --no-popart",
    "difficulty-loss": "--task-sampling difficulty --difficulty-by loss --no-popart",
    "progress": "--task-sampling progress --no-popart",
    "meta": "--task-sampling meta --no-popart",
    "pcgrad": "--task-sampling uniform --no-popart --gradient-method pcgrad",
    "cagrad": "--task-sampling uniform --no-popart --gradient-method cagrad",
    "popart": "--task-sampling uniform",
    "popart-only": "--task-sampling uniform --no-normalize-reward",
}
"""The methods that are screened, and their flags."""


@dataclass(frozen=True)
class Args:
    """Screen methods on one seed for --screen-frames, then run --finalists on --final-seeds for --final-frames.

    Example: python benchmarks/task_sampling.py --finalists uniform progress meta
    """

    screen_frames: int = 2_000_000
    """Environment steps of a screening run."""
    final_frames: int = 5_000_000
    """Environment steps of a run of the finalists. Each length has its own tables."""
    final_seeds: tuple[int, ...] = (1, 2, 3)
    """Training seeds of the finalists."""
    only: tuple[str, ...] = tuple(METHODS)
    """Methods to screen. By default all."""
    finalists: tuple[str, ...] = ()
    """Methods to run on several seeds."""
    eval_seeds: tuple[int, ...] = (100, 200, 300)
    """Seeds of the official evaluation, 50 goals per task each."""
    report_only: bool = False
    """Measure nothing: print the tables and draw the pictures of the existing results."""


def cells(args: Args) -> dict[str, list[str]]:
    """The training flags of all cells by name."""
    for name in (*args.only, *args.finalists):
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}: known are {', '.join(METHODS)}")
    if args.finalists and not args.final_seeds:
        raise InputError("final_seeds is empty: name at least one, for example --final-seeds 1 2 3")
    frames = "--total-frames"
    before = BEFORE.split()
    study = {
        name: [*before, *METHODS[name].split(), "--seed", "1", frames, str(args.screen_frames)] for name in args.only
    }
    length = f"{args.final_frames / 1e6:.6f}".rstrip("0").rstrip(".") + "M"
    for seed in args.final_seeds:
        for name in args.finalists:
            flags = [*before, *METHODS[name].split(), "--seed", str(seed), frames, str(args.final_frames)]
            study[f"{name}-{length}-seed{seed}"] = flags
    for flags in study.values():
        parse_train(flags)  # find mistakes before the first one runs
    return study


def first_success(
    metrics: dict[str, np.ndarray], threshold: float, of: Callable[..., np.ndarray] = np.mean
) -> tuple[float, float]:
    """Frames and minutes until the success rates of the tasks in training first reached a threshold, or NaN.

    Only iterations count before which all tasks were sampled for ten iterations: otherwise a rate may be out of date.

    Args:
        metrics: of a run.
        threshold: for the mean success rate.
        of: function to use instead of the mean. ``np.min`` requires all tasks to reach the threshold.
    """
    rates = of([metrics[f"train/{task}/success_rate"] for task in learning.TASK_NAMES], axis=0)
    fraction = np.min([metrics[f"train/{task}/frame_fraction"] for task in learning.TASK_NAMES], axis=0)
    sampled = np.array([fraction[max(0, i - 9) : i + 1].min() > 0 for i in range(len(fraction))])
    return learning.first_reached(metrics, sampled & (rates >= threshold))


def steps_per_second(metrics: dict[str, np.ndarray]) -> float:
    """Environment steps per second in the median iteration, including learning."""
    return round(float(np.median(metrics["time/sps"])), 1)


def forgetting(metrics: dict[str, np.ndarray], task: str, other: str) -> float:
    """The lowest success rate of a task after it first reached 90 %, while another task had most of the frames.

    Both rates count: in training, where the task is sampled, and in evaluations during training. NaN if there is none.
    """
    success, fraction = metrics[f"train/{task}/success_rate"], metrics[f"train/{other}/frame_fraction"]
    learned = np.flatnonzero(success >= MEAN_SUCCESS)
    if not len(learned):
        return math.nan
    later = (np.arange(len(success)) > learned[0]) & (fraction > 0.5)
    seen = success[later & (metrics[f"train/{task}/frame_fraction"] > 0)], metrics[f"eval/{task}/success_rate"][later]
    known = [value for value in np.concatenate(seen) if not math.isnan(value)]
    return round(float(min(known)), 4) if known else math.nan


def figures(metrics: dict[str, np.ndarray]) -> learning.Row:
    """The columns of ``results.csv`` that `learning.measure` does not have."""
    frames, minutes = first_success(metrics, MEAN_SUCCESS)
    reach, *_, pick_place = learning.TASK_NAMES
    return {
        TO_MEAN: frames,
        MINUTES_TO_MEAN: minutes,
        TO_ALL: first_success(metrics, EACH_SUCCESS, np.min)[0],
        "steps_per_second": steps_per_second(metrics),
        "reach_lowest_while_pick_place": forgetting(metrics, reach, pick_place),
    }


def measure(name: str, flags: Sequence[str], eval_seeds: Sequence[int]) -> learning.Row:
    """Train and evaluate a cell. Returns its row of ``results.csv``."""
    row = learning.measure(name, flags, eval_seeds, folder=FOLDER, runs=RUNS)
    return {"cell": name, **figures(curves.read_cells(FOLDER, [name])[name]), **row}


def number(row: Mapping[str, object], name: str) -> float:
    """A number in a row of ``results.csv``, read from the file or just measured."""
    return float(str(row[name]))


def report(rows: Sequence[dict[str, object]]) -> str:
    """A Markdown table of cells."""
    short = [name.removesuffix("-v3") for name in learning.TASK_NAMES]
    head = ["cell", *short, "mean", "frames", "mean 90 % after", "minutes", "steps/s", "reach while pick-place"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        reached, minutes = number(row, TO_MEAN), number(row, MINUTES_TO_MEAN)
        lowest = number(row, "reach_lowest_while_pick_place")
        lines.append(
            [
                str(row["cell"]),
                *(f"{number(row, f'eval/{task}/success_rate'):.3f}" for task in learning.TASK_NAMES),
                f"{number(row, 'eval/mean_success_rate'):.3f}",
                f"{number(row, 'frames') / 1e6:.1f}M",
                "never" if math.isnan(reached) else f"{reached / 1e6:.2f}M",
                "" if math.isnan(minutes) else f"{minutes:.1f}",
                f"{number(row, 'steps_per_second'):,.0f}",
                "" if math.isnan(lowest) else f"{lowest:.2f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


FINAL = re.compile(r"(?P<method>.+)-(?P<length>[^-]+M)-seed(?P<seed>\d+)")
"""Names of cells of the finalists."""

Finals = dict[str, dict[int, dict[str, object]]]
"""Rows by method and seed."""


def finals(rows: Sequence[dict[str, object]]) -> dict[str, Finals]:
    """The rows of the finalists by length."""
    by_length: dict[str, Finals] = {}
    for row in rows:
        if cell := FINAL.fullmatch(str(row["cell"])):
            by_length.setdefault(cell["length"], {}).setdefault(cell["method"], {})[int(cell["seed"])] = row
    return by_length


def report_finals(groups: Finals) -> str:
    """A Markdown table of the finalists' runs of one length: mean and range of the runs that reached a threshold."""
    short = [name.removesuffix("-v3") for name in learning.TASK_NAMES]
    head = ["method", "seeds", *short, "mean 90 % after", "all 98 % after", "minutes to 90 %", "steps/s"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    columns = [*(f"eval/{task}/success_rate" for task in learning.TASK_NAMES), TO_MEAN, TO_ALL]
    columns += [MINUTES_TO_MEAN, "steps_per_second"]
    million = 1e6, ".2f", "M"
    forms = [(1.0, ".3f", "")] * len(short) + [million, million, (1.0, ".1f", ""), (1.0, ",.0f", "")]
    for name, group in groups.items():
        line = [name, str(len(group))]
        for column, (unit, form, suffix) in zip(columns, forms, strict=True):
            known = [number(row, column) / unit for row in group.values()]
            known = [value for value in known if not math.isnan(value)]
            few = f", {len(known)} of {len(group)}" if len(known) < len(group) else ""
            span = f"({min(known):{form}} to {max(known):{form}}{few})" if known else ""
            missing = "never" if column in (TO_MEAN, TO_ALL, MINUTES_TO_MEAN) else ""
            line.append(f"{np.mean(known):{form}}{suffix} {span}" if known else missing)
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


FEWEST_PAIRS = 6
"""With five pairs, p is never below 2/32: fewer than six cannot show a difference."""


def chance(differences: np.ndarray) -> float:
    """The p-value of paired differences [N]: how likely so large a mean is if every sign is due to chance.

    Two-sided paired permutation test (Fisher, The Design of Experiments, 1935, section 21); exact up to 16 pairs.
    """
    test = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=2**16, rng=0)
    return float(test.pvalue)


def report_pairs(groups: Finals, against: str = "uniform") -> str:
    """A Markdown table that compares runs of the same length and seeds; empty if there are too few.

    A threshold that was never reached counts as reached at the end of the run, so that ratios are too close to one.
    """
    lines = []
    for name, group in groups.items():
        seeds = [] if name == against else sorted(group.keys() & groups.get(against, {}).keys())
        if len(seeds) < FEWEST_PAIRS:
            continue
        line = [f"{name} / {against}", str(len(seeds))]
        pairs = [(group[seed], groups[against][seed]) for seed in seeds]
        ends = np.array([[number(row, "frames") for row in pair] for pair in pairs])
        for column in (TO_MEAN, TO_ALL):
            times = np.array([[number(row, column) for row in pair] for pair in pairs])
            never = int(np.isnan(times).sum())
            logs = np.log(np.where(np.isnan(times), ends, times)) @ [1, -1]
            mean, lowest, highest = (f"{value:.2f}" for value in np.exp([logs.mean(), logs.min(), logs.max()]))
            line.append(f"{mean} ({lowest} to {highest}{f', {never} never' if never else ''})")
            line.append(" / ".join(str(int(side.sum())) for side in (logs < 0, logs == 0, logs > 0)))
            line.append(f"{chance(logs):.3f}")
        lines.append(line)
    if not lines:
        return ""
    sides = "faster / equal / slower"
    head = ["", "pairs", "frames to mean 90 %", sides, "p", "frames to all 98 %", sides, "p"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---", *["---:"] * (len(head) - 1)], *lines])


def study(args: Args) -> None:
    """Measure the cells that are missing, and report all."""
    wanted = {} if args.report_only else cells(args)
    FOLDER.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    results = FOLDER / "results.csv"
    rows = learning.read_results(results)
    for name, flags in wanted.items():
        before = next((row for row in rows if row["cell"] == name), None)
        command = shlex.join(["python", "-m", "mtrl_vec", "train", *flags])
        if before is not None and before["command"] != command:
            raise InputError(f"{name} in {results} has other flags ({before['command']}): remove its row to redo it")
        if before is not None:
            progress(f"{name} is in {results} already")
            continue
        rows.append(measure(name, flags, args.eval_seeds))
        learning.write_results(rows, results)
    if not rows:
        raise InputError("nothing has been measured yet: run without --report-only")
    metrics = curves.read_cells(FOLDER, [str(row["cell"]) for row in rows])
    rows = [row | figures(metrics[str(row["cell"])]) for row in rows]
    learning.write_results(rows, results)
    print(report(rows))
    if screened := [cell for cell in metrics if not FINAL.fullmatch(cell)]:
        curves.draw(FOLDER, screened, FOLDER / "screening.png")
    for length, groups in finals(rows).items():
        print(f"\n{length} frames:\n\n{report_finals(groups)}")
        if pairs := report_pairs(groups):
            print(f"\n{pairs}")
        drawn = [str(row["cell"]) for group in groups.values() for row in group.values()]
        curves.draw(FOLDER, drawn, FOLDER / f"finals-{length}.png")


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
