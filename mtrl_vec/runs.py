"""The folder of a run: what may be in it, its metrics, TensorBoard and Weights & Biases, and the log of its events."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mtrl_vec.checkpoint import BEST_NAME, DUMP_NAME, checkpoints, leftovers
from mtrl_vec.config import HOW_NOT_WHAT, TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.metrics import column_names

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.csv"
EVENTS_NAME = "events.log"
TRACE_NAME = "trace.json.gz"
RUN_FILES = {CONFIG_NAME, METRICS_NAME, EVENTS_NAME, TRACE_NAME, BEST_NAME, DUMP_NAME, "tensorboard", "wandb"}


def prepare_run_dir(config: TrainConfig) -> Path:
    """Create the folder of a run and write its configuration there.

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
        for name in present:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --run-dir") from error
    return folder


def resumed_config(run_dir: Path, checkpoint: Mapping[str, Any]) -> TrainConfig:
    """The settings that a run goes on with, if nothing is changed. Raises InputError if they are another version's."""
    try:
        return dataclasses.replace(TrainConfig.from_dict(checkpoint["config"]), run_dir=run_dir, overwrite=False)
    except (KeyError, TypeError) as error:
        raise InputError(f"the run in {run_dir} is from another version ({error}): start a new one") from error


def continue_run_dir(config: TrainConfig, checkpoint: Mapping[str, Any]) -> Path:
    """The folder of a run that goes on, with its settings of now.

    Args:
        config: of the run, which names the folder.
        checkpoint: what it goes on from.

    Raises:
        InputError: the checkpoint is not a run's, or of one that is complete; a setting is changed that would make it
            another run; or there is no way to write.
    """
    folder = config.run_dir
    assert folder is not None
    if "simulators" not in checkpoint:
        raise InputError(f"{folder} holds a policy, but not the state of a run: it cannot be resumed")
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
    try:
        write_config(folder, config)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): make room or change its permissions") from error
    return folder


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the settings of a run. Raises OSError."""
    temporary = folder / f"{CONFIG_NAME}.tmp"
    temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    temporary.replace(folder / CONFIG_NAME)


def _run_files(folder: Path) -> set[str]:
    names = RUN_FILES | {path.name for path in (*checkpoints(folder), *leftovers(folder))}
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


class RunLog:
    """Writes ``metrics.csv`` (a row per iteration), TensorBoard events, and ``events.log`` in the folder of a run.

    Where the disk is full it says so once and tries again with the next row: a run is worth more than its log.

    Args:
        folder: of the run, with the metrics of its first iterations if it is resumed.
        config: of the run.
        iteration: what it goes on from; later rows, from before an interruption, are dropped.
        frames: likewise.
        notify: also told every event.

    Raises:
        InputError: no way to write, or the metrics that are to be continued cannot be read.
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
            self._file = temporary.open("w", newline="")
            self._csv = csv.DictWriter(self._file, self._columns, restval="nan", extrasaction="ignore")
            self._csv.writeheader()
            self._csv.writerows(rows)
            self._file.flush()
            temporary.replace(path)
        except OSError as error:
            raise InputError(
                f"cannot write to {folder} ({error.strerror}): make room or choose another folder"
            ) from error
        self._tensorboard: SummaryWriter | None = SummaryWriter(
            str(folder / "tensorboard"), purge_step=frames + 1 if iteration else None
        )
        self._wandb = None
        if config.wandb:
            from torchrl.record.loggers.wandb import WandbLogger

            self._wandb = WandbLogger(
                exp_name=folder.name, save_dir=str(folder), project="mtrl_vec", config=config.to_dict()
            )

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row with all `mtrl_vec.metrics.COLUMNS`; ``frames`` is the step of the curves."""
        if missing := set(self._columns) ^ row.keys():
            raise ValueError(f"not the columns of the metrics: {sorted(missing)}")
        formatted = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        with self._complaining():
            self._csv.writerow(formatted)
            self._file.flush()
        step = int(row["frames"])
        for key, value in row.items():
            if not np.isnan(value):
                if self._tensorboard is not None:
                    with self._complaining():
                        self._tensorboard.add_scalar(key, value, step)
                if self._wandb is not None:
                    self._wandb.log_scalar(key, value, step)

    @contextlib.contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._complained:
                self._complained = True
                self.event(f"cannot write metrics to {self._folder} ({error.strerror}): the run goes on")

    def event(self, message: str) -> None:
        """Something that happened to the run, with the time of day."""
        self._notify(message)
        with contextlib.suppress(OSError), (self._folder / EVENTS_NAME).open("a") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {message}\n")

    def close(self) -> None:
        """Flush and close the files."""
        with self._complaining():
            self._file.close()
        if self._tensorboard is not None:
            with self._complaining():
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.experiment.finish()


def _rows_until(path: Path, iteration: int) -> list[dict[str, Any]]:
    try:
        whole = [
            line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")
        ]  # the last may be torn
        return [row for row in csv.DictReader(whole) if int(row["iteration"]) <= iteration]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"cannot go on from {path} ({error}): repair it or remove it") from error
