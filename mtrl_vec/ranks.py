"""Ranks: the processes that train one policy together, each with its part of the environments.

Every rank decides the same things from the same numbers, to the last bit, so that nobody has to be told what to do
next. Everything that sums or gathers over environments goes through `Ranks`, which is one process by itself: its
methods return what they are given. `mtrl_vec.torchrun` has the ranks that torchrun starts.

Shapes: ``R`` ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from mtrl_vec.errors import InputError, RunFailed
from mtrl_vec.machine import available_cores

T = TypeVar("T")
E = TypeVar("E", bound=InputError | RunFailed)


class Ranks:
    """One process by itself.

    Attributes:
        rank: which one this is, from 0.
        size: ``R``.
    """

    rank, size = 0, 1

    @property
    def cores(self) -> int:
        """Cores of this machine for each of its ranks."""
        return available_cores()

    @property
    def first(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of ``count`` rows are this rank's: parts as even as possible, in the order of the ranks."""
        share, more = divmod(count, self.size)
        start = self.rank * share + min(self.rank, more)
        return slice(start, start + share + (self.rank < more))

    # For the learner, on its device.

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks, in place."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        return tensor

    def each(self, tensor: Tensor) -> Tensor:
        """A tensor of every rank, [R, ...]."""
        return tensor[None]

    # For simulators and files, on the CPU. These may be called while another thread learns.

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks one after the other, on every rank. All have the same number of rows."""
        return tensor

    def rows_at_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for several tensors in one message, but on the first rank only: others get back their own rows."""
        return dict(tensors)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, as `total`."""
        return tensor

    def from_first(self, call: Callable[[], T]) -> T:
        """Call on the first rank only. Every rank returns or raises what it did, which has to be picklable."""
        return call()

    def together(self, call: Callable[[], T]) -> T:
        """``call()``, which raises `WorkerDied` or `InputError` on all ranks if it does on any."""
        return call()

    def shared(self, error: E) -> E:
        """An error that all ranks raise, marked so that only the first one shows it."""
        return error

    def naming_the_lost(self) -> contextlib.AbstractContextManager[object]:
        """Turns errors of gloo and NCCL into RunFailed, as the methods themselves do, except in compiled code."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Leave the other ranks, at the end of a run that succeeded."""


ALONE = Ranks()


def require_same(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Raises RunFailed where float32 tensors are not the same on all ranks, to the last bit."""
    if ranks.size == 1:
        return
    checksums = ranks.rows(torch.stack([tensor.view(torch.int32).sum() for tensor in tensors]).cpu()[None])
    others = (checksums != checksums[0]).any(1).nonzero().flatten().tolist()
    if others:
        which = ", ".join(map(str, others))
        raise ranks.shared(
            RunFailed(f"the policy of rank {which} is no longer that of rank 0: use machines of the same kind")
        )
