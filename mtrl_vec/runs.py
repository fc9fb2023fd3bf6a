"""The folder of a run: what may be in it, its metrics, TensorBoard and Weights & Biases, and the log of its events."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import fcntl
import importlib.util
import io
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mtrl_vec.checkpoint import (
    BEST_NAME,
    DUMP_NAME,
    checkpoint_name,
    checkpoints,
    damaged,
    first_line,
    is_readable,
    leftovers,
)
from mtrl_vec.config import HOW_NOT_WHAT, TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.machine import versions
from mtrl_vec.metrics import column_names

WHOLE_STATE = {"policy", "ppo", "acting", "random", "episodes", "schedule", "simulators", "ahead", "counts", "seconds"}
WHOLE_STATE |= {"fast_success"}
"""What a checkpoint needs for a run to go on, the last of it among its episodes."""
CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.csv"
EVENTS_NAME = "events.log"
TRACE_NAME = "trace.json.gz"
WANDB_ID_NAME = "wandb.id"
RUN_FILES = {
    CONFIG_NAME,
    METRICS_NAME,
    EVENTS_NAME,
    TRACE_NAME,
    BEST_NAME,
    DUMP_NAME,
    WANDB_ID_NAME,
    "tensorboard",
    "wandb",
}


def prepare_run_dir(config: TrainConfig) -> tuple[Path, RunLock]:
    """Create the folder of a run, lock it, and write its configuration there.

    Raises:
        InputError: there is a run already and ``overwrite`` is off, or something that is not a run, or no way to write.
    """
    folder = config.run_dir
    if folder is None:
        folder = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed}"
    try:
        present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if present and not config.overwrite:
            raise InputError(
                f"{folder} exists: go on with --resume, replace it with --overwrite, or choose another --run-dir"
            )
        foreign = sorted(set(present) - _run_files(folder)) if present else []
        if present and (foreign or not _is_run(folder)):
            what = f"it holds {foreign[0]}" if foreign else "its config.json is not a run's"
            raise InputError(f"{folder} is not only the folder of a run ({what}): choose another --run-dir")
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
        for name in present:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_config(folder, config)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --run-dir") from error
    return folder, lock


def resumed_config(run_dir: Path, checkpoint: Mapping[str, Any]) -> TrainConfig:
    """The settings that a run goes on with, if nothing is changed. Raises InputError if they are another version's."""
    try:
        return dataclasses.replace(TrainConfig.from_dict(checkpoint["config"]), run_dir=run_dir, overwrite=False)
    except (KeyError, TypeError) as error:
        raise InputError(f"the run in {run_dir} is from another version ({error}): start a new one") from error


def continue_run_dir(config: TrainConfig, checkpoint: Mapping[str, Any]) -> tuple[Path, RunLock]:
    """The folder of a run that goes on, with its settings of now, locked.

    Args:
        config: of the run, which names the folder.
        checkpoint: what it goes on from.

    Raises:
        InputError: the checkpoint is not a run's, or of one that is complete; a setting is changed that would make it
            another run; or there is no way to write.
    """
    folder = config.run_dir
    assert folder is not None
    if missing := WHOLE_STATE - {*checkpoint, *checkpoint.get("episodes", ())}:
        what = "is from another version" if "simulators" in checkpoint else "holds a policy, but not the state of a run"
        raise InputError(f"{folder} {what} (there is no {min(missing)}): it cannot be resumed")
    before = resumed_config(folder, checkpoint)
    for name, value in config.differences(before).items():
        if name not in HOW_NOT_WHAT:
            old = getattr(before, name)
            raise InputError(f"{name} is {value}: the run in {folder} was started with {old}, and has to stay with it")
    if checkpoint["iteration"] >= config.num_iterations:
        raise InputError(
            f"total_frames is {config.total_frames}: the run in {folder} has them already ({checkpoint['frames']:,}); "
            "give it more to go on"
        )
    lock, used = RunLock(folder), checkpoint_name(checkpoint["frames"])
    try:
        for path in itertools.takewhile(lambda path: path.name != used, checkpoints(folder)):
            if is_readable(path):
                raise InputError(f"{folder} has {path.name}, which is newer than {used}: try again, or move it away")
            path.rename(path.with_suffix(".damaged"))  # or it would count as one of the newest
        write_config(folder, config)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): make room or change its permissions") from error
    return folder, lock


