"""Learning curves of one or more runs as a picture: success and return per task, over frames and over wall-clock."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.config import HOW_NOT_WHAT
from mtrl_vec.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Column = NDArray[np.float64]

CLOCKS = {"frames": (1e6, "million frames"), "time/elapsed": (60.0, "minutes")}
"""The horizontal axes: a column of the metrics, its values per unit, and what the unit is called."""
MEASURES = {"success_rate": "success rate", "return": "return"}
"""The vertical ones: columns of each task, and what they are called."""
NOT_LEARNING = HOW_NOT_WHAT - {"precision", "total_frames"} | {"seed"}
"""Settings in which the runs of one group may differ."""
MAX_SETTINGS = 3
"""Settings that a label can name. A group that differs in more of them goes by its runs' names."""
MAX_POINTS = 1000
"""Points of a mean."""

# Okabe and Ito's colours without their yellow, which does not show on white. In greyscale the dashes tell lines apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (7, 1.5, 1.5, 1.5)), (0, (12, 2)), (0, (3, 1)), "-.")
MARKERS = "os^DvPX"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "svg.hashsalt": "mtrl_vec",
}


@dataclass(frozen=True)
class Run:
    """A run's numbers. ``settings`` are those that change learning; None for a metrics file by itself."""

    path: Path
    settings: dict[str, Any] | None
    metrics: dict[str, Column]

    @property
    def name(self) -> str:
        """What its folder or file is called."""
        return self.path.name if self.settings is not None else self.path.stem

    @property
    def tasks(self) -> list[str]:
        """The tasks that the metrics tell of."""
        found = [re.fullmatch(r"train/(.+)/success_rate", column) for column in self.metrics]
        return [match[1] for match in found if match and f"train/{match[1]}/return" in self.metrics]

    def curve(self, clock: str, column: str) -> tuple[Column, Column] | None:
        """A column over a clock where it has numbers; None where it has none at all."""
        if column not in self.metrics:
            return None
        x, y = self.metrics[clock], self.metrics[column]
        known = np.isfinite(x) & np.isfinite(y)
        return (x[known], y[known]) if known.any() else None


def read_metrics(path: Path) -> dict[str, Column]:
    """The columns [rows] of a ``metrics.csv`` by name. A last line that is still being written is left out.

    Raises:
        InputError: it cannot be read, is not a metrics file, has no rows yet, or is damaged.
    """
    try:
        lines = path.read_text(errors="replace").split("\n")[:-1]  # what follows the last line break is not a whole row
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give the folder of a run, or its metrics") from error
    header, *rows = csv.reader(lines) if lines else [[]]
    if missing := [clock for clock in CLOCKS if lines and clock not in header]:
        raise InputError(f"{path} is not a metrics file, it has no column {missing[0]}: give the metrics.csv of a run")
    if not rows:
        raise InputError(f"{path} has no rows yet: wait for the first iteration of the run")
    values = np.empty((len(rows), len(header)))
    for i, row in enumerate(rows):
        try:
            values[i] = np.array(row, dtype=np.float64).reshape(len(header))
        except ValueError as error:  # not a number, or not one for each column
            raise InputError(f"line {i + 2} of {path} is not {len(header)} numbers: remove the line") from error
    return dict(zip(header, values.T, strict=True))


