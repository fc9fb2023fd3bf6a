"""The command ``plot``: learning curves over frames and over wall-clock, as a picture.

Few tasks have their success and return in full; many have an overview, and small panels of success.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrl_vec.commands.arguments import PlotCommand
from mtrl_vec.commands.curves import CLOCKS, SOLVED, Curve, Run, group_runs, load_run, mean_and_range
from mtrl_vec.commands.output import say_written
from mtrl_vec.errors import InputError
from mtrl_vec.files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MEASURES = {"success_rate": "success rate", "return": "return"}
"""The vertical axes: columns of each task, and what they are called."""

# Okabe and Ito's colours without their yellow, which does not show on white. In greyscale the dashes tell lines apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (7, 1.5, 1.5, 1.5)), (0, (12, 2)), (0, (3, 1)), "-.")
MARKERS = "os^DvPX"
MAX_TASKS = 6
"""Tasks that have success and return over both clocks. More have an overview, and a small panel each."""
COLUMNS = 5
"""Small panels side by side."""
OVERVIEW, PANEL, MAX_PANELS = 5.0, 1.8, 14.0
"""Heights in inches: of the overview, of a row of small panels, and of all rows, which are lower if there are many."""
OVERVIEWS: dict[str, Callable[[Run, str, str], Curve | None]] = {
    "mean success rate": Run.mean_success,
    f"tasks at ≥ {SOLVED:.0%}": Run.solved_tasks,
}
"""What the overview shows over each clock: given a run, a clock and ``train`` or ``eval``."""
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "svg.hashsalt": "mtrl_vec",
}


def plot(command: PlotCommand) -> None:
    """Draw learning curves. Raises InputError."""
    if not command.runs:
        raise InputError("no run given: name the folders of one or more runs, for example runs/my-run")
    say_written(plot_runs(command.runs, command.out), command.quiet)


def draw_runs(runs: Sequence[Run]) -> Figure:
    """The figure that `plot_runs` writes."""
    groups = group_runs(runs)
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    captions = [
        label if len(group) == 1 else f"{label}: mean and range of {len(group)} runs" for label, group in groups.items()
    ]
    many = len(tasks) > MAX_TASKS
    figure = (_many_tasks if many else _few_tasks)(list(groups.values()), tasks)
    if len(groups) == 1 and not many:
        names, title = tasks, captions[0]
    else:
        names, title = captions, tasks[0] if len(tasks) == 1 else ""
    evaluated = any(run.curve("frames", f"eval/{task}/success_rate") for run in runs for task in tasks)
    _add_legend(figure, names, title, evaluated)
    return figure


def _few_tasks(groups: Sequence[Sequence[Run]], tasks: Sequence[str]) -> Figure:
    """Success and return of each task over each clock."""
    from matplotlib.figure import Figure

    # Several tasks of several groups in one place would be a tangle: each task has a column of its own then.
    split = len(groups) > 1 and len(tasks) > 1
    figure = Figure(figsize=(max(7.0, 3.5 * len(tasks)), 12.0) if split else (10.5, 7.0), layout="constrained")
    shape = (4, len(tasks)) if split else (2, 2)
    axes = figure.subplots(*shape, sharex="row" if split else "col", squeeze=False)
    for (c, clock), (m, measure), (t, task) in product(enumerate(CLOCKS), enumerate(MEASURES), enumerate(tasks)):
        row, column = (2 * c + m, t) if split else (m, c)
        axis = axes[row, column]
        for g, group in enumerate(groups):
            _draw_column(axis, group, clock, f"{task}/{measure}", g if len(groups) > 1 else t)
        axis.set_xlabel(CLOCKS[clock][1] if split or row else "")
        axis.set_ylabel("" if column else MEASURES[measure])
        axis.set_title(task if split and row == 0 else "", parse_math=False)
        axis.set_xlim(left=0)
        if measure == "success_rate":
            axis.set_ylim(-0.04, 1.04)
        axis.grid(alpha=0.3)
    return figure


def _many_tasks(groups: Sequence[Sequence[Run]], tasks: Sequence[str]) -> Figure:
    """An overview of all tasks over each clock, and a small panel with the success of each over frames."""
    from matplotlib.figure import Figure

    rows = -(-len(tasks) // COLUMNS)
    height = min(PANEL * rows, MAX_PANELS)
    figure = Figure(figsize=(12.0, OVERVIEW + height), layout="constrained")
    parts = figure.add_gridspec(2, 1, height_ratios=(OVERVIEW, height))
    axes = parts[0].subgridspec(len(OVERVIEWS), len(CLOCKS)).subplots(sharex="col", sharey="row", squeeze=False)
    _draw_overview(axes, groups)
    panels = parts[1].subgridspec(rows, COLUMNS).subplots(sharex=True, sharey=True, squeeze=False).ravel()
    for t, (axis, task) in enumerate(zip(panels, tasks, strict=False)):
        for g, group in enumerate(groups):
            _draw_column(axis, group, "frames", f"{task}/success_rate", g, small=True)
        axis.set_title(task, parse_math=False, fontsize=9, pad=3)
        axis.set_ylabel("" if t % COLUMNS else MEASURES["success_rate"], fontsize=8)
        lowest = t + COLUMNS >= len(tasks)  # of its column
        axis.set_xlabel(CLOCKS["frames"][1] if lowest else "", fontsize=8)
        axis.tick_params(labelsize=8, labelbottom=lowest)
        axis.grid(alpha=0.3, linewidth=0.5)
    panels[0].set(xlim=(0, None), ylim=(-0.08, 1.08), yticks=(0, 0.5, 1))  # of all: they share their axes
    for unused in panels[len(tasks) :]:
        unused.remove()
    return figure


def _draw_overview(axes: NDArray[np.object_], groups: Sequence[Sequence[Run]]) -> None:
    """Each of `OVERVIEWS` in a row of axes, over each clock in a column."""
    for (m, (name, measure)), (c, clock) in product(enumerate(OVERVIEWS.items()), enumerate(CLOCKS)):
        axis = axes[m, c]
        for look, group in enumerate(groups):
            curves, evaluations = ([measure(run, clock, stage) for run in group] for stage in ("train", "eval"))
            _draw_curves(axis, CLOCKS[clock][0], curves, evaluations, look)
        axis.set_xlabel(CLOCKS[clock][1] if m else "")
        axis.set_ylabel("" if c else name)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    most = max(len(run.tasks) for group in groups for run in group)
    axes[0, 0].set_ylim(-0.04, 1.04)
    axes[1, 0].set(ylim=(-0.04 * most, 1.04 * most), yticks=(0, most // 2, most))


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


def _draw_column(axis: Axes, group: Sequence[Run], clock: str, column: str, look: int, small: bool = False) -> None:
    curves, evaluations = ([run.curve(clock, f"{stage}/{column}") for run in group] for stage in ("train", "eval"))
    _draw_curves(axis, CLOCKS[clock][0], curves, evaluations, look, small)


def _draw_curves(
    axis: Axes,
    unit: float,
    curves: Sequence[Curve | None],
    evaluations: Sequence[Curve | None],
    look: int,
    small: bool = False,
) -> None:
    """One curve as it is, or the mean and range of several, and a marker per evaluation."""
    line, marker = _line(look), _marker(look)
    if small:
        line["linewidth"], marker["markersize"] = 1.2, 2.5
    known = [curve for curve in curves if curve]
    if len(known) == 1:
        x, y = known[0]
        axis.plot(x / unit, y, **line, marker="." if len(x) == 1 else "")
    elif known:
        x, y, low, high = mean_and_range(known)
        axis.fill_between(x / unit, low, high, color=line["color"], alpha=0.2, linewidth=0)
        axis.plot(x / unit, y, **line)
    for x, y in filter(None, evaluations):
        axis.plot(x / unit, y, **marker)


def _line(look: int) -> dict[str, Any]:
    dashes = DASHES[(look + look // len(COLORS)) % len(DASHES)]
    return {"color": COLORS[look % len(COLORS)], "linestyle": dashes, "linewidth": 2}


def _marker(look: int) -> dict[str, Any]:
    marker = {"marker": MARKERS[look % len(MARKERS)], "markersize": 4.5, "markerfacecolor": "white", "alpha": 0.8}
    return {"color": COLORS[look % len(COLORS)], "linestyle": "", **marker}


def plot_runs(folders: Sequence[Path], out: Path) -> list[Path]:
    """Draw success and return per task over frames and over wall-clock; write ``<out>.png`` and ``<out>.svg``.

    Of more than `MAX_TASKS` tasks: mean success and the number of solved tasks over frames and over wall-clock, and the
    success of each task over frames.

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
            figure.set_layout_engine("none")  # once is enough: the layout of fifty panels takes seconds
    files = [out.with_name(f"{out.name}.{kind}") for kind in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        try:
            write_atomically(file, picture.getvalue())
        except OSError as error:
            raise InputError(f"cannot write {file} ({error.strerror}): choose another name or folder") from error
    return files