def changes(config: TrainConfig, checkpoint: Mapping[str, Any]) -> str:
    """What is different from before an interruption, and what comes of it; empty if nothing is."""
    old, new = checkpoint["versions"], versions()
    other = [f"{name} {new[name]} instead of {old.get(name)}" for name in new if new[name] != old.get(name)]
    notes = f"; with {', '.join(other)}, so not to the last bit" if other else ""
    if config.total_frames != (before := checkpoint["config"]["total_frames"]):
        notes += (
            f"; total_frames is {config.total_frames:,} instead of {before:,}: what is annealed goes back accordingly"
        )
    return notes


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the settings of a run. Raises OSError."""
    temporary = folder / f"{CONFIG_NAME}.tmp"
    temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    temporary.replace(folder / CONFIG_NAME)


def _run_files(folder: Path) -> set[str]:
    names = RUN_FILES | {path.name for path in (*checkpoints(folder), *leftovers(folder), *damaged(folder))}
    return names | {f"{Path(name).stem}.tmp" for name in names} | {f"{name}.tmp" for name in names}


def _is_run(folder: Path) -> bool:
    try:
        values = json.loads((folder / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"tasks", "total_frames", "seed"} <= values.keys()


def require_wandb() -> None:
    """Raises InputError where Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError("wandb is on, but not installed: pip install wandb, or leave --wandb out")


class RunLock:
    """Keeps other processes out of a run's folder, until the end of a ``with`` block or of this process.

    Raises:
        InputError: one of them is in there.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise InputError(f"{folder} is in use by another process: wait for it, or choose another folder") from error
        except OSError:  # a file system that cannot lock
            self.release()

    def release(self) -> None:
        """Let others in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    __del__ = release


class RunLog:
    """Writes ``metrics.csv`` (a row per iteration), TensorBoard events, and ``events.log`` in the folder of a run.

    Where the disk is full it says so and tries again with the next row: a run is worth more than its log.

    Args:
        folder: of the run, with the metrics of its first iterations if it is resumed.
        config: of the run.
        iteration: what it goes on from; later rows, from before an interruption, are dropped.
        frames: likewise.
        notify: also told every event.

    Raises:
        InputError: no way to write, the metrics that are to be continued cannot be read, or no Weights & Biases.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, iteration: int, frames: int, notify: Callable[[str], None]
    ) -> None:
        self._folder, self._notify, self._complained = folder, notify, False
        self._columns = column_names(config.tasks)
        path = folder / METRICS_NAME
        rows = _rows_until(path, iteration) if iteration else []
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_bytes(b"".join([_csv_line(self._columns), *map(self._line, rows)]))
            temporary.replace(path)
            self._file = path.open("ab", buffering=0)  # what cannot be written is kept here, not in a buffer
            self._pending = self._file.tell(), b""  # rows, and where they go: the file tells how much of them it has
        except OSError as error:
            raise InputError(
                f"cannot write to {folder} ({error.strerror}): make room or choose another folder"
            ) from error
        self._purge_step = frames + 1 if iteration else None
        self._tensorboard: SummaryWriter | None = None
        self._wandb = _start_wandb(folder, config) if config.wandb else None

    def _line(self, row: Mapping[str, Any]) -> bytes:
        return _csv_line([row.get(name, "nan") for name in self._columns])

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row with all `mtrl_vec.metrics.COLUMNS`; ``frames`` is the step of the curves."""
        if missing := set(self._columns) ^ row.keys():
            raise ValueError(f"not the columns of the metrics: {sorted(missing)}")
        formatted = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        start, rows = self._pending
        self._pending = start, rows + self._line(formatted)
        curves, step = {key: value for key, value in row.items() if not np.isnan(value)}, int(row["frames"])
        problems = [self._write_file(), self._write_tensorboard(curves, step), self._write_wandb(curves, step)]
        if problem := next(filter(None, problems), None):
            if not self._complained:
                self.event(f"cannot write metrics to {self._folder} ({problem}): the run goes on")
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
        except OSError as error:  # which its own thread came across: it is of no more use
            self._tensorboard, self._purge_step = None, None
            return error.strerror
        return None

    def _write_wandb(self, curves: Mapping[str, float], step: int) -> str | None:
        if self._wandb is None:
            return None
        try:
            for key, value in curves.items():
                self._wandb.log_scalar(key, value, step)
        except Exception as error:  # of a service that is not there for the run's sake
            self._wandb = None
            return f"Weights & Biases: {first_line(error)}"
        return None

    def event(self, message: str) -> None:
        """Something that happened to the run, with the time of day."""
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
    """A logger that goes on with the same run of Weights & Biases when ours is resumed."""
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
        raise InputError(f"cannot go on from {path} ({first_line(error)}): repair it, or move it away") from error
