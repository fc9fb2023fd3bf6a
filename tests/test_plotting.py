"""Learning curves: the numbers that are drawn, which runs belong together, what they are called, and the files."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import struct
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from matplotlib.image import imread

from mtrl_vec.commands import curves
from mtrl_vec.commands.curves import group_runs, load_run, read_metrics
from mtrl_vec.commands.plot import STYLE, draw_runs, plot_runs
from mtrl_vec.config import TrainConfig
from mtrl_vec.config.sampling import DifficultyConfig
from mtrl_vec.errors import InputError

NAN = math.nan
FRAMES = (1_000_000, 2_000_000, 3_000_000)
FRAMES_SUCCESS, SECONDS_SUCCESS, FRAMES_RETURN, SECONDS_RETURN = range(4)
"""The axes of a figure with one group or one task."""


def write_metrics(path: Path, success: list[float], frames=FRAMES, tasks=("push-v3",), evaluations=None) -> Path:
    """A row of metrics per success rate, a minute a million frames; returns are 100 times the success."""
    names = [f"train/{task}/{name}" for task in tasks for name in ("success_rate", "return")]
    lines = [",".join(["frames", "time/elapsed", *names, "eval/push-v3/success_rate"])]
    for i, (f, s) in enumerate(zip(frames, success, strict=True)):
        values = [f, 60 * f / 1e6, *[s, 100 * s] * len(tasks), evaluations[i] if evaluations else NAN]
        lines.append(",".join(map(str, values)))
    path.write_text("".join(f"{line}\r\n" for line in lines), newline="")  # the line breaks of Python's csv
    return path


def write_run(folder: Path, success=(0.1, 0.2, 0.3), tasks=("push-v3",), frames=FRAMES, **config: object) -> Path:
    folder.mkdir()
    write_metrics(folder / "metrics.csv", list(success), frames, tasks)
    settings = TrainConfig.of(tasks=tasks, run_dir=folder, **config)
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    return folder


def figure_of(*paths: Path):
    with warnings.catch_warnings(action="error"):
        figure = draw_runs([load_run(path) for path in paths])
        figure.draw_without_rendering()
    return figure


def points(line) -> list[tuple[float, float]]:
    return [(round(float(x), 9), round(float(y), 9)) for x, y in zip(*line.get_data(), strict=True)]


def labels_of(*paths: Path) -> list[str]:
    return list(group_runs([load_run(path) for path in paths]))


def test_a_single_run_is_drawn_as_it_is(tmp_path) -> None:
    axes = figure_of(write_run(tmp_path / "run", [0.25, 1.0, 0.5])).axes
    assert len(axes) == 4 and all(len(axis.lines) == 1 and not axis.collections for axis in axes)
    assert points(axes[FRAMES_SUCCESS].lines[0]) == [(1, 0.25), (2, 1), (3, 0.5)]
    assert points(axes[SECONDS_SUCCESS].lines[0]) == [(1, 0.25), (2, 1), (3, 0.5)]
    assert points(axes[FRAMES_RETURN].lines[0]) == [(1, 25), (2, 100), (3, 50)]
    assert [axis.get_xlabel() for axis in axes] == ["", "", "million frames", "minutes"]
    assert axes[FRAMES_SUCCESS].get_ylim() == (-0.04, 1.04) and all(axis.get_xlim()[0] == 0 for axis in axes)
    assert [axes[i].get_ylabel() for i in (FRAMES_SUCCESS, FRAMES_RETURN)] == ["success rate", "return"]


def test_a_group_is_its_mean_and_range_up_to_its_shortest_run(tmp_path) -> None:
    """Worked out by hand: points at 1, 2, 3 (and 4) million frames for one run, at 2 and 3 for the other."""
    long = write_run(tmp_path / "a", [0.0, 0.2, 0.4, 0.9], frames=(*FRAMES, 4_000_000), seed=1)
    short = write_run(tmp_path / "b", [1.0, 0.6], frames=(1_500_000, 3_000_000), seed=2)
    axis = figure_of(long, short).axes[FRAMES_SUCCESS]
    # At 1.5: 0.1 and 1.0. At 2: 0.2 and 1 - 0.4 / 3. At 3: 0.4 and 0.6. Before 1.5 and after 3 there is but one.
    at_2 = 1 - 0.4 / 3
    expected = [(1.5, 0.55), (2, (0.2 + at_2) / 2), (3, 0.5)]
    np.testing.assert_allclose(points(axis.lines[0]), expected, atol=1e-8)
    (band,) = axis.collections
    corners = {(round(float(x), 6), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(1.5, 0.1), (1.5, 1.0), (2, 0.2), (2, round(at_2, 6)), (3, 0.4), (3, 0.6)}
    assert band.get_facecolor()[0][3] < 0.5 < axis.lines[0].get_linewidth()


def test_lowest_and_highest_are_of_all_runs_and_the_mean_is_not_the_median(tmp_path) -> None:
    runs = [write_run(tmp_path / f"s{i}", [s] * 3, seed=i) for i, s in enumerate([0.0, 0.1, 0.8])]
    axis = figure_of(*runs).axes[FRAMES_RETURN]
    assert points(axis.lines[0]) == [(1, 30), (2, 30), (3, 30)]
    assert {round(float(y), 6) for _, y in axis.collections[0].get_paths()[0].vertices} == {0, 80}


def test_long_runs_are_thinned_to_points_they_have(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(curves, "MAX_POINTS", 2)
    runs = [write_run(tmp_path / f"s{i}", [0.1 * i, 0.3, 0.5], seed=i) for i in range(2)]
    assert points(figure_of(*runs).axes[FRAMES_SUCCESS].lines[0]) == [(1, 0.05), (3, 0.5)]


def test_rows_before_the_first_episode_are_skipped_in_silence(tmp_path) -> None:
    late = write_run(tmp_path / "a", [NAN, 0.5, 0.7], seed=1)
    assert points(figure_of(late).axes[FRAMES_SUCCESS].lines[0]) == [(2, 0.5), (3, 0.7)]
    early = write_run(tmp_path / "b", [0.1, 0.3, 0.3], seed=2)
    none = write_run(tmp_path / "c", [NAN, NAN, NAN], seed=3)
    axis = figure_of(late, early, none).axes[FRAMES_SUCCESS]
    assert points(axis.lines[0]) == [(2, 0.4), (3, 0.5)]
    assert not figure_of(none).axes[FRAMES_SUCCESS].lines


def test_a_single_point_shows_and_runs_that_never_overlap_do_no_harm(tmp_path) -> None:
    first = write_run(tmp_path / "a", [0.5], frames=(1_000_000,), seed=1)
    later = write_run(tmp_path / "b", [0.5], frames=(2_000_000,), seed=2)
    assert figure_of(first).axes[FRAMES_SUCCESS].lines[0].get_marker() == "."
    assert points(figure_of(first, later).axes[FRAMES_SUCCESS].lines[0]) == []


def test_evaluations_are_markers_without_a_line(tmp_path) -> None:
    path = write_metrics(tmp_path / "x.csv", [0.1, 0.2, 0.3], evaluations=[NAN, 0.75, NAN])
    figure = figure_of(path)
    curve, markers = figure.axes[FRAMES_SUCCESS].lines
    assert points(markers) == [(2, 0.75)] and markers.get_linestyle() == "None" and markers.get_marker() == "o"
    assert curve.get_color() == markers.get_color()
    assert len(figure.axes[FRAMES_RETURN].lines) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "push-v3",
        "evaluation, without exploration noise",
    ]


def test_one_group_shows_its_tasks_in_the_same_axes_by_colour_and_dashes(tmp_path) -> None:
    tasks = ("reach-v3", "push-v3", "pick-place-v3")
    figure = figure_of(write_run(tmp_path / "run", tasks=tasks))
    assert len(figure.axes) == 4
    lines = figure.axes[FRAMES_SUCCESS].lines
    handles = figure.legends[0].get_lines()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(tasks)
    assert figure.legends[0].get_title().get_text() == "run"
    for what in ("get_color", "get_linestyle"):
        looks = [str(getattr(line, what)()) for line in lines]
        assert looks == [str(getattr(handle, what)()) for handle in handles]
    assert len({line.get_color() for line in lines}) == 3
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 3


def test_several_groups_have_a_column_per_task_which_some_may_lack(tmp_path) -> None:
    both = write_run(tmp_path / "both", [0.1] * 3, tasks=("reach-v3", "push-v3"))
    push = [write_run(tmp_path / f"push{i}", [0.4 * i] * 3, tasks=("push-v3",), seed=i) for i in (1, 2)]
    figure = figure_of(both, *push)
    assert len(figure.axes) == 8  # success and return over frames, then over minutes; reach left, push right
    assert [axis.get_title() for axis in figure.axes[:2]] == ["reach-v3", "push-v3"]
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["success rate", "return"] * 2
    assert [axis.get_xlabel() for axis in figure.axes[::2]] == ["million frames"] * 2 + ["minutes"] * 2
    assert [len(axis.lines) for axis in figure.axes] == [1, 2] * 4
    assert points(figure.axes[0].lines[0])[0] == (1, 0.1)
    assert [points(line)[0] for line in figure.axes[1].lines] == [(1, 0.1), (1, 0.6)]
    assert [points(line)[0] for line in figure.axes[7].lines] == [(1, 10), (1, 60)]
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "tasks=reach-v3 push-v3",
        "tasks=push-v3: mean and range of 2 runs",
    ]
    assert [handle.get_color() for handle in legend.get_lines()] == [line.get_color() for line in figure.axes[1].lines]


MEAN_FRAMES, MEAN_MINUTES, SOLVED_FRAMES, SOLVED_MINUTES = range(4)
"""The axes of the overview of many tasks; the panels of the tasks follow."""


def write_many(path: Path, rates: dict[str, list[float]], evaluations: dict[str, list[float]] | None = None) -> Path:
    """Rows of metrics at `FRAMES`, 30 seconds a million frames, with a list of success rates per task."""
    columns: dict[str, list[float]] = {"frames": list(FRAMES), "time/elapsed": [30 * f / 1e6 for f in FRAMES]}
    for task, values in rates.items():
        columns |= {f"train/{task}/success_rate": values, f"train/{task}/return": [100 * v for v in values]}
    columns |= {f"eval/{task}/success_rate": values for task, values in (evaluations or {}).items()}
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


def many_rates(count: int, seed: int) -> dict[str, list[float]]:
    """Success rates of tasks whose names are as long as Meta-World's longest, in fiftieths."""
    rates = np.random.default_rng(seed).integers(0, 51, (count, len(FRAMES))) / 50
    return {f"button-press-topdown-wall-{i}": rates[i].tolist() for i in range(count)}


