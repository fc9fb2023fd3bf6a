"""Rollouts in shared memory: simulators write what they observe where the learner will read it.

Shapes: ``B`` environments, ``n`` of them in one worker, ``T`` steps, ``K`` tasks.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from mtrl_vec.errors import InputError
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.layout import ACTION_SIZE, OBSERVATION_SIZE

AFTER = "next."
"""Begins the names of what a step brings. The others are what it starts from, after resets."""

FLAGS = ("success", "unstable", "terminated", "truncated", "done")

INPUTS = ("observation", "task_one_hot", "task_idx")
"""What a policy reads."""


class SharedRollout:
    """A rollout [B, T] in shared memory, with the entries of `mtrl_vec.envs.MetaWorldEnv`: the parent's side.

    Args:
        num_envs, num_steps, num_tasks: ``B``, ``T`` and ``K``.
        pinned: let the GPU read the shared memory directly. Where CUDA refuses, there is a warning.

    Raises:
        InputError: there is not enough shared memory.
    """

    def __init__(self, num_envs: int, num_steps: int, num_tasks: int, pinned: bool = False) -> None:
        self._shape = num_envs, num_steps
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "observation": ((OBSERVATION_SIZE,), torch.float32),
            "task_one_hot": ((num_tasks,), torch.float32),
            "task_idx": ((), torch.int64),
            "action": ((ACTION_SIZE,), torch.float32),
            f"{AFTER}observation": ((OBSERVATION_SIZE,), torch.float32),
            f"{AFTER}reward": ((1,), torch.float32),
            **{AFTER + name: ((1,), torch.bool) for name in FLAGS},
        }
        try:
            self._shared = {
                name: torch.zeros(*self._shape, *shape, dtype=dtype).share_memory_()
                for name, (shape, dtype) in wanted.items()
            }
        except RuntimeError as error:
            size = num_envs * num_steps * sum(math.prod(shape) * dtype.itemsize for shape, dtype in wanted.values())
            raise InputError(
                f"no shared memory for a rollout of {num_envs:,} environments and {num_steps:,} steps: it takes "
                f"{size / 1e6:,.0f} MB (docker run has --shm-size)"
            ) from error
        if pinned:
            _pin(list(self._shared.values()))
        self._kept = {"action": self._shared["action"]}
        self._states: dict[tuple[int, int], list[TensorDict]] = {}

    def part(self, start: int, end: int) -> dict[str, Tensor]:
        """The entries of some environments, [n, T, ...], for a `RolloutWriter`."""
        return {name: tensor[start:end] for name, tensor in self._shared.items()}

    def states(self, rows: slice) -> list[TensorDict]:
        """What the policy reads at each of the ``T`` steps of some environments."""
        key = rows.start, rows.stop
        if key not in self._states:
            part, size = self.part(*key), [rows.stop - rows.start]
            self._states[key] = [
                TensorDict({name: part[name][:, t] for name in INPUTS}, size) for t in range(self._shape[1])
            ]
        return self._states[key]

    def keep(self, t: int, rows: slice, answer: TensorDictBase) -> None:
        """Keep what the policy has added at a step of some environments."""
        for name, value in answer.items():
            if name not in INPUTS:
                if name not in self._kept:
                    self._kept[name] = value.new_empty(*self._shape, *value.shape[1:])
                self._kept[name][rows, t] = value

    def result(self) -> TensorDict:
        """The whole rollout, in the layout of TorchRL's collectors; not a copy."""
        after = {name.removeprefix(AFTER): t for name, t in self._shared.items() if name.startswith(AFTER)}
        root = {name: self._shared[name] for name in INPUTS}
        return TensorDict(root | self._kept | {"next": TensorDict(after, self._shape)}, self._shape)


def _pin(tensors: Sequence[Tensor]) -> None:
    """Page-lock tensors in their place, until they are freed. ``Tensor.pin_memory`` would make a copy, not shared."""
    for tensor in tensors:
        error = _code(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if error:
            warnings.warn(f"continuing without pinned rollouts: cudaHostRegister failed ({error})", stacklevel=2)
            return
        weakref.finalize(tensor, _unpin, tensor.data_ptr()).atexit = False


def _unpin(pointer: int) -> None:
    _code(torch.cuda.cudart().cudaHostUnregister(pointer))


def _code(answer: object) -> int:
    """The code of an answer of CUDA, 0 for success."""
    code = int(answer)  # type: ignore[call-overload]
    if code:
        with contextlib.suppress(RuntimeError):  # CUDA reports an error a second time, to whatever comes next
            torch.zeros(1, device="cuda")
    return code


class RolloutWriter:
    """A worker's side: steps its simulations with the actions of a shared rollout, and writes what they bring.

    Args:
        sim: ``n`` simulations.
    """

    def __init__(self, sim: SimBatch) -> None:
        self._sim = sim
        self._one_hot = np.eye(len(sim.tasks), dtype=np.float32)
        self._rollouts: list[dict[str, NDArray]] = []
        self._into: dict[str, NDArray] = {}

    def attach(self, rollouts: Sequence[Mapping[str, Tensor]]) -> None:
        """Write into these from now on: the worker's part of each `SharedRollout`, [n, T, ...]."""
        self._rollouts = [{name: tensor.numpy() for name, tensor in rollout.items()} for rollout in rollouts]

    def begin(self, which: int) -> None:
        """Write where the simulations are now to the first step of a rollout."""
        self._into = self._rollouts[which]
        self._write_start(0)

    def advance(self, t: int) -> None:
        """Take the actions of step ``t``, and start new episodes where one is over."""
        into, step = self._into, self._sim.step(self._into["action"][:, t])
        into[f"{AFTER}observation"][:, t] = step.observation
        into[f"{AFTER}reward"][:, t, 0] = step.reward
        into[f"{AFTER}success"][:, t, 0] = step.success
        into[f"{AFTER}unstable"][:, t, 0] = step.unstable
        into[f"{AFTER}truncated"][:, t, 0] = into[f"{AFTER}done"][:, t, 0] = step.truncated
        if step.truncated.any():
            self._sim.reset(step.truncated)
        if t + 1 < into["action"].shape[1]:
            self._write_start(t + 1)

    def step(self) -> None:
        """The same for a rollout of one step that is used over and over: its start is overwritten in the end."""
        self.advance(0)
        self._write_start(0)

    def _write_start(self, t: int) -> None:
        self._into["observation"][:, t] = self._sim.observation
        self._into["task_idx"][:, t] = self._sim.task_idx
        self._into["task_one_hot"][:, t] = self._one_hot[self._sim.task_idx]
