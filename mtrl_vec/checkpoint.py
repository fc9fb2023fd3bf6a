"""Checkpoint files: written whole or not at all, checked when read, and unable to execute code: plain tensors and
values only."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtrl_vec.errors import InputError

FORMAT = "mtrl_vec checkpoint 1"
BEST_NAME = "best.pt"
"""The policy of a run that did best in the evaluations while training, and nothing else."""
DUMP_NAME = "diverged.pt"
"""What a run left that stopped because its numbers were no longer finite; see `mtrl_vec.diagnosis`."""
KEPT = 3
"""Checkpoints of a run's whole state that are kept, the newest ones."""
PRETRAINED = "pretrained"
"""Names the policy that comes with the package."""

_NAME = re.compile(r"checkpoint-(\d+)\.pt")


def checkpoint_name(frames: int) -> str:
    """Of the file with a run's whole state after so many frames."""
    return f"checkpoint-{frames}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """Those with the whole state of a run, the newest one first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def leftovers(folder: Path) -> list[Path]:
    """Of a run that was killed while it wrote a checkpoint."""
    return list(folder.glob("checkpoint-*.tmp"))


def damaged(folder: Path) -> list[Path]:
    """Checkpoints that could not be read when the run was resumed."""
    return list(folder.glob("checkpoint-*.damaged"))


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that ``path`` holds either the old content or the new one, never a part.

    Raises:
        OSError: there is no way to write it, or no room. What was there before still is.
    """
    serialised = io.BytesIO()  # torch's own writer reports a full disk as anything but that
    torch.save({"format": FORMAT, **content}, serialised)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(serialised.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some file systems cannot
            _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Make sure that a new name is on the disk before older files go."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old_checkpoints(folder: Path) -> None:
    """All but the newest `KEPT`, and what an attempt to write one left behind."""
    for path in (*checkpoints(folder)[KEPT:], *leftovers(folder)):
        with contextlib.suppress(OSError):
            path.unlink()


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file that a path means. Raises InputError when there is none.

    Args:
        path: the file itself; the folder of a run, for its best policy, or the latest where it has none yet; or
            ``pretrained``, for the policy that comes with the package.
    """
    if path == Path(PRETRAINED) and not path.exists():
        candidates = [Path(__file__).parent / f"{PRETRAINED}.pt"]
    else:
        candidates = [path / BEST_NAME, *checkpoints(path)] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    raise InputError(f"no checkpoint at {path}: give a checkpoint file, the folder of a run, or {PRETRAINED!r}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Args:
        path: see `find_checkpoint`.

    Raises:
        InputError: no file there, unreadable, damaged, or not a checkpoint of this package.
    """
    file = find_checkpoint(path)
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can break the reader in any way
        raise InputError(f"{file} is not a readable checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{file} is not a checkpoint of this package (expected format {FORMAT!r})")
    return content


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


def random_states(device: torch.device) -> dict[str, Any]:
    """Of the generators that belong to the whole process: torch's, also of the GPU in use, and NumPy's."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Set what `random_states` returned; without a state for the GPU, as from a run on the CPU, that one stays."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    numpy = states["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))


def first_line(error: Exception) -> str:
    """Of an error's message, for messages of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
