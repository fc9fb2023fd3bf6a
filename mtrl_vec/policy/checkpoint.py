"""Checkpoint files: written whole or not at all, checked when read, and unable to execute code.

A file holds a dictionary of plain tensors and values; for its ``version`` see `mtrl_vec.policy.migrations`.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError, first_line
from mtrl_vec.files import write_atomically
from mtrl_vec.policy.hub import PREFIX, download, is_on_hub
from mtrl_vec.policy.migrations import VERSION, migrate
from mtrl_vec.tasks.suite import UnknownTask

FORMAT = "mtrl_vec checkpoint"
BEST_NAME = "best.pt"
"""The policy of a run that did best in the evaluations while training, without the rest of the run's state."""
PRETRAINED = {"MT3": "pretrained", "MT10": "pretrained-mt10", "MT50": "pretrained-mt50"}
"""Names of the policies that are included in the package, by the set of their tasks."""
CRITIC = "critic_heads."
"""Begins the names of the critic's weights, which a policy that only acts can do without."""

_NAME = re.compile(r"checkpoint-(\d+)\.pt")


def checkpoint_name(frames: int) -> str:
    """Name of the file with a run's whole state after so many frames."""
    return f"checkpoint-{frames}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """Files with the whole state of a run, the newest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that ``path`` holds either the old content or the new one, never a part.

    Raises:
        OSError: it cannot be written. What was there before still is.
    """
    serialised = io.BytesIO()  # torch's own writer reports a full disk as anything but that
    torch.save({"format": FORMAT, "version": VERSION, **content}, serialised)
    write_atomically(path, bytes(serialised.getbuffer()))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file that a path means.

    Args:
        path: the file itself; the folder of a run, for its best policy, or the latest where it has none yet; one of
            `PRETRAINED`, for a policy that is included in the package; or ``hf:owner/name``, for one on the hub, see
            `mtrl_vec.policy.hub`.

    Raises:
        InputError: there is none.
    """
    if is_on_hub(path) and not path.exists():
        return download(path)
    if str(path) in PRETRAINED.values() and not path.exists():
        candidates = [Path(__file__).parent / f"{path}.pt"]
    else:
        candidates = [path / BEST_NAME, *checkpoints(path)] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    included = ", ".join(PRETRAINED.values())
    places = f"a checkpoint file, the folder of a run, {PREFIX}owner/name, or one of {included}"
    raise InputError(f"no checkpoint at {path}: give {places}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU, and bring it to today's version of the format.

    Args:
        path: see `find_checkpoint`.

    Raises:
        InputError: no file there, unreadable, damaged, not a checkpoint of this package, or of an unknown version.
    """
    file = find_checkpoint(path)
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not verify the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can break the reader in any way
        raise InputError(f"{file} is not a readable checkpoint ({first_line(error)})") from error
    content = _with_version(content)
    if content is None:
        raise InputError(f"{file} is not a checkpoint of this package (expected format {FORMAT!r})")
    try:
        return migrate(content)
    except Exception as error:
        raise InputError(f"{file} does not fit this version of mtrl_vec ({first_line(error)})") from error


def saved_config(content: Mapping[str, Any], file: Path) -> TrainConfig:
    """The settings in the content of a checkpoint.

    Args:
        content: see `load_checkpoint`.
        file: where it is from.

    Raises:
        UnknownTask: it was trained on a task that is not registered in this program.
        KeyError, TypeError, InputError: it has other settings than those of this version.
    """
    try:
        return TrainConfig.from_dict(content["config"])
    except UnknownTask as error:
        raise UnknownTask(
            f"{file} was trained on {error.name!r}, which is not one of Meta-World's tasks: register it before loading "
            "the policy, in a program of your own (commands know Meta-World's tasks only)",
            error.name,
        ) from error


def _with_version(content: Any) -> dict[str, Any] | None:
    """The content with a number in ``version``; None if it is not a checkpoint's."""
    if not isinstance(content, dict):
        return None
    if content.get("format") == f"{FORMAT} 1":  # how version 1 spelled it
        return {**content, "version": 1}
    return content if content.get("format") == FORMAT and isinstance(content.get("version"), int) else None


def is_readable(path: Path) -> bool:
    """Whether `load_checkpoint` can read a file."""
    try:
        load_checkpoint(path)
    except InputError:
        return False
    return True


def load_latest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The newest readable checkpoint of a run's whole state, and a warning for each newer one that is damaged.

    Raises:
        InputError: there is none.
    """
    files = checkpoints(folder) if folder.is_dir() else []
    problems: list[str] = []
    for file in files:
        try:
            content = load_checkpoint(file)
        except InputError as error:
            problems.append(f"{error}: using the one before it")
        else:
            return content, problems
    if problems:
        raise InputError(f"none of the {len(files)} checkpoints in {folder} is readable: start a new run")
    raise InputError(f"no checkpoint to resume from in {folder}: give the folder of a run that has checkpoint-*.pt")