def styled_figure_of(*paths: Path):
    """The figure with the fonts that the picture has, laid out."""
    with matplotlib.style.context(STYLE, after_reset=True):
        return figure_of(*paths)


def overlaps(boxes: list) -> list[tuple[int, int]]:
    """Pairs of boxes that have more than a rounding error in common."""
    inner = [box.padded(-1) for box in boxes]
    return [(a, b) for a in range(len(boxes)) for b in range(a) if inner[a].overlaps(inner[b])]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("count", [10, 50])
def test_many_tasks_have_a_panel_each_with_the_numbers_of_the_file(tmp_path, count, groups) -> None:
    rates = [many_rates(count, seed) for seed in range(groups)]
    paths = [write_many(tmp_path / f"method{g}.csv", rates[g]) for g in range(groups)]
    figure = draw_runs([load_run(path) for path in paths])
    panels = figure.axes[4:]
    assert [panel.get_title() for panel in panels] == list(rates[0]) and len(panels) == count
    for panel in panels:
        assert len(panel.lines) == groups
        for line, own in zip(panel.lines, rates, strict=True):
            assert points(line) == list(zip((1, 2, 3), own[panel.get_title()], strict=True))
    for axis, x in zip(figure.axes[:4], ((1, 2, 3), (0.5, 1, 1.5)) * 2, strict=True):
        for line, own in zip(axis.lines, rates, strict=True):
            of_tasks = np.array(list(own.values()))
            solved = axis in figure.axes[SOLVED_FRAMES:4]
            expected = (of_tasks > 0.97).sum(axis=0) if solved else of_tasks.mean(axis=0)
            np.testing.assert_allclose(points(line), list(zip(x, expected, strict=True)), atol=1e-8)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [f"method{g}" for g in range(groups)]
    for axis in figure.axes:
        assert [line.get_color() for line in axis.lines] == [handle.get_color() for handle in legend.get_lines()]


