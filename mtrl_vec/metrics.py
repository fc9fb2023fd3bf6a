"""What a run tells: episode statistics, one row of numbers per iteration in a file, and a progress display.

Shapes: ``B`` environments, ``T`` steps, ``K`` tasks.
"""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tensordict import TensorDictBase
from torch.utils.tensorboard import SummaryWriter


class EpisodeStatistics:
    """Success and return of the last ``window`` whole episodes of every task, from consecutive rollouts.

    An episode is successful if any of its steps was. Episodes that did not start at their first step (random phases) or
    ended in unstable physics are left out.
    """

    def __init__(self, tasks: Sequence[str], num_envs: int, whole: bool, window: int = 50) -> None:
        """``whole``: the first episodes start at their first step."""
        self.tasks = tuple(tasks)
        self.unstable_episodes = 0
        self._whole = np.full(num_envs, whole)
        self._return = np.zeros(num_envs)
        self._success = np.zeros(num_envs, dtype=bool)
        self._recent: list[deque[tuple[float, bool]]] = [deque(maxlen=window) for _ in tasks]

    def update(self, rollout: TensorDictBase) -> None:
        """Take in a rollout [B, T] with raw rewards."""

        def column(*key: str) -> NDArray:
            return rollout[key].squeeze(-1).cpu().numpy()

        reward, success = column("next", "reward"), column("next", "success")
        done, unstable = column("next", "done"), column("next", "unstable")
        task_idx = rollout["task_idx"].cpu().numpy()
        self.unstable_episodes += int(unstable.sum())
        for t in range(reward.shape[1]):
            self._return += reward[:, t]
            self._success |= success[:, t]
            for env in np.flatnonzero(done[:, t]):
                if self._whole[env] and not unstable[env, t]:
                    self._recent[task_idx[env, t]].append((float(self._return[env]), bool(self._success[env])))
                self._whole[env], self._return[env], self._success[env] = True, 0.0, False

    def summary(self) -> dict[str, float]:
        """``train/<task>/success_rate`` and ``train/<task>/return``; NaN while there are no episodes."""
        out: dict[str, float] = {}
        for task, recent in zip(self.tasks, self._recent, strict=True):
            returns, successes = zip(*recent, strict=True) if recent else ((np.nan,), (np.nan,))
            out[f"train/{task}/success_rate"] = float(np.mean(successes))
            out[f"train/{task}/return"] = float(np.mean(returns))
        return out


class RunLog:
    """``metrics.csv`` (a row per iteration) and TensorBoard events in a run's folder."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "metrics.csv").open("w", newline="")
        self._csv: csv.DictWriter | None = None
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row. All rows have the columns of the first; ``frames`` is the step of the TensorBoard curves."""
        if self._csv is None:
            self._csv = csv.DictWriter(self._file, fieldnames=list(row))
            self._csv.writeheader()
        self._csv.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        self._file.flush()
        for key, value in row.items():
            if not np.isnan(value):
                self._tensorboard.add_scalar(key, value, int(row["frames"]))

    def close(self) -> None:
        """Flush and close the files."""
        self._tensorboard.close()
        self._file.close()


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['sps']:,.0f} steps/s")


class ProgressDisplay:
    """A bar with speed, time left and a line per task; on a pipe or in a file, a plain line now and then."""

    PLAIN_LINE_SECONDS = 30.0

    def __init__(self, tasks: Sequence[str], total_frames: int, quiet: bool) -> None:
        self._tasks = tuple(tasks)
        self._console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.completed:,.0f} / {task.total:,.0f} frames"),
            BarColumn(bar_width=None),
            _Speed(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._job = self._bar.add_task("train", total=total_frames, sps=0.0)
        self._total = total_frames
        self._quiet = quiet
        self._live: Live | None = None
        if not quiet and self._console.is_terminal:
            self._live = Live(self._render({}), console=self._console, refresh_per_second=4)
            self._live.start()
        self._last_line = -self.PLAIN_LINE_SECONDS

    def _render(self, row: Mapping[str, float]) -> Table:
        view = Table.grid(expand=True)
        view.add_row(self._bar)
        for task in self._tasks:
            view.add_row(_task_line(task, row))
        return view

    def update(self, row: Mapping[str, float]) -> None:
        """Show the latest row of metrics."""
        if self._quiet:
            return
        if self._live is not None:
            self._bar.update(self._job, completed=row["frames"], sps=row["time/sps"])
            self._live.update(self._render(row))
        elif row["time/elapsed"] - self._last_line >= self.PLAIN_LINE_SECONDS or row["frames"] >= self._total:
            self._last_line = row["time/elapsed"]
            tasks = "; ".join(str(_task_line(task, row)).strip() for task in self._tasks)
            print(f"{row['frames']:>10,} frames  {row['time/sps']:,.0f} steps/s  {tasks}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.stop()


def _task_line(task: str, row: Mapping[str, float]) -> Text:
    success, episode_return = (row.get(f"train/{task}/{name}", np.nan) for name in ("success_rate", "return"))
    if np.isnan(success):
        return Text(f"  {task:<14} no whole episode yet")
    return Text(f"  {task:<14} success {success:4.0%}  return {episode_return:6,.0f}")
