"""What a run shows while it trains: bars on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtrl_vec.errors import tell

NARROW = 70
"""Columns of a terminal below which there are no bars, only numbers."""
MAX_LINES = 6
"""Tasks that have a line each. Of more, only the worst have: as many as this, below a summary."""
LEVELS = (0.98, 0.9)
"""Success rates: a summary counts the tasks that reach them."""


@dataclass(frozen=True)
class Summary:
    """Success over many tasks.

    Attributes:
        mean: over the tasks with an episode; NaN without any.
        reached: how many tasks are at each of `LEVELS` or above.
        no_episode: how many have no whole episode yet.
        worst: up to `MAX_LINES` tasks with an episode, lowest success rate first, then in the order of the tasks.
    """

    mean: float
    reached: tuple[int, ...]
    no_episode: int
    worst: tuple[str, ...]

    @classmethod
    def of(cls, tasks: Sequence[str], row: Mapping[str, float]) -> Summary:
        """Of a row of metrics."""
        rates = {task: row.get(f"train/{task}/success_rate", math.nan) for task in tasks}
        known = {task: rate for task, rate in rates.items() if not math.isnan(rate)}
        return cls(
            mean=sum(known.values()) / len(known) if known else math.nan,
            reached=tuple(sum(rate >= level for rate in known.values()) for level in LEVELS),
            no_episode=len(tasks) - len(known),
            worst=tuple(sorted(known, key=lambda task: known[task])[:MAX_LINES]),
        )


class ProgressDisplay:
    """A line with frames, speed and time left, and one with a bar of its success rate per task.

    More than `MAX_LINES` tasks have a summary instead, and lines of the worst of them.

    Args:
        tasks: their names.
        total_frames: of the whole run.
        quiet: show nothing but events.
        start_frames: what a resumed run goes on from.
    """

    PLAIN_LINE_SECONDS = 30.0

    def __init__(self, tasks: Sequence[str], total_frames: int, quiet: bool, start_frames: int = 0) -> None:
        self._tasks, self._total, self._quiet = tuple(tasks), total_frames, quiet
        self._console = Console(file=sys.stderr)
        self._start: tuple[float, float] | None = None
        self._live: Live | None = None
        if not quiet and self._console.is_terminal:
            first = self.render({"frames": start_frames, "time/sps": math.nan, "time/elapsed": 0.0})
            self._live = Live(first, console=self._console, refresh_per_second=4)
            self._live.start()
        self._last_line = -math.inf

    def render(self, row: Mapping[str, float]) -> Table:
        """What a terminal shows for a row of metrics."""
        narrow = self._console.width < NARROW
        view = Table.grid(padding=(0, 1), expand=False)
        for justify in ("left", "right", "right") if narrow else ("left", "left", "right", "right"):
            view.add_column(justify=justify, no_wrap=True)
        frames, speed, left = row["frames"], row["time/sps"], self._time_left(row)
        fast = "starting" if math.isnan(speed) else f"{speed:,.0f} steps/s"
        if left and not narrow:
            left += " left"
        view.add_row(f"{_short(frames)}/{_short(self._total)}", *self._bar(frames / self._total), fast, left)
        tasks = self._tasks
        # Success comes before the return where there is no room for both next to the longest names.
        roomy = len(tasks) <= MAX_LINES or self._console.width >= 60
        if len(tasks) > MAX_LINES:
            tasks = self._add_summary(view, Summary.of(tasks, row))
        for task in tasks:
            success, episode_return = (row.get(f"train/{task}/{name}", math.nan) for name in ("success_rate", "return"))
            if math.isnan(success):
                view.add_row(task, *self._bar(0.0), "no episode", "yet", style="dim")
            else:
                returned = f"return {episode_return:,.0f}" if roomy else ""
                view.add_row(task, *self._bar(success), f"{success:.0%} success", returned)
        return view

    def _add_summary(self, view: Table, summary: Summary) -> tuple[str, ...]:
        """Add lines about all tasks, and a heading for those that follow. Returns the tasks that follow."""
        count = len(self._tasks)
        mean = "" if math.isnan(summary.mean) else f"{summary.mean:.0%} success"
        view.add_row(f"mean of {count} tasks", *self._bar(0.0 if math.isnan(summary.mean) else summary.mean), mean, "")
        counts = {f"{level:.0%} success or more": n for level, n in zip(LEVELS, summary.reached, strict=True)}
        for what, number in (counts | {"no whole episode": summary.no_episode}).items():
            view.add_row(what, *self._bar(number / count), f"{number} of {count}", "")
        if summary.worst:
            known = count - summary.no_episode
            view.add_row(f"{len(summary.worst)} worst of {known} tasks:", style="bold")
        return summary.worst

    def _bar(self, share: float) -> list[ProgressBar]:
        """The column with a bar, which a narrow terminal does not have."""
        width = self._console.width
        # The names of many tasks are long: bars of other lengths leave room for them on 70 to 80 columns.
        length = 24 if len(self._tasks) <= MAX_LINES else min(24, width - 58)
        return [] if width < NARROW else [ProgressBar(total=1.0, completed=share, width=length)]

    def _time_left(self, row: Mapping[str, float]) -> str:
        if self._start is None or row["frames"] <= self._start[0]:
            return ""
        frames, elapsed = row["frames"] - self._start[0], row["time/elapsed"] - self._start[1]
        seconds = round(elapsed / frames * (self._total - row["frames"]))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def update(self, row: Mapping[str, float]) -> None:
        """Show the latest row of metrics, and its evaluation, if there was one."""
        if self._quiet:
            return
        if not math.isnan(row.get("eval/mean_success_rate", math.nan)):
            self.note(self._evaluation(row))
        if self._live is not None:
            self._live.update(self.render(row))
        elif row["time/elapsed"] - self._last_line >= self.PLAIN_LINE_SECONDS or row["frames"] >= self._total:
            self._last_line = row["time/elapsed"]
            tell(self._line(row))
        if self._start is None:  # the first iteration takes longer than others
            self._start = row["frames"], row["time/elapsed"]

    def _line(self, row: Mapping[str, float]) -> str:
        left = self._time_left(row)
        speed = f"{row['time/sps']:,.0f} steps/s" + (f", {left} left" if left else "")
        if len(self._tasks) > MAX_LINES:  # in 100 columns, whatever the numbers
            summary = _plain_summary(Summary.of(self._tasks, row), len(self._tasks))
            return f"{_short(row['frames'])}/{_short(self._total)}, {speed}: {summary}"
        tasks = "; ".join(self._plain(task, row) for task in self._tasks)
        return f"{row['frames']:,} of {self._total:,} frames, {speed}: {tasks}"

    def _evaluation(self, row: Mapping[str, float]) -> str:
        rates = {task: row[f"eval/{task}/success_rate"] for task in self._tasks}
        if len(rates) <= MAX_LINES:
            results = [f"{task} {rate:.0%}" for task, rate in rates.items()]
        else:
            at_least = [(level, sum(rate >= level for rate in rates.values())) for level in LEVELS]
            results = [f"{n} of {len(rates)} tasks at {level:.0%}" for level, n in at_least]
        mean = f"mean success {row['eval/mean_success_rate']:.3f}"
        return f"evaluation after {row['frames']:,} frames: {', '.join([mean, *results])}"

    @staticmethod
    def _plain(task: str, row: Mapping[str, float]) -> str:
        success, episode_return = row[f"train/{task}/success_rate"], row[f"train/{task}/return"]
        if math.isnan(success):
            return f"{task} no whole episode yet"
        return f"{task} success {success:.0%}, return {episode_return:,.0f}"

    def note(self, message: str) -> None:
        """Show an event, above the bars if there are any; also where nothing else is shown."""
        if self._live is not None:
            self._console.print(Text(message))
        else:
            tell(message)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.stop()


def _plain_summary(summary: Summary, count: int) -> str:
    if math.isnan(summary.mean):
        return f"no whole episode of {count} tasks yet"
    totals = (f"/{count}", "")  # once is enough
    reached = [f"{n}{of} at {level:.0%}" for n, of, level in zip(summary.reached, totals, LEVELS, strict=True)]
    text = ", ".join([f"success {summary.mean:.0%}", *reached])
    return text + (f", {summary.no_episode} no episode" if summary.no_episode else "")


def _short(frames: float) -> str:
    return f"{frames / 1e6:.2f}M" if frames >= 1e5 else f"{frames / 1e3:.1f}k"