def load_run(path: Path) -> Run:
    """The run in a folder, or in a metrics file by itself.

    Raises:
        InputError: there is none, or it cannot be read (see `read_metrics`).
    """
    if not path.exists():
        raise InputError(f"no run at {path}: give the folder of a run, or a metrics file")
    settings, file = None, path
    if path.is_dir():
        file = path / "metrics.csv"
        if not file.exists():
            raise InputError(f"no metrics.csv in {path}: give the folder of a run that has begun, or a metrics file")
        try:
            config = json.loads((path / "config.json").read_text())
            settings = {name: value for name, value in config.items() if name not in NOT_LEARNING}
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"no readable config.json in {path}: give {file} instead, to plot it by itself") from error
    run = Run(path.resolve(), settings, read_metrics(file))
    if not run.tasks:
        raise InputError(f"{file} is not a metrics file, it has no train/<task>/success_rate and return: give another")
    return run


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but `NOT_LEARNING`, or metrics files ``<name>-seed<N>.csv`` of a folder, by label.

    A label names the settings that most groups do not share; where there are none, those that any does not. If these
    are none either, or more than `MAX_SETTINGS`, it is what the runs are called.
    """
    groups: list[list[Run]] = []
    for run in runs:
        mates = next((group for group in groups if _differ_in_seed(run, group[0])), None)
        if mates is None:
            groups.append([run])
        else:
            mates.append(run)
    configs = [group[0].settings for group in groups if group[0].settings is not None]
    labels = []
    for group in groups:
        settings = {} if group[0].settings is None else _differences(group[0].settings, configs)
        named = 0 < len(settings) <= MAX_SETTINGS
        pairs = [f"{name}={' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in settings.items()]
        labels.append(", ".join(pairs) if named else _from_to([run.name for run in group]))
    return {
        label if labels.count(label) == 1 else _from_to([str(run.path) for run in group]): group
        for label, group in zip(labels, groups, strict=True)
    }


def _differ_in_seed(a: Run, b: Run) -> bool:
    if a.settings is not None or b.settings is not None:
        return a.settings == b.settings
    kinds = [re.fullmatch(r"(.*?-?)seed\d+", run.name) for run in (a, b)]
    return a.path.parent == b.path.parent and None not in kinds and len({kind[1] for kind in kinds if kind}) == 1


def _differences(settings: dict[str, Any], configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that most configs do not share; where there are none, those that any does not."""
    own = {name: settings.get(name, "unknown") for config in configs for name in config}  # versions have different ones
    shared = {name: sum(config.get(name, "unknown") == own[name] for config in configs) for name in own}
    rare = {name: value for name, value in own.items() if 2 * shared[name] <= len(configs)}
    return rare or {name: value for name, value in own.items() if shared[name] < len(configs)}


def _from_to(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def mean_and_range(curves: Sequence[tuple[Column, Column]]) -> tuple[Column, Column, Column, Column]:
    """Of several curves (x, y): where they all have points, all of their x, and there mean, lowest and highest y."""
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(start <= grid) & (grid <= end)]
    grid = grid[np.linspace(0, max(len(grid) - 1, 0), min(len(grid), MAX_POINTS)).astype(int)]
    values = np.array([np.interp(grid, x, y) for x, y in curves])
    return grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def draw_runs(runs: Sequence[Run]) -> Figure:
    """The figure that `plot_runs` writes."""
    from matplotlib.figure import Figure

    groups = group_runs(runs)
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    # Several tasks of several groups in one place would be a tangle: each task has a column of its own then.
    split = len(groups) > 1 and len(tasks) > 1
    figure = Figure(figsize=(max(7.0, 3.5 * len(tasks)), 12.0) if split else (10.5, 7.0), layout="constrained")
    shape = (4, len(tasks)) if split else (2, 2)
    axes = figure.subplots(*shape, sharex="row" if split else "col", squeeze=False)
    for (c, clock), (m, measure), (t, task) in product(enumerate(CLOCKS), enumerate(MEASURES), enumerate(tasks)):
        row, column = (2 * c + m, t) if split else (m, c)
        axis = axes[row, column]
        for g, group in enumerate(groups.values()):
            _draw_curves(axis, group, clock, f"{task}/{measure}", g if len(groups) > 1 else t)
        axis.set_xlabel(CLOCKS[clock][1] if split or row else "")
        axis.set_ylabel("" if column else MEASURES[measure])
        axis.set_title(task if split and row == 0 else "", parse_math=False)
        axis.set_xlim(left=0)
        if measure == "success_rate":
            axis.set_ylim(-0.04, 1.04)
        axis.grid(alpha=0.3)

    captions = [
        label if len(group) == 1 else f"{label}: mean and range of {len(group)} runs" for label, group in groups.items()
    ]
    names, title = (tasks, captions[0]) if len(groups) == 1 else (captions, "" if split else tasks[0])
    evaluated = any(run.curve("frames", f"eval/{task}/success_rate") for run in runs for task in tasks)
    _add_legend(figure, names, title, evaluated)
    return figure


