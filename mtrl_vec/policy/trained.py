"""A trained policy, loaded from its checkpoint, as a function from observations to actions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError, first_line
from mtrl_vec.policy.checkpoint import CRITIC, find_checkpoint, load_checkpoint, saved_config
from mtrl_vec.policy.network import SharedPolicy
from mtrl_vec.tasks.layout import OBSERVATION_SIZE
from mtrl_vec.tasks.suite import UnknownTask, registered_names


def choose_tasks(names: Iterable[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Tasks by any name that `mtrl_vec.tasks.suite.resolve_tasks` takes.

    Args:
        names: of tasks, or of sets of them; None for all.
        known: the tasks of a policy.

    Raises:
        InputError: a task that is not among them.
    """
    if names is None:
        return tuple(known)
    tasks = registered_names(names)
    for name in tasks:
        if name not in known:
            raise InputError(f"task is {name!r}: this policy was trained on {', '.join(known)}")
    return tasks


@dataclass(frozen=True)
class TrainedPolicy:
    """What `load_policy` returns: call it with an observation and a task to get an action."""

    module: SharedPolicy
    """The networks, on the CPU; ``module.actor`` is a TorchRL actor. Without a critic in the file it is untrained."""
    config: TrainConfig
    """What it was trained with."""
    frames: int
    """How long it was trained, in environment steps."""
    file: Path
    """Where it was loaded from."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks it was trained on, in the order of its heads."""
        return self.config.tasks

    def __call__(self, observation: ArrayLike, task: str, *, sample: bool = False) -> NDArray[np.float32]:
        """An action for each observation.

        Args:
            observation: [39] or [n, 39], Meta-World's, goal included.
            task: which of `tasks`, by any name that `mtrl_vec.tasks.suite.resolve_tasks` takes.
            sample: draw it, with torch's random generator, as in training; otherwise it is the mean action.

        Returns:
            [4] or [n, 4] in [-1, 1]: hand velocity and gripper effort.

        Raises:
            InputError: a task that it was not trained on, or observations of another size.
        """
        name, *more = choose_tasks([task], self.tasks)
        if more:
            raise InputError(f"task is {task!r}: name one of {', '.join(self.tasks)}")
        rows, size = np.asarray(observation, dtype=np.float32), OBSERVATION_SIZE
        if rows.ndim not in (1, 2) or rows.shape[-1] != size:
            expected = f"[{size}] or [n, {size}], as Meta-World gives them"
            raise InputError(f"observation has shape {list(rows.shape)}: it must be {expected}")
        task_idx = np.full(rows.size // size, self.tasks.index(name))
        actions = self.act(rows.reshape(-1, size), task_idx, sample=sample)
        return actions.reshape(*rows.shape[:-1], self.module.action_size)

    @torch.no_grad()
    def act(
        self, observation: NDArray[np.floating], task_idx: NDArray[np.integer], *, sample: bool = False
    ) -> NDArray[np.float32]:
        """Actions [n, 4], clipped to [-1, 1], for observations [n, 39] of the tasks at positions [n] in `tasks`.

        The mean ones, or drawn at random.

        Raises:
            InputError: a position that is not in `tasks`.
        """
        rows = torch.as_tensor(observation, dtype=torch.float32)
        tasks = torch.as_tensor(np.asarray(task_idx, dtype=np.int64))
        if len(tasks) and not 0 <= tasks.min() <= tasks.max() < len(self.tasks):
            raise InputError(
                f"task_idx has {int(tasks.min())} to {int(tasks.max())}: this policy has {len(self.tasks)} tasks, "
                f"{', '.join(self.tasks)}"
            )
        one_hot = torch.nn.functional.one_hot(tasks, self.module.num_tasks).float()
        loc, scale = self.module.distribution(rows, one_hot, tasks)
        return (torch.normal(loc, scale) if sample else loc).clamp(-1, 1).numpy()


def load_policy(path: Path | str) -> TrainedPolicy:
    """Load the policy of a checkpoint.

    Args:
        path: a checkpoint file; the folder of a run, for its best policy; one of
            `mtrl_vec.policy.checkpoint.PRETRAINED`, for those that are included in the package; or ``hf:owner/name``,
            for one on the Hugging Face Hub.

    Raises:
        InputError: see `mtrl_vec.policy.checkpoint.load_checkpoint`; also a checkpoint that does not fit this version,
            or whose tasks include one of your own that is not registered in this program.
    """
    file = find_checkpoint(Path(path))
    content = load_checkpoint(file)
    try:
        config = saved_config(content, file)
        policy = SharedPolicy.for_tasks(config.policy, config.tasks)
        missing = policy.load_state_dict(content["policy"], strict=False)
        if missing.unexpected_keys or not all(name.startswith(CRITIC) for name in missing.missing_keys):
            policy.load_state_dict(content["policy"])  # which says what is wrong
        frames = int(content["frames"])
    except UnknownTask:
        raise
    except Exception as error:
        raise InputError(f"{file} does not fit this version of mtrl_vec ({first_line(error)})") from error
    return TrainedPolicy(policy.eval().requires_grad_(False), config, frames, file)
