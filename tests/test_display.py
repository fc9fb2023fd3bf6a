"""What a run shows: bars on a terminal, plain lines elsewhere, and a summary of many tasks."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from mtrl_vec.train.display import ProgressDisplay, Summary

NAN = math.nan
TASKS = ("reach-v3", "push-v3", "pick-place-v3")
ROW = {
    "frames": 1_234_567,
    "time/sps": 7263.2,
    "time/elapsed": 100.0,
    "train/reach-v3/success_rate": 0.98,
    "train/reach-v3/return": 861.4,
    "train/push-v3/success_rate": 0.5,
    "train/push-v3/return": 402.0,
    "train/pick-place-v3/success_rate": NAN,
    "train/pick-place-v3/return": NAN,
}


def shown(tasks: tuple[str, ...], row: dict[str, float], width: int = 100) -> list[str]:
    """The lines of a terminal that many columns wide, without colours."""
    display = ProgressDisplay(tasks, 200_000_000, quiet=True)
    display._console = Console(width=width)
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(display.render(row))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_display_fits_the_terminal(width) -> None:
    lines = shown(TASKS, ROW, width)
    assert len(lines) == 4 and max(map(len, lines)) <= width  # nothing is folded
    assert "1.23M/200.00M" in lines[0] and "steps/s" in lines[0]
    for line, task, words in zip(lines[1:], TASKS, ("98% success", "50% success", "no episode"), strict=True):
        assert line.startswith(task) and words in line
    assert ("━" in "".join(lines)) == (width >= 70)


def test_the_bar_of_a_task_is_its_success_rate() -> None:
    display = ProgressDisplay(TASKS, 2_000_000, quiet=True)
    display._console = Console(width=100)
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system="truecolor").print(display.render(ROW))
    reach, push = out.getvalue().splitlines()[1:3]
    first = lambda line: len(line.split("━", 1)[1].split("\x1b")[0]) + 1  # noqa: E731
    assert first(reach) in (23, 24) and first(push) == 12  # of 24


def test_plain_lines_where_there_is_no_terminal(capsys) -> None:
    display = ProgressDisplay(TASKS, 2_000_000, quiet=False)
    for frames, elapsed in ((10_000, 1.0), (200_000, 20.0), (400_000, 40.0), (2_000_000, 45.0)):
        display.update(ROW | {"frames": frames, "time/elapsed": elapsed})
    display.note("something happened")
    display.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of")[0] for line in lines[:-1]] == ["10,000", "400,000", "2,000,000"]
    # 390,000 frames in 39 seconds: another 1.6 million take 160.
    assert "0:02:40 left: reach-v3 success 98%, return 861; push-v3 success 50%" in lines[1]
    assert lines[-1] == "something happened" and "\x1b" not in "".join(lines)


def test_an_evaluation_has_a_line_of_its_own(capsys) -> None:
    display = ProgressDisplay(TASKS, 2_000_000, quiet=False)
    evaluated = {"eval/reach-v3/success_rate": 0.75, "eval/push-v3/success_rate": 0.5, "eval/mean_success_rate": 0.4}
    row = ROW | {"frames": 5000, "time/elapsed": 1.0, "eval/pick-place-v3/success_rate": 0.0, **evaluated}
    display.update(row)
    display.update(row | {"eval/mean_success_rate": NAN})
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation")]
    assert lines == ["evaluation after 5,000 frames: mean success 0.400, reach-v3 75%, push-v3 50%, pick-place-v3 0%"]
    rates = {"frames": 7000, "eval/mean_success_rate": 0.5}
    tasks, row = many([0.98] * 5 + [0.9] * 4 + [0.89])
    rates |= {name.replace("train", "eval"): rate for name, rate in row.items() if name.endswith("rate")}
    ProgressDisplay(tasks, 2_000_000, quiet=False).update(row | rates)
    err = capsys.readouterr().err
    assert "evaluation after 7,000 frames: mean success 0.500, 5 of 10 tasks at 98%, 9 of 10 tasks at 90%\n" in err


def many(rates: list[float]) -> tuple[tuple[str, ...], dict[str, float]]:
    """Tasks with names as long as Meta-World's longest, and a row of metrics with their success rates."""
    tasks = tuple(f"button-press-topdown-wall-{i}" for i in range(len(rates)))
    row = {"frames": 123_456_789, "time/sps": 12345.6, "time/elapsed": 90_000.0}
    for task, rate in zip(tasks, rates, strict=True):
        row |= {f"train/{task}/success_rate": rate, f"train/{task}/return": 1000 * rate}
    return tasks, row