def _add_legend(figure: Figure, names: list[str], title: str, evaluated: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_line(look)) for look in range(len(names))]
    if evaluated:
        handles.append(Line2D([], [], **_marker(0) | {"color": "0.3"}))
        names = [*names, "evaluation, without exploration noise"]
    room, extra = round(10 * figure.get_figwidth()), 8  # in letters: of the figure, and what goes with a name
    names = [textwrap.fill(name, room - extra) for name in names]
    widths = [len(name) + extra for name in names]
    columns = len(names) if sum(widths) <= room else max(1, room // max(widths))
    legend = figure.legend(
        handles, names, title=textwrap.fill(title, room), loc="outside upper center", ncols=columns, frameon=False
    )
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)  # there may be dollar signs in the name of a folder


def _draw_curves(axis: Axes, group: Sequence[Run], clock: str, column: str, look: int) -> None:
    unit = CLOCKS[clock][0]
    curves = [curve for run in group if (curve := run.curve(clock, f"train/{column}"))]
    if len(curves) == 1:
        x, y = curves[0]
        axis.plot(x / unit, y, **_line(look), marker="." if len(x) == 1 else "")
    elif curves:
        x, y, low, high = mean_and_range(curves)
        axis.fill_between(x / unit, low, high, color=COLORS[look % len(COLORS)], alpha=0.2, linewidth=0)
        axis.plot(x / unit, y, **_line(look))
    for run in group:
        if evaluations := run.curve(clock, f"eval/{column}"):
            axis.plot(evaluations[0] / unit, evaluations[1], **_marker(look))


def _line(look: int) -> dict[str, Any]:
    dashes = DASHES[(look + look // len(COLORS)) % len(DASHES)]
    return {"color": COLORS[look % len(COLORS)], "linestyle": dashes, "linewidth": 2}


def _marker(look: int) -> dict[str, Any]:
    marker = {"marker": MARKERS[look % len(MARKERS)], "markersize": 4.5, "markerfacecolor": "white", "alpha": 0.8}
    return {"color": COLORS[look % len(COLORS)], "linestyle": "", **marker}


def plot_runs(folders: Sequence[Path], out: Path) -> list[Path]:
    """Draw success and return per task over frames and over wall-clock; write ``<out>.png`` and ``<out>.svg``.

    Runs with the same settings but another seed are a group (see `group_runs`). Its line is their mean and its band the
    range from the lowest to the highest, interpolated between the points of each, up to the end of the shortest. A
    group of one has its own line as it is. Markers are evaluations while training.

    Args:
        folders: of runs, finished or not; or metrics files by themselves.
        out: the pictures' path without ``.png`` and ``.svg`` (which are ignored here), in an existing folder.

    Returns:
        The two files. Each is replaced as a whole, if at all.

    Raises:
        InputError: a run that is not there or cannot be read, no way to write to ``out``, or no matplotlib.
    """
    try:
        import matplotlib.style
    except ImportError as error:
        raise InputError("plot needs matplotlib: pip install 'mtrl_vec[pictures]'") from error
    if not folders:
        raise InputError("no runs to plot: give the folder of at least one")
    out = out.with_suffix("") if out.suffix in (".png", ".svg") else out
    if not out.name or not out.parent.is_dir():
        raise InputError(f"cannot write {out}.png: give a name in an existing folder")
    runs = [load_run(path) for path in {path.resolve(): path for path in folders}.values()]
    pictures = {kind: io.BytesIO() for kind in ("png", "svg")}
    with matplotlib.style.context(STYLE, after_reset=True):  # whatever the user's own matplotlibrc says
        figure = draw_runs(runs)
        for kind, picture in pictures.items():
            figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    files = [out.with_name(f"{out.name}.{kind}") for kind in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        _write(file, picture.getvalue())
    return files


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError as error:
        raise InputError(f"cannot write {file} ({error.strerror}): choose another name or folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
