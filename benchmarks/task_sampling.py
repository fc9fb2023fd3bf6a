"""Which schedule of practice to use: every one of them screened on one seed, then the best ones on several.

Cells are as those of ``learning.py``: finished ones are skipped, and interrupted ones go on. Everything lands in
``benchmarks/results/schedules/``: the metrics of each run, ``results.csv``, and pictures.
"""

from __future__ import annotations

import csv
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import learning
import numpy as np
import tyro
from common import progress
from scipy.stats import permutation_test

from mtrl_vec.cli import parse_train
from mtrl_vec.errors import InputError
from mtrl_vec.plotting import plot_runs, read_metrics

FOLDER = Path(__file__).parent / "results" / "schedules"
RUNS = Path("runs") / "schedules"
MEAN_SUCCESS, EACH_SUCCESS = 0.9, 0.98
TO_MEAN, TO_ALL = f"frames_to_mean_{MEAN_SUCCESS}", f"frames_to_all_{EACH_SUCCESS}"
MINUTES_TO_MEAN = f"minutes_to_mean_{MEAN_SUCCESS}"

SCHEDULES = {
    "uniform": "",
    "random": "--schedule random",
    "curriculum": "--schedule curriculum",
    "curriculum-no-floor": "--schedule curriculum --share-floor 0",
    "difficulty": "--schedule difficulty",
    "difficulty-loss": "--schedule difficulty --difficulty-by loss",
    "progress": "--schedule progress",
    "meta": "--schedule meta",
    "pcgrad": "--balance pcgrad",
    "cagrad": "--balance cagrad",
    "popart": "--popart",
    "popart-only": "--popart --no-normalize-reward",
}
"""What is screened, with its flags."""


@dataclass(frozen=True)
class Args:
    """Screen all schedules at --screen-frames with one seed; then --finalists with --final-seeds at --final-frames.

    Example: python benchmarks/schedules.py --finalists uniform progress meta
    """

    screen_frames: int = 2_000_000
    """Of a screening run."""
    final_frames: int = 5_000_000
    """Of a run of the finalists: each length has tables of its own."""
    final_seeds: tuple[int, ...] = (1, 2, 3)
    """Training seeds of the finalists."""
    only: tuple[str, ...] = tuple(SCHEDULES)
    """What to screen."""
    finalists: tuple[str, ...] = ()
    """What to run on several seeds."""
    eval_seeds: tuple[int, ...] = (100, 200, 300)
    """Seeds of the official evaluation, 50 goals a task each."""
    report_only: bool = False
    """Measure nothing: print the tables and draw the pictures of what there is."""


def cells(args: Args) -> dict[str, list[str]]:
    """The training flags of every cell, by its name."""
    for name in (*args.only, *args.finalists):
        if name not in SCHEDULES:
            raise InputError(f"unknown schedule {name!r}: known are {', '.join(SCHEDULES)}")
    if args.finalists and not args.final_seeds:
        raise InputError("final_seeds is empty: name at least one, for example --final-seeds 1 2 3")
    frames = "--total-frames"
    study = {name: [*SCHEDULES[name].split(), "--seed", "1", frames, str(args.screen_frames)] for name in args.only}
    length = f"{args.final_frames / 1e6:.6f}".rstrip("0").rstrip(".") + "M"
    for seed in args.final_seeds:
        for name in args.finalists:
            flags = [*SCHEDULES[name].split(), "--seed", str(seed), frames, str(args.final_frames)]
            study[f"{name}-{length}-seed{seed}"] = flags
    for flags in study.values():
        parse_train(flags)  # before any of them runs
    return study


def first_success(
    metrics: dict[str, np.ndarray], threshold: float, of: Callable[..., np.ndarray] = np.mean
) -> tuple[float, float]:
    """Frames and minutes until the tasks' success rate in training first reached a threshold, or NaN.

    That is their mean, or of all at once with ``of=np.min``. Only where all have been practised for ten iterations:
    until then the rate of one may be that of long ago.
    """
    rates = of([metrics[f"train/{task}/success_rate"] for task in learning.TASK_NAMES], axis=0)
    share = np.min([metrics[f"train/{task}/share"] for task in learning.TASK_NAMES], axis=0)
    practised = np.array([share[max(0, i - 9) : i + 1].min() > 0 for i in range(len(share))])
    return learning.first_reached(metrics, practised & (rates >= threshold))


def steps_per_second(metrics: dict[str, np.ndarray]) -> float:
    """Of the median iteration, learning included."""
    return round(float(np.median(metrics["time/sps"])), 1)


