"""What a run shows while it trains: bars on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

NARROW = 70
"""Columns of a terminal below which there are no bars, only numbers."""


class ProgressDisplay:
    """A line with frames, speed and time left, and one with a bar of its success rate per task.

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
        frames, speed = row["frames"], row["time/sps"]
        bar = [] if narrow else [_bar(frames / self._total)]
        left = self._time_left(row)
        fast = "" if math.isnan(speed) else f"{speed:,.0f} steps/s"
        if left and not narrow:
            left += " left"
        view.add_row(f"{_short(frames)}/{_short(self._total)}", *bar, fast, left)
        for task in self._tasks:
            success, episode_return = (row.get(f"train/{task}/{name}", math.nan) for name in ("success_rate", "return"))
            if math.isnan(success):
                view.add_row(task, *([] if narrow else [_bar(0.0)]), "no episode", "yet", style="dim")
            else:
                bar = [] if narrow else [_bar(success)]
                view.add_row(task, *bar, f"{success:.0%} success", f"return {episode_return:,.0f}")
        return view

    def _time_left(self, row: Mapping[str, float]) -> str:
        if self._start is None or row["frames"] <= self._start[0]:
            return ""
        frames, elapsed = row["frames"] - self._start[0], row["time/elapsed"] - self._start[1]
        seconds = round(elapsed / frames * (self._total - row["frames"]))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def update(self, row: Mapping[str, float]) -> None:
        """Show the latest row of metrics."""
        if self._quiet:
            return
        if self._live is not None:
            self._live.update(self.render(row))
        elif row["time/elapsed"] - self._last_line >= self.PLAIN_LINE_SECONDS or row["frames"] >= self._total:
            self._last_line = row["time/elapsed"]
            tasks = "; ".join(self._plain(task, row) for task in self._tasks)
            left = self._time_left(row)
            speed = f"{row['time/sps']:,.0f} steps/s" + (f", {left} left" if left else "")
            print(f"{row['frames']:,} of {self._total:,} frames, {speed}: {tasks}", file=sys.stderr, flush=True)
        if self._start is None:  # the first iteration takes longer than others
            self._start = row["frames"], row["time/elapsed"]

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
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.stop()


def _bar(share: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=share, width=24)


def _short(frames: float) -> str:
    return f"{frames / 1e6:.2f}M" if frames >= 1e5 else f"{frames / 1e3:.1f}k"
