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

    Args:
        config: of the run.
        generator: of the orders, on the device of the frames; in the same state on all ranks.
        ranks: which learn together.
        fixed_shapes: see above.

    Attributes:
        frames: [N] what is learned from, `mtrl_vec.learn.loss.LEARNING_KEYS`.
        rows: [n] which of them are this rank's in the next minibatch.
        share: fraction of the minibatch that these are.
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
        )  # of `rows` among those of all ranks

    def take(self, frames: TensorDictBase) -> None:
        """Learn from other frames [N] from now on."""
        if self.frames is None or not self._fixed_shapes:
            self.frames = frames.clone() if self._fixed_shapes else frames
            return
        for key, value in frames.items():
            self.frames[key].copy_(value)

    def epoch(self) -> Tensor:
        """A new order of the frames, a minibatch in each row, for `choose`. Leftover frames are dropped."""
        frames, size, parts = (
            self._config.frames_per_batch,
            self._config.minibatch_size,
            self._config.learner.num_minibatches,
        )
        if self._fixed_shapes:
            frames, size = frames // self._ranks.size, size // self._ranks.size
        order = torch.randperm(frames, device=self._generator.device, generator=self._generator)
        return order[: parts * size].view(parts, size)

    def choose(self, chosen: Tensor) -> None:
        """Make a row of `epoch` the next minibatch."""
        if self._fixed_shapes:
            self.rows.copy_(chosen[self._by_task(chosen)])
            return
        own = self._ranks.part(self._config.frames_per_batch)
        mine = ((chosen >= own.start) & (chosen < own.stop)).nonzero().flatten()
        self._positions = mine[self._by_task(chosen[mine] - own.start)]
        self.rows = chosen[self._positions] - own.start
        self.share.fill_(len(self.rows) / len(chosen))
        if not len(self.rows):  # one that counts for nothing
            self.rows = torch.zeros(1, dtype=torch.long)

    def _by_task(self, rows: Tensor) -> Tensor:
        """An order of rows in which those of a task are next to each other: heads then need not bring them there."""
        assert self.frames is not None
        return torch.argsort(self.frames["task_idx"][rows], stable=True)

    def current(self) -> TensorDictBase:
        """This rank's frames of the next minibatch, [n]."""
        assert self.frames is not None
        return self.frames[self.rows]

    def current_of_all_ranks(self) -> dict[str, Tensor]:
        """The frames of all ranks in the next minibatch."""
        positions = self._positions
        count = int(self._ranks.total(torch.tensor(len(positions), device=positions.device)))
        own, minibatch = self.current(), {}
        for key in LEARNING_KEYS:  # in the same order on all ranks
            minibatch[key] = own[key].new_zeros(count, *own[key].shape[1:])
            minibatch[key][positions] = own[key][: len(positions)]
            self._ranks.add(minibatch[key])
        return minibatch