MIXED = [0.98, NAN, 0.5, 1.0, 0.96, 0.3, 0.5, 0.9, 0.02, 0.88]
"""Two at 98 % or more, four at 90 %, one without an episode; the worst six are 8, 5, 2, 6 (after 2), 9, 7."""


def test_a_summary_of_many_tasks() -> None:
    tasks, row = many(MIXED)
    summary = Summary.of(tasks, row)
    assert summary.mean == pytest.approx(6.04 / 9) and summary.reached == (2, 4) and summary.no_episode == 1
    assert summary.worst == tuple(tasks[i] for i in (8, 5, 2, 6, 9, 7))
    assert math.isnan(Summary.of(tasks, {}).mean) and Summary.of(tasks, {}).no_episode == 10


@pytest.mark.parametrize("width", [40, 60, 70, 80, 200])
def test_many_tasks_are_a_summary_and_the_worst_of_them(width) -> None:
    tasks, row = many(MIXED)
    lines = shown(tasks, row, width)
    assert len(lines) == 12 and max(map(len, lines)) <= width
    starts = ["mean of 10 tasks", "98% success or", "90% success or", "no whole episode", "6 worst of 9 tasks:"]
    numbers = ["67% success", "2 of 10", "4 of 10", "1 of 10", ""]
    for line, start, number in zip(lines[1:6], starts, numbers, strict=True):
        assert line.startswith(start[: width // 3]) and number in line
    for line, i, percent in zip(lines[6:], (8, 5, 2, 6, 9, 7), (2, 30, 50, 50, 88, 90), strict=True):
        assert line.startswith("button-press") and f" {percent}% success" in line
        if width >= 60:
            assert line.startswith(f"{tasks[i]} ") and line.endswith(f"return {10 * percent}")
    bars = [line.count("━") + line.count("╸") for line in lines]
    assert (max(bars) > 0) == (width >= 70) and bars[5] == 0  # the heading has none
    if width == 200:
        assert [bars[i] for i in (1, 2, 3, 4)] == [16, 5, 10, 2]  # of 24


@pytest.mark.parametrize("count", [6, 7])
def test_six_tasks_have_a_line_each_and_seven_a_summary(count) -> None:
    lines = shown(*many([0.5] * count))
    assert len(lines) == (1 + 6 if count == 6 else 1 + 4 + 1 + 6)
    assert ("worst" in "".join(lines)) == (count == 7)


def test_a_summary_before_all_tasks_have_an_episode() -> None:
    tasks, row = many([NAN] * 10)
    assert [line.split("  ")[0] for line in shown(tasks, row)[1:]] == [
        "mean of 10 tasks",
        "98% success or more",
        "90% success or more",
        "no whole episode",
    ]
    assert "worst" not in "".join(shown(tasks, {"frames": 0, "time/sps": NAN, "time/elapsed": 0.0}))
    lines = shown(*many([NAN] * 8 + [0.5, 0.25]))
    assert lines[5] == "2 worst of 2 tasks:" and len(lines) == 8
    assert [line.split()[0][-1] for line in lines[6:]] == ["9", "8"]


def plain_lines(capsys, tasks: tuple[str, ...], row: dict[str, float], total: int) -> list[str]:
    display = ProgressDisplay(tasks, total, quiet=False)
    display.update(row | {"frames": 1e6, "time/elapsed": 1000.0})
    display.update(row)
    return capsys.readouterr().err.splitlines()


def test_the_plain_line_of_many_tasks_is_short(capsys) -> None:
    tasks, row = many(MIXED)
    first, line = plain_lines(capsys, tasks, row, 200_000_000)
    assert first == "1.00M/200.00M, 12,346 steps/s: success 67%, 2/10 at 98%, 4 at 90%, 1 no episode"
    # 122,456,789 frames in 89,000 seconds: another 76,543,211 take 55,631.
    left = "123.46M/200.00M, 12,346 steps/s, 15:27:11 left: "
    assert line == f"{left}success 67%, 2/10 at 98%, 4 at 90%, 1 no episode"
    for rates, words in (
        ([0.97] * 39 + [NAN] * 11, "success 97%, 0/50 at 98%, 39 at 90%, 11 no episode"),
        ([1.0] * 50, "success 100%, 50/50 at 98%, 50 at 90%"),
        ([NAN] * 50, "no whole episode of 50 tasks yet"),
    ):
        _, line = plain_lines(capsys, *many(rates), 200_000_000)
        assert line == left + words and len(line) <= 100
