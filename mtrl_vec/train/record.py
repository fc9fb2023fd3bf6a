"""What a run shows and writes down while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from mtrl_vec.config import TrainConfig
from mtrl_vec.train.display import ProgressDisplay
from mtrl_vec.train.log import RunLog
from mtrl_vec.train.progress import Progress


class Record:
    """Terminal and log files of a run, until the end of a ``with`` block.

    Args:
        config: of the run.
        folder: where the log files are.
        progress: what the run continues from.

    Raises:
        InputError: see `RunLog`.
    """

    def __init__(self, config: TrainConfig, folder: Path, progress: Progress) -> None:
        with contextlib.ExitStack() as closing:
            display = ProgressDisplay(config.tasks, progress.total_frames, config.runtime.quiet, progress.frames)
            closing.callback(display.close)
            log = RunLog(folder, config, progress.iteration, progress.frames, display.note)
            closing.callback(log.close)
            self._closing = closing.pop_all()
        self._display, self._log = display, log
        self.event = log.event

    def write(self, row: Mapping[str, float]) -> None:
        """Log and show a row with all columns of the metrics."""
        self._log.write(row)
        self._display.update(row)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()


class Silence:
    """What ranks other than the first do in place of a `Record`: nothing."""

    def event(self, message: str) -> None:
        """See `Record`."""

    def write(self, row: Mapping[str, float]) -> None:
        """See `Record`."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None: ...