def forgetting(metrics: dict[str, np.ndarray], task: str, practised: str) -> float:
    """The lowest success rate of a task that was once at 90 %, while another had most of the frames; NaN if never.

    In training, as long as it is practised at all, and in evaluations while training.
    """
    success, share = metrics[f"train/{task}/success_rate"], metrics[f"train/{practised}/share"]
    learned = np.flatnonzero(success >= MEAN_SUCCESS)
    if not len(learned):
        return math.nan
    later = (np.arange(len(success)) > learned[0]) & (share > 0.5)
    seen = success[later & (metrics[f"train/{task}/share"] > 0)], metrics[f"eval/{task}/success_rate"][later]
    known = [value for value in np.concatenate(seen) if not math.isnan(value)]
    return round(float(min(known)), 4) if known else math.nan


def figures(metrics: dict[str, np.ndarray]) -> learning.Row:
    """What ``results.csv`` has of a cell besides `learning.measure`."""
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
    """Train and evaluate one cell. Returns its row of ``results.csv``."""
    row = learning.measure(name, flags, eval_seeds, folder=FOLDER, runs=RUNS)
    return {"cell": name, **figures(read_metrics(FOLDER / f"{name}.csv")), **row}


def number(row: Mapping[str, object], name: str) -> float:
    """Of a row of ``results.csv``, as it is in the file or just measured."""
    return float(str(row[name]))


def report(rows: Sequence[dict[str, object]]) -> str:
    """A table of cells in Markdown."""
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


FINAL = re.compile(r"(?P<schedule>.+)-(?P<length>[^-]+M)-seed(?P<seed>\d+)")
"""Names of cells that are run on several seeds."""

Finals = dict[str, dict[int, dict[str, object]]]


def finals(rows: Sequence[dict[str, object]]) -> dict[str, Finals]:
    """What was run on several seeds: by its length, then by schedule, then by seed."""
    by_length: dict[str, Finals] = {}
    for row in rows:
        if cell := FINAL.fullmatch(str(row["cell"])):
            by_length.setdefault(cell["length"], {}).setdefault(cell["schedule"], {})[int(cell["seed"])] = row
    return by_length


def report_finals(groups: Finals) -> str:
    """A table in Markdown of runs of one length: means, and from the lowest to the highest, of those that got there."""
    short = [name.removesuffix("-v3") for name in learning.TASK_NAMES]
    head = ["schedule", "seeds", *short, "mean 90 % after", "all 98 % after", "minutes to 90 %", "steps/s"]
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
            line.append(f"{np.mean(known):{form}}{suffix} {span}" if known else "never")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


FEWEST_PAIRS = 6
"""All of five pairs being on one side has a probability of 2/32, so that fewer than six tell nothing from chance."""


def chance(differences: np.ndarray) -> float:
    """How probable a mean as far from zero is, or farther, if each difference [N] was as likely to have the other sign.

    The permutation test of pairs (Fisher, The Design of Experiments, 1935, section 21), two-sided; exact up to 16.
    """
    test = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=2**16, rng=0)
    return float(test.pvalue)


def report_pairs(groups: Finals, against: str = "uniform") -> str:
    """A table in Markdown that compares runs of the same length and seeds; empty if there are too few.

    A time that was never reached counts as all of the run, which makes for ratios that are too near to one.
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
    sides = "sooner / level / later"
    head = ["", "pairs", "frames to mean 90 %", sides, "p", "frames to all 98 %", sides, "p"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---", *["---:"] * (len(head) - 1)], *lines])


def study(args: Args) -> None:
    """Measure what is missing, write it down, and report."""
    wanted = {} if args.report_only else cells(args)
    FOLDER.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    results = FOLDER / "results.csv"
    rows: list[dict[str, object]] = []
    if results.exists():
        with results.open() as file:
            rows = list(csv.DictReader(file))
    for name, flags in wanted.items():
        before = next((row for row in rows if row["cell"] == name), None)
        command = shlex.join(["python", "-m", "mtrl_vec", "train", *flags])
        if before is not None and before["command"] != command:
            raise InputError(f"{name} in {results} is of other flags ({before['command']}): remove its row to redo it")
        if before is not None:
            progress(f"{name} is in {results} already")
            continue
        rows.append(measure(name, flags, args.eval_seeds))
        learning.write_results(rows, results)
    if not rows:
        raise InputError("nothing has been measured yet: run without --report-only")
    rows = [row | figures(read_metrics(FOLDER / f"{row['cell']}.csv")) for row in rows]
    learning.write_results(rows, results)
    print(report(rows))
    if screened := [row for row in rows if not FINAL.fullmatch(str(row["cell"]))]:
        plot_runs([FOLDER / f"{row['cell']}.csv" for row in screened], FOLDER / "screening")
    for length, groups in finals(rows).items():
        print(f"\n{length} frames:\n\n{report_finals(groups)}")
        if pairs := report_pairs(groups):
            print(f"\n{pairs}")
        runs = [FOLDER / f"{row['cell']}.csv" for group in groups.values() for row in group.values()]
        plot_runs(runs, FOLDER / f"finals-{length}")


def main() -> int:
    args = tyro.cli(Args)
    return learning.run_study(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
