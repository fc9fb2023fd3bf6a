"""What a run writes while it trains: metrics, TensorBoard, Weights & Biases, and its events."""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib.util
import io
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError, first_line
from mtrl_vec.files import write_atomically
from mtrl_vec.train.metrics import column_names

METRICS_NAME = "metrics.csv"
EVENTS_NAME = "events.log"
WANDB_ID_NAME = "wandb.id"


def require_wandb() -> None:
    """Raises InputError where Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb needs wandb: pip install 'mtrl_vec[wandb]'")


class RunLog:
    """Writes ``metrics.csv`` (a row per iteration), TensorBoard events, and ``events.log`` in the folder of a run.

    If the disk is full it says so and tries again with the next row: a run is worth more than its log.

    Args:
        folder: of the run, with the metrics of its first iterations if it is resumed.
        config: of the run.
        iteration: iteration to continue from; later rows, from before an interruption, are dropped.
        frames: environment steps at that point.
        notify: also told every event.

    Raises:
        InputError: the files cannot be written, the metrics to be continued cannot be read, or no Weights & Biases.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, iteration: int, frames: int, notify: Callable[[str], None]
    ) -> None:
        self._folder, self._notify, self._complained = folder, notify, False
        self._columns = column_names(config.tasks)
        path = folder / METRICS_NAME
        rows = _rows_until(path, iteration) if iteration else []
        try:
            write_atomically(path, b"".join([_csv_line(self._columns), *map(self._line, rows)]))
            self._file = path.open("ab", buffering=0)  # what cannot be written is kept below, not in a buffer
            self._pending = (
                self._file.tell(),
                b"",
            )  # where rows go, and the rows
        except OSError as error:
            raise InputError(
                f"cannot write to {folder} ({error.strerror}): make room or choose another folder"
            ) from error
        self._purge_step = frames + 1 if iteration else None
        self._tensorboard: SummaryWriter | None = None
        self._wandb = _start_wandb(folder, config) if config.runtime.wandb else None

    def _line(self, row: Mapping[str, Any]) -> bytes:
        return _csv_line([row.get(name, "nan") for name in self._columns])

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row with all `mtrl_vec.train.metrics.COLUMNS`; ``frames`` is the step of the curves."""
        if missing := set(self._columns) ^ row.keys():
            raise ValueError(f"not the columns of the metrics: {sorted(missing)}")
        formatted = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        start, rows = self._pending
        self._pending = start, rows + self._line(formatted)
        curves, step = {key: value for key, value in row.items() if not np.isnan(value)}, int(row["frames"])
        problems = [self._write_file(), self._write_tensorboard(curves, step), self._write_wandb(curves, step)]
        if problem := next(filter(None, problems), None):
            if not self._complained:
                self.event(f"cannot write metrics to {self._folder} ({problem}): the run continues")
            self._complained = True
        else:
            self._complained = False

    def _write_file(self) -> str | None:
        start, rows = self._pending
        try:
            missing = rows[max(0, self._file.tell() - start) :]
            if self._file.write(missing) < len(missing):
                return os.strerror(errno.ENOSPC)
        except OSError as error:
            return error.strerror
        self._pending = self._file.tell(), b""
        return None

    def _write_tensorboard(self, curves: Mapping[str, float], step: int) -> str | None:
        try:
            if self._tensorboard is None:
                self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._purge_step)
            for key, value in curves.items():
                self._tensorboard.add_scalar(key, value, step)
        except OSError as error:  # from its own thread, which has ended: start another
            self._tensorboard, self._purge_step = None, None
            return error.strerror
        return None

    def _write_wandb(self, curves: Mapping[str, float], step: int) -> str | None:
        if self._wandb is None:
            return None
        try:
            for key, value in curves.items():
                self._wandb.log_scalar(key, value, step)
        except Exception as error:  # an outage of a service must not end the run
            self._wandb = None
            return f"Weights & Biases: {first_line(error)}"
        return None

    def event(self, message: str) -> None:
        """Note an event of the run, with the time of day."""
        self._notify(message)
        with contextlib.suppress(OSError), (self._folder / EVENTS_NAME).open("a") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {message}\n")

    def close(self) -> None:
        """Flush and close the files."""
        self._write_file()
        self._file.close()
        with contextlib.suppress(OSError):
            if self._tensorboard is not None:
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.experiment.finish()


def _csv_line(values: Sequence[object]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode()


def _start_wandb(folder: Path, config: TrainConfig) -> Any:
    """A logger that continues the same run of Weights & Biases when ours is resumed."""
    from torchrl.record.loggers.wandb import WandbLogger

    known = folder / WANDB_ID_NAME
    try:
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:8])
        return WandbLogger(
            exp_name=folder.name,
            save_dir=str(folder),
            id=known.read_text(),
            resume="allow",
            project="mtrl_vec",
            config=config.to_dict(),
        )
    except Exception as error:
        raise InputError(
            f"cannot log to Weights & Biases ({first_line(error)}): leave --wandb out, or log in"
        ) from error


def _rows_until(path: Path, iteration: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # the last may be torn
        return [row for row in csv.DictReader(whole) if int(row["iteration"]) <= iteration]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"cannot continue {path} ({first_line(error)}): repair it, or move it away") from error
