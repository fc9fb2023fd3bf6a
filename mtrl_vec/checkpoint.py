"""Save and load a trained policy with everything that belongs to it. Plain tensors and values only: nothing that is
loaded can execute code."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.policy import SharedPolicy

FORMAT = "mtrl_vec checkpoint 1"
CHECKPOINT_NAME = "checkpoint.pt"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that ``path`` holds either the old content or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file given by itself or by the folder of its run. Raises InputError when there is none."""
    file = path / CHECKPOINT_NAME if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no checkpoint at {file}: give a checkpoint file or the folder of a run")
    return file


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Args:
        path: the file, or the folder of its run.

    Raises:
        InputError: no file there, unreadable, or not a checkpoint of this package.
    """
    file = find_checkpoint(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can break the reader in any way
        raise InputError(f"{file} is not a readable checkpoint ({_first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{file} is not a checkpoint of this package (expected format {FORMAT!r})")
    return content


def load_policy(path: Path) -> tuple[SharedPolicy, TrainConfig]:
    """The policy of a checkpoint, on the CPU and in evaluation mode, and the configuration it was trained with.

    Raises:
        InputError: see `load_checkpoint`; also a checkpoint whose content does not fit this version.
    """
    content = load_checkpoint(path)
    try:
        config = TrainConfig.from_dict(content["config"])
        policy = SharedPolicy(config)
        policy.load_state_dict(content["policy"])
    except Exception as error:
        raise InputError(f"{path} does not fit this version ({_first_line(error)})") from error
    return policy.eval().requires_grad_(False), config


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