@pytest.mark.parametrize("count", [7, 10, 12, 50])
def test_many_tasks_are_readable(tmp_path, count) -> None:
    names = ["a" * 30, "b" * 30]
    tasks = many_rates(count, 0)
    paths = [write_many(tmp_path / f"{name}.csv", tasks, tasks) for name in names]
    figure = styled_figure_of(*paths)
    assert figure.get_figheight() * 150 <= 3000 and figure.get_figwidth() * 150 == 1800
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*names, "evaluation, without exploration noise"]
    boxes = [legend.get_window_extent(), *(axis.get_tightbbox() for axis in figure.axes)]
    assert not overlaps(boxes) and not overlaps([text.get_window_extent() for text in legend.get_texts()])
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
    panels = figure.axes[4:]
    heights = [axis.bbox.height / figure.dpi for axis in panels]
    assert min(heights) > 0.7 and max(heights) < min(heights) * 1.1  # inches
    assert {axis.get_xlim() for axis in panels} == {panels[0].get_xlim()} and panels[0].get_xlim()[0] == 0
    assert {axis.get_ylim() for axis in panels} == {(-0.08, 1.08)}
    with_ticks = [t for t, axis in enumerate(panels) if axis.xaxis.get_ticklabels()]  # the visible ones
    assert with_ticks == [t for t, axis in enumerate(panels) if axis.get_xlabel() == "million frames"]
    assert with_ticks == list(range(count))[-5:]  # nothing is below these
    assert [axis.get_ylabel() for axis in panels] == ["success rate" if t % 5 == 0 else "" for t in range(count)]
    overview = figure.axes[:4]
    assert [axis.get_ylabel() for axis in overview] == ["mean success rate", "", "tasks at ≥ 98%", ""]
    assert [axis.get_xlabel() for axis in overview] == ["", "", "million frames", "minutes"]
    assert overview[MEAN_FRAMES].get_ylim() == (-0.04, 1.04) and all(axis.get_xlim()[0] == 0 for axis in overview)
    assert overview[SOLVED_MINUTES].get_yticks().tolist() == [0, count // 2, count]
    assert overview[SOLVED_FRAMES].get_ylim()[1] > count


def test_six_tasks_are_drawn_in_full_and_seven_not(tmp_path) -> None:
    six, seven = (figure_of(write_many(tmp_path / f"{n}.csv", many_rates(n, 0))) for n in (6, 7))
    assert len(six.axes) == 4 and len(six.axes[0].lines) == 6 and len(six.legends[0].get_texts()) == 6
    assert len(seven.axes) == 4 + 7 and len(seven.axes[0].lines) == 1


def test_tasks_without_an_episode_are_left_out_of_the_mean(tmp_path) -> None:
    """Worked out by hand: five tasks always succeed, and two have their first episodes later."""
    rates = {str(i): [NAN, 1.0, 1.0] for i in range(5)} | {"late": [NAN, 0.4, 0.98], "latest": [NAN, NAN, 0.979]}
    axes = figure_of(write_many(tmp_path / "run.csv", rates)).axes
    expected = [(2, round(5.4 / 6, 9)), (3, round(6.959 / 7, 9))]
    assert points(axes[MEAN_FRAMES].lines[0]) == expected
    assert points(axes[SOLVED_FRAMES].lines[0]) == [(2, 5), (3, 6)]
    assert points(axes[-1].lines[0]) == [(3, 0.979)] and axes[-1].lines[0].get_marker() == "."
    none = {str(i): [NAN] * 3 for i in range(7)}
    assert not any(axis.lines for axis in figure_of(write_many(tmp_path / "none.csv", none)).axes)


def test_the_overview_of_a_group_is_its_mean_and_range(tmp_path) -> None:
    """Of 7 tasks, one run solves 1, 3 and 7, the other 1, 5 and 6; what is not solved is at 0."""
    solved = ([1, 3, 7], [1, 5, 6])
    paths = []
    for run, counts in enumerate(solved):
        rates = {str(i): [1.0 if i < n else 0.0 for n in counts] for i in range(7)}
        paths.append(write_many(tmp_path / f"seed{run}.csv", rates))
    figure = figure_of(*paths)
    for axis, scale in ((figure.axes[SOLVED_FRAMES], 1), (figure.axes[MEAN_FRAMES], 7)):
        np.testing.assert_allclose(points(axis.lines[0]), [(1, 1 / scale), (2, 4 / scale), (3, 6.5 / scale)], atol=1e-8)
        (band,) = axis.collections
        corners = {(round(float(x)), round(float(y) * scale)) for x, y in band.get_paths()[0].vertices}
        assert corners == {(1, 1), (2, 3), (2, 5), (3, 6), (3, 7)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["seed0 … seed1: mean and range of 2 runs"]
    panel = figure.axes[4 + 4]  # of the task that one run solves at the second row and the other does not
    assert points(panel.lines[0]) == [(1, 0), (2, 0.5), (3, 1)] and len(panel.collections) == 1


def test_evaluations_of_many_tasks_are_markers_in_overview_and_panels(tmp_path) -> None:
    evaluations = {str(i): [NAN, 0.9 + i / 50, NAN] for i in range(7)}  # 0.9 to 1.02, of which three are at 0.98
    path = write_many(tmp_path / "run.csv", {str(i): [0.1, 0.2, 0.3] for i in range(7)}, evaluations)
    figure = figure_of(path)
    assert points(figure.axes[MEAN_FRAMES].lines[1]) == [(2, 0.96)]
    assert points(figure.axes[SOLVED_MINUTES].lines[1]) == [(1, 3)]
    for i, panel in enumerate(figure.axes[4:]):
        curve, markers = panel.lines
        assert points(markers) == [(2, round(0.9 + i / 50, 9))] and markers.get_linestyle() == "None"
        assert curve.get_color() == markers.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()][1:] == ["evaluation, without exploration noise"]


def test_groups_with_other_tasks_share_the_panels_that_both_have(tmp_path) -> None:
    few = write_many(tmp_path / "few.csv", {"6": [0.5] * 3, "new": [0.7] * 3})
    figure = figure_of(write_many(tmp_path / "many.csv", {str(i): [0.98] * 3 for i in range(7)}), few)
    assert [panel.get_title() for panel in figure.axes[4:]] == [*map(str, range(7)), "new"]
    assert [len(panel.lines) for panel in figure.axes[4:]] == [1] * 6 + [2, 1]
    assert figure.axes[-1].lines[0].get_color() == figure.legends[0].get_lines()[1].get_color()
    assert [points(line)[0] for line in figure.axes[MEAN_FRAMES].lines] == [(1, 0.98), (1, 0.6)]  # each of its own
    assert [points(line)[0] for line in figure.axes[SOLVED_FRAMES].lines] == [(1, 7), (1, 0)]


def test_the_picture_of_many_tasks_has_the_size_of_its_figure(tmp_path) -> None:
    png, _ = plot_runs([write_many(tmp_path / "run.csv", many_rates(10, 0))], tmp_path / "curves")
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert width == 1800 and 1000 <= height <= 1500


def test_long_lists_in_labels_are_counted(tmp_path) -> None:
    def run(name: str, *tasks: str) -> Path:
        folder = write_run(tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        config["environment"]["tasks"] = tasks
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    seven, eight, other = run("seven", *"abcdefg"), run("eight", *"abcdefgh"), run("other", *"hgfedcba")
    assert labels_of(run("six", *"abcdef"), seven) == ["tasks=a b c d e f", "tasks=(7 of them)"]
    assert labels_of(seven, eight) == ["tasks=(7 of them)", "tasks=(8 of them)"]
    assert labels_of(eight, other) == [str(eight), str(other)]  # not the same label twice


def test_twenty_groups_all_look_different(tmp_path) -> None:
    paths = [write_metrics(tmp_path / f"x{i}.csv", [0.1] * 3) for i in range(20)]
    lines = figure_of(*paths).axes[FRAMES_SUCCESS].lines
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == 20


def test_groups_differ_in_more_than_the_seed_and_are_called_by_it(tmp_path) -> None:
    def run(name: str, **config: object) -> Path:
        return write_run(tmp_path / name, **config)

    base = [run("a", seed=1), run("b", seed=2, num_workers=2, device="cpu", quiet=True, overwrite=True)]
    config = json.loads((base[1] / "config.json").read_text())
    config["runtime"] |= {"wandb": True, "max_restarts": 9}
    (base[1] / "config.json").write_text(json.dumps(config))
    assert labels_of(*base) == ["a … b"]
    overlap, lr = run("c", overlap=True), run("d", lr=0.001)
    assert labels_of(*base, overlap) == ["overlap=False", "overlap=True"]
    assert labels_of(*base, overlap, lr) == ["lr=0.0003, overlap=False", "overlap=True", "lr=0.001"]
    both = run("both", overlap=True, lr=0.001, gamma=0.9)
    assert labels_of(base[0], overlap, lr, both)[::3] == [
        "lr=0.0003, overlap=False",  # two have these, and two the others
        "lr=0.001, gamma=0.9, overlap=True",
    ]
    half = run("half", lr=0.001, gamma=0.9)
    assert labels_of(base[0], overlap, lr, half) == [
        "lr=0.0003",
        "lr=0.0003, overlap=True",
        "lr=0.001",
        "lr=0.001, gamma=0.9",
    ]
    wide = run("wide", torso=(64, 32), target_kl=None)
    assert labels_of(base[0], wide) == ["torso=256 256, target_kl=auto", "torso=64 32, target_kl=None"]
    number = run("number", success_bonus=5, seed=3)  # which is 5.0
    assert labels_of(base[0], number) == ["a … number"]
    many = run("many", gamma=0.9, head=64, num_steps=64, lr=0.1)
    assert labels_of(base[0], many) == ["a", "many"]
    groups = group_runs([load_run(path) for path in (base[0], overlap, base[1])])
    assert [[run.path.name for run in group] for group in groups.values()] == [["a", "b"], ["c"]]


def test_settings_of_one_method_of_task_sampling_are_no_difference_to_others(tmp_path) -> None:
    uniform = write_run(tmp_path / "a", sampling="uniform")
    difficulty = write_run(tmp_path / "b", sampling=DifficultyConfig(min_task_weight=0.1))
    meta = write_run(tmp_path / "c", sampling="meta")
    assert labels_of(uniform, difficulty) == ["task_sampling=uniform", "task_sampling=difficulty"]
    assert labels_of(meta, difficulty, uniform)[:2] == ["task_sampling=meta", "task_sampling=difficulty"]
    other = write_run(tmp_path / "d", sampling=DifficultyConfig(min_task_weight=0.2))
    assert labels_of(difficulty, other) == ["min_task_weight=0.1", "min_task_weight=0.2"]
    assert labels_of(uniform, difficulty, other) == [
        "task_sampling=uniform",
        "min_task_weight=0.1",
        "min_task_weight=0.2",
    ]


def test_a_setting_that_an_older_version_did_not_have(tmp_path) -> None:
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new")
    config = json.loads((old / "config.json").read_text())
    del config["learner"]["overlap"]
    (old / "config.json").write_text(json.dumps(config))
    assert labels_of(old, new) == ["overlap=unknown", "overlap=False"]


def test_metrics_files_group_by_the_number_of_their_seed(tmp_path) -> None:
    names = ("seed1", "seed2", "seed10", "overlap", "seedling")
    files = [write_metrics(tmp_path / f"{name}.csv", [0.1] * 3) for name in names]
    assert labels_of(*files) == ["seed1 … seed10", "overlap", "seedling"]
    other = tmp_path / "other"
    other.mkdir()
    more = [write_metrics(other / f"{name}.csv", [0.1] * 3) for name in ("seed1", "overlap")]
    same_names = [files[0], files[3], *more]
    assert labels_of(*same_names) == [str(path) for path in same_names]
    run = write_run(tmp_path / "v1.5")
    assert labels_of(run, files[3]) == ["v1.5", "overlap"]


@pytest.mark.parametrize("cut", [2, 3, 8, 20])
def test_a_torn_last_line_is_left_out(tmp_path, cut) -> None:
    """Even one that would pass for a row: without its line break, or with 0.7 for the 0.75 that was to come."""
    path = write_metrics(tmp_path / "metrics.csv", [0.1, 0.2, 0.3], evaluations=[NAN, NAN, 0.75])
    path.write_bytes(path.read_bytes()[:-cut])
    metrics = read_metrics(path)
    assert metrics["frames"].tolist() == [1e6, 2e6] and metrics["train/push-v3/success_rate"].tolist() == [0.1, 0.2]


def test_metrics_are_columns_of_floats(tmp_path) -> None:
    metrics = read_metrics(write_metrics(tmp_path / "m.csv", [0.1, NAN, 0.3]))
    assert list(metrics)[:3] == ["frames", "time/elapsed", "train/push-v3/success_rate"]
    assert all(column.dtype == np.float64 and column.shape == (3,) for column in metrics.values())
    np.testing.assert_array_equal(metrics["train/push-v3/return"], [10, NAN, 30])


def test_the_files_are_pictures_and_the_same_every_time(tmp_path) -> None:
    run = write_run(tmp_path / "run")
    first = plot_runs([run, run], tmp_path / "curves")
    assert first == [tmp_path / "curves.png", tmp_path / "curves.svg"]
    second = plot_runs([run], tmp_path / "again.v2.svg")
    assert second == [tmp_path / "again.v2.png", tmp_path / "again.v2.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert {path.name for path in tmp_path.iterdir()} == {"run", *(path.name for path in (*first, *second))}

    png, svg = first
    header = png.read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])
    assert header.startswith(b"\x89PNG\r\n\x1a\n") and 1000 <= width <= 2500 and 700 <= height <= 2500
    image = imread(png)
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1], :3] == 1).all() and (image[..., 3:] == 1).all()  # white, opaque
    blue = np.array([0x00, 0x72, 0xB2]) / 255
    assert (np.abs(image[..., :3] - blue).max(axis=-1) < 0.02).sum() > 1000  # the curves
    root = ElementTree.fromstring(svg.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "dc:date" not in svg.read_text()
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert root.find(".//{http://www.w3.org/2000/svg}text") is None  # letters are paths: no font is needed


def test_own_settings_of_matplotlib_are_neither_used_nor_changed(tmp_path) -> None:
    run = write_run(tmp_path / "run")
    plain, _ = plot_runs([run], tmp_path / "plain")
    with matplotlib.rc_context({"lines.linewidth": 9, "figure.facecolor": "black", "savefig.transparent": True}):
        before = dict(matplotlib.rcParams)
        styled, _ = plot_runs([run], tmp_path / "styled")
        assert dict(matplotlib.rcParams) == before
    assert styled.read_bytes() == plain.read_bytes()


def test_names_are_taken_literally(tmp_path) -> None:
    run, other = write_run(tmp_path / "_$x^$_"), write_metrics(tmp_path / ("long " * 40 + ".csv"), [0.1] * 3)
    figure = figure_of(run, other)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "_$x^$_" and texts[1].count("long") == 40 and "\n" in texts[1]
    for drawn in (figure, figure_of(other)):
        assert drawn.legends[0].get_window_extent().width < drawn.bbox.width


HEADER = "frames,time/elapsed,train/a/success_rate,train/a/return"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "m.csv has no rows yet: wait for"),
        (HEADER, "m.csv has no rows yet: wait for"),
        (f"{HEADER}\n", "m.csv has no rows yet: wait for"),
        (f"{HEADER}\n1,2,3", "m.csv has no rows yet: wait for"),
        ("cell,frames\nseed1,5\n", "m.csv is not a metrics file, it has no column time/elapsed: give"),
        ("hello\n", "m.csv is not a metrics file, it has no column frames: give"),
        ("frames,time/elapsed\n1,2\n", "m.csv is not a metrics file, it has no train/<task>/success_rate and return"),
        (f"{HEADER}\n1,2,3,4\n1,2,3\n1,2,3,4\n", "line 3 of .*m.csv is not 4 numbers: remove"),
        (f"{HEADER}\n1,2,3,4\n1,2,3,4,5\n", "line 3 of .*m.csv is not 4 numbers: remove"),
        (f"{HEADER}\n1\n1,2,3,4\n", "line 2 of .*m.csv is not 4 numbers: remove"),
        (f"{HEADER}\n1,2,x,4\n1,2,3,4\n", "line 2 of .*m.csv is not 4 numbers: remove"),
    ],
)
def test_files_that_are_no_metrics(tmp_path, content, message) -> None:
    path = tmp_path / "m.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        plot_runs([path], tmp_path / "out")
    assert "\n" not in str(error.value) and [file.name for file in tmp_path.iterdir()] == ["m.csv"]


