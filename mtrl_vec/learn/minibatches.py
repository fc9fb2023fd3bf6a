"""Which frames an optimiser step learns from: minibatches of a rollout, of which each rank has a part.

Shapes: ``N`` frames of this rank, ``n`` of them in a minibatch.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from mtrl_vec.config import TrainConfig
from mtrl_vec.learn.loss import LEARNING_KEYS
from mtrl_vec.ranks import Ranks


class Minibatches:
    """The frames of a rollout, cut into minibatches in a new order for every epoch.

    By default the frames of all ranks are put into one order, so that minibatches do not depend on the number of
    ranks. With ``fixed_shapes``, which CUDA graphs need, every rank puts its own frames into the same order: each
    minibatch then has equally many frames of every rank, and frames and rows stay in the same memory.

    Within a minibatch frames are sorted by task, so that heads do not have to sort them.

    Args:
        config: of the run.
        generator: of random numbers for the orders, on the device of the frames. Its state has to be the same on all
            ranks.
        ranks: which learn together.
        fixed_shapes: see above.

    Attributes:
        frames: [N] what is learned from, `mtrl_vec.learn.loss.LEARNING_KEYS`.
        rows: [n] with ``fixed_shapes``: which of them are this rank's in the current minibatch.
        share: fraction of the current minibatch that this rank has.
    """

    def __init__(self, config: TrainConfig, generator: torch.Generator, ranks: Ranks, fixed_shapes: bool) -> None:
        self._config, self._generator, self._ranks, self._fixed_shapes = config, generator, ranks, fixed_shapes
        device = generator.device
        self.frames: TensorDictBase | None = None
        self.rows = torch.zeros(config.minibatch_size // ranks.size, dtype=torch.long, device=device)
        self.share = torch.full((), 1 / ranks.size, device=device)
        start = ranks.rank * len(self.rows)
        self._positions = torch.arange(
            start, start + len(self.rows), device=device
        )  # of the current frames among those of all ranks
        self._order = torch.empty(0, 0, dtype=torch.long, device=device)
        self._parts: list[tuple[Tensor, TensorDictBase]] = []
        """Without ``fixed_shapes``: positions and frames of each minibatch, cut at once. One by one is slower."""
        self._current: TensorDictBase | None = None

    def take(self, frames: TensorDictBase) -> None:
        """Learn from other frames [N] from now on."""
        if self.frames is None or not self._fixed_shapes:
            self.frames = frames.clone() if self._fixed_shapes else frames
            return
        for key, value in frames.items():
            self.frames[key].copy_(value)

    def shuffle(self) -> None:
        """Cut the frames into minibatches in a new order, for `choose`. Leftover frames are dropped."""
        frames, size, parts = (
            self._config.frames_per_batch,
            self._config.minibatch_size,
            self._config.learner.num_minibatches,
        )
        if self._fixed_shapes:
            frames, size = frames // self._ranks.size, size // self._ranks.size
        order = torch.randperm(frames, device=self._generator.device, generator=self._generator)
        self._order = order[: parts * size].view(parts, size)
        if not self._fixed_shapes:
            self._cut()

    def _cut(self) -> None:
        assert self.frames is not None
        own, order = self._ranks.part(self._config.frames_per_batch), self._order
        minibatch, position = ((order >= own.start) & (order < own.stop)).nonzero(as_tuple=True)
        rows = order[minibatch, position] - own.start
        by_task = torch.argsort(minibatch * self._config.num_tasks + self.frames["task_idx"][rows], stable=True)
        counts = torch.bincount(minibatch, minlength=len(order)).tolist()
        positions, frames = position[by_task].split(counts), self.frames[rows[by_task]].split(counts)
        self._parts = list(zip(positions, frames, strict=True))

    def choose(self, i: int) -> None:
        """Make the ``i``-th minibatch the current one."""
        assert self.frames is not None
        if self._fixed_shapes:
            rows = self._order[i]
            self.rows.copy_(rows[torch.argsort(self.frames["task_idx"][rows], stable=True)])
            return
        self._positions, self._current = self._parts[i]
        self.share.fill_(len(self._positions) / self._order.shape[1])
        if not len(self._positions):  # one frame that counts for nothing
            self._current = self.frames[:1]

    def current(self) -> TensorDictBase:
        """This rank's frames of the current minibatch, [n]."""
        assert self.frames is not None
        return self.frames[self.rows] if self._current is None else self._current

    def current_of_all_ranks(self) -> dict[str, Tensor]:
        """The frames of all ranks in the current minibatch."""
        positions = self._positions
        count = int(self._ranks.total(torch.tensor(len(positions), device=positions.device)))
        own, minibatch = self.current(), {}
        for key in LEARNING_KEYS:  # in the same order on all ranks
            minibatch[key] = own[key].new_zeros(count, *own[key].shape[1:])
            minibatch[key][positions] = own[key][: len(positions)]
            self._ranks.add(minibatch[key])
        return minibatch
