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
"""The latest state of a run, optimiser included."""
BEST_NAME = "best.pt"
"""The policy of a run that did best in the evaluations while training, and nothing else."""
PRETRAINED = "pretrained"
"""Names the policy that comes with the package."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that ``path`` holds either the old content or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file that a path means. Raises InputError when there is none.

    Args:
        path: the file itself; the folder of a run, for its best policy, or the latest where it has none yet; or
            ``pretrained``, for the policy that comes with the package.
    """
    if path == Path(PRETRAINED) and not path.exists():
        candidates = [Path(__file__).parent / f"{PRETRAINED}.pt"]
    else:
        candidates = [path / BEST_NAME, path / CHECKPOINT_NAME] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    raise InputError(
        f"no checkpoint at {candidates[-1]}: give a checkpoint file, the folder of a run, or {PRETRAINED!r}"
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Args:
        path: see `find_checkpoint`.

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
    policy, config, _ = load_trained(path)
    return policy, config


def load_trained(path: Path) -> tuple[SharedPolicy, TrainConfig, int]:
    """`load_policy`, and the frames it was trained for."""
    content = load_checkpoint(path)
    try:
        config = TrainConfig.from_dict(content["config"])
        policy = SharedPolicy(config)
        policy.load_state_dict(content["policy"])
        frames = int(content["frames"])
    except Exception as error:
        raise InputError(f"{path} does not fit this version ({_first_line(error)})") from error
    return policy.eval().requires_grad_(False), config, frames


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
