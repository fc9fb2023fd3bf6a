"""The folder of a run: what may be in it, who may write to it, and continuing the run in it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError, first_line
from mtrl_vec.files import temporary_path, write_atomically
from mtrl_vec.machine import versions
from mtrl_vec.policy.checkpoint import BEST_NAME, checkpoint_name, checkpoints, is_readable, saved_config
from mtrl_vec.tasks.suite import UnknownTask
from mtrl_vec.torchrun import launch_id
from mtrl_vec.train.log import EVENTS_NAME, METRICS_NAME, WANDB_ID_NAME

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two processes out of a folder
    fcntl = None  # type: ignore[assignment]

CONFIG_NAME = "config.json"
TRACE_NAME = "trace.json.gz"
LAUNCH_NAME = "launch.id"
"""Which launch of torchrun has started a run, so that it continues after a restart, see `run_of_this_launch`."""
DUMP_NAME = "diverged.pt"
"""Left by a run that stopped because its numbers were no longer finite; see `mtrl_vec.learn.diagnosis`."""
RUN_FILES = {
    CONFIG_NAME,
    METRICS_NAME,
    EVENTS_NAME,
    TRACE_NAME,
    BEST_NAME,
    DUMP_NAME,
    LAUNCH_NAME,
    WANDB_ID_NAME,
    "tensorboard",
    "wandb",
}


def prepare_run_dir(config: TrainConfig) -> tuple[Path, RunLock]:
    """Create and lock the folder of a new run.

    Raises:
        InputError: there is a run already and ``overwrite`` is off, or something that is not a run, or the folder
            cannot be written to.
    """
    folder = config.runtime.run_dir
    if folder is None:
        folder = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed}"
    try:
        present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if present and not config.runtime.overwrite:
            raise InputError(
                f"{folder} exists: continue with --resume, replace it with --overwrite, or choose another --run-dir"
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
        if launch := launch_id():
            write_atomically(folder / LAUNCH_NAME, launch.encode())
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --run-dir") from error
    return folder, lock


def run_of_this_launch(folder: Path | None) -> Path | None:
    """The folder of the run that this launch of torchrun has started before, in ``folder`` or under ``runs/``.

    torchrun starts all ranks anew when one of them, or a node, is lost: with the same command, which now continues.
    None: there is no such run, or torchrun has not started this process.

    Raises:
        InputError: it has a policy, but nothing to continue from, and starting anew would remove it.
    """
    for candidate in Path("runs").glob("*") if folder is None else (folder,):
        if _is_of_this_launch(candidate):
            if (candidate / BEST_NAME).exists() and not checkpoints(candidate):
                raise InputError(
                    f"{candidate} has a policy, but no checkpoint to continue from: choose another --run-dir"
                )
            return candidate
    return None


def forget_launch(folder: Path) -> None:
    """A run is complete: another launch of the same name is another run."""
    with contextlib.suppress(OSError):
        (folder / LAUNCH_NAME).unlink(missing_ok=True)


def _is_of_this_launch(folder: Path) -> bool:
    launch = launch_id()
    try:
        return launch is not None and (folder / LAUNCH_NAME).read_text() == launch
    except OSError:
        return False


def require_visible(folder: Path) -> None:
    """Raises InputError where this machine does not see the folder of a run that another one has prepared."""
    if not folder.is_dir():
        raise InputError(f"{folder} cannot be seen on {platform.node()}: choose a --run-dir that all nodes share")


def resumed_config(run_dir: Path, checkpoint: Mapping[str, Any]) -> TrainConfig:
    """The settings that a run continues with, if nothing is changed.

    Raises:
        InputError: the checkpoint is of another version, or not of a whole run.
    """
    if "migrated_from" in checkpoint:
        raise InputError(
            f"the run in {run_dir} is from an older version of mtrl_vec: it cannot be resumed, but its "
            f"policy can be evaluated, or start a new run with --init-from {run_dir}"
        )
    if "rollouts" not in checkpoint:
        raise InputError(f"{run_dir} holds a policy, but not the state of a run: it cannot be resumed")
    try:
        return saved_config(checkpoint, run_dir).replace(run_dir=run_dir, overwrite=False)
    except UnknownTask:
        raise
    except (KeyError, TypeError, InputError) as error:
        reason = first_line(error)
        raise InputError(f"the run in {run_dir} is from another version ({reason}): start a new one") from error


def continue_run_dir(config: TrainConfig, checkpoint: Mapping[str, Any]) -> tuple[Path, RunLock]:
    """Lock the folder of a run that continues.

    Args:
        config: of the run, which names the folder.
        checkpoint: where it continues.

    Raises:
        InputError: the checkpoint is not a run's, or of one that is complete; a setting is changed that is not of
            `RuntimeConfig`; or the folder cannot be written to.
    """
    folder = config.runtime.run_dir
    assert folder is not None
    before = resumed_config(folder, checkpoint)
    for name, value, old in _changes_of_learning(config, before):
        raise changed(name, value, folder, old)
    if checkpoint["progress"]["iteration"] >= config.num_iterations:
        raise InputError(
            f"total_frames is {config.total_frames}: the run in {folder} has them already "
            f"({checkpoint['frames']:,}); give a larger --total-frames to continue"
        )
    lock, used = RunLock(folder), checkpoint_name(checkpoint["frames"])
    try:
        for path in itertools.takewhile(lambda path: path.name != used, checkpoints(folder)):
            if is_readable(path):
                raise InputError(f"{folder} has {path.name}, which is newer than {used}: try again, or move it away")
            path.rename(path.with_suffix(".damaged"))  # or it would count as one of the newest
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): make room or change its permissions") from error
    return folder, lock


def changed(name: str, value: object, folder: Path, old: object) -> InputError:
    """The error for a setting that may not change when a run continues."""
    return InputError(f"{name} is {value}: the run in {folder} was started with {old}, and has to keep it")


def _changes_of_learning(config: TrainConfig, before: TrainConfig) -> list[tuple[str, object, object]]:
    """Settings that differ, and decide what is learned: all but those of `RuntimeConfig`. Name, value, old value."""
    now, then = config.to_dict(), before.to_dict()
    found: list[tuple[str, object, object]] = []
    alone = ("seed", "init_from")
    found += [(name, now[name], then[name]) for name in alone if now[name] != then[name]]
    for group in (name for name in now if name not in (*alone, "runtime")):
        names = now[group].keys() | then[group].keys()
        found += [
            ("task_sampling" if name == "method" else name, _shown(now[group].get(name)), _shown(then[group].get(name)))
            for name in sorted(names, key=lambda name: name != "method")
            if now[group].get(name) != then[group].get(name)
        ]
    return found


def _shown(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def describe_changes(config: TrainConfig, checkpoint: Mapping[str, Any]) -> str:
    """What is different from before an interruption, and what follows from it; empty if nothing is."""
    old, new = checkpoint["versions"], versions()
    other = [f"{name} {new[name]} instead of {old.get(name)}" for name in new if new[name] != old.get(name)]
    notes = f"; with {', '.join(other)}, so not to the last bit" if other else ""
    total, before = config.total_frames, checkpoint["config"]["runtime"]["total_frames"]
    if total != before:
        notes += f"; total_frames is {total:,} instead of {before:,}: learning rate and noise are annealed over these"
    return notes


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the settings of a run. Raises InputError where they cannot be written."""
    try:
        write_atomically(folder / CONFIG_NAME, (json.dumps(config.to_dict(), indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): make room or choose another folder") from error


def remove_if_empty(folder: Path, frames: int) -> None:
    """Remove the folder of a run that has not come to a whole iteration: it would only be in the way."""
    if not frames and not (folder / DUMP_NAME).exists():
        shutil.rmtree(folder, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of a run that was killed while it wrote a checkpoint."""
    return list(folder.glob("checkpoint-*.tmp"))


def _run_files(folder: Path) -> set[str]:
    damaged = folder.glob("checkpoint-*.damaged")
    names = RUN_FILES | {path.name for path in (*checkpoints(folder), *leftovers(folder), *damaged)}
    old = {f"{Path(name).stem}.tmp" for name in names}  # of version 1
    return names | old | {temporary_path(folder / name).name for name in names}


def _is_run(folder: Path) -> bool:
    if (folder / LAUNCH_NAME).exists():  # also one that was killed before it wrote its settings
        return True
    try:
        values = json.loads((folder / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        return False
    groups = {field.name for field in dataclasses.fields(TrainConfig)}
    old = {"tasks", "total_frames", "seed"}  # flat settings of version 1
    return isinstance(values, dict) and (groups <= values.keys() or old <= values.keys())


class RunLock:
    """Keeps other processes out of a run's folder, until the end of a ``with`` block or of this process.

    After torchrun has restarted the ranks, it waits for the lock: a network file system releases that of a lost node
    only after a while.

    Raises:
        InputError: another process uses it.
    """

    WAIT_SECONDS = 120.0

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        if fcntl is None:
            return
        self._descriptor = os.open(folder, os.O_RDONLY)
        deadline = time.monotonic() + (self.WAIT_SECONDS if _is_of_this_launch(folder) else 0.0)
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
                self.release()
                problem = "is in use by another process: wait for it, or choose another folder"
                raise InputError(f"{folder} {problem}") from error
            except OSError:  # a file system that cannot lock
                self.release()
            return

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