def test_folders_that_are_no_runs(tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=f"no run at {tmp_path}/nowhere: give the folder of a run"):
        plot_runs([tmp_path / "nowhere"], out)
    with pytest.raises(InputError, match=f"no metrics.csv in {tmp_path}: give the folder of a run that has begun"):
        plot_runs([tmp_path], out)
    with pytest.raises(InputError, match="no runs to plot: give"):
        plot_runs([], out)
    run = write_run(tmp_path / "run")
    for broken in ("{", "[]"):
        (run / "config.json").write_text(broken)
        with pytest.raises(InputError, match=r"no readable config.json in .*run: give .*run/metrics.csv instead"):
            plot_runs([run], out)
    (run / "metrics.csv").unlink()
    (run / "metrics.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*metrics.csv .Is a directory.: give"):
        read_metrics(run / "metrics.csv")


def test_no_way_to_write(tmp_path, monkeypatch) -> None:
    run = write_run(tmp_path / "run")
    for out in (tmp_path / "nowhere" / "curves", run / "config.json" / "curves", Path("/")):
        with pytest.raises(InputError, match=r"cannot write .*: give a name in an existing folder"):
            plot_runs([run], out)
    (tmp_path / "curves.svg").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*curves.svg .Is a directory.: choose another"):
        plot_runs([run], tmp_path / "curves")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "curves.png").write_text("old")

    def full(descriptor: int) -> None:
        os.truncate(descriptor, 10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*curves.png .No space left on device.: choose"):
        plot_runs([run], tmp_path / "curves")
    assert (tmp_path / "curves.png").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "curves.png"}


def test_without_matplotlib(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"plot needs matplotlib: pip install 'mtrl_vec\[pictures\]'"):
        plot_runs([write_run(tmp_path / "run")], tmp_path / "curves")


def test_importing_the_module_imports_no_matplotlib_and_plotting_no_pyplot(tmp_path) -> None:
    code = """
import sys; from pathlib import Path; from mtrl_vec.commands.plot import plot_runs
assert "matplotlib" not in sys.modules
plot_runs([Path(sys.argv[1])], Path(sys.argv[2]))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    run = write_run(tmp_path / "run")
    subprocess.run([sys.executable, "-c", code, str(run), str(tmp_path / "curves")], check=True)
