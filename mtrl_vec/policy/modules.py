"""Torso, actor heads and critic heads.

Shapes: ``B`` rows, ``K`` tasks, ``D`` observation size, ``H`` width of the torso's output, ``A`` action size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtrl_vec.config import PolicyConfig
from mtrl_vec.policy.features import InputFeatures
from mtrl_vec.policy.routing import TaskHeads, gathered_linear, rows_of, split_linear
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.tasks.layout import ObservationLayout


class AlignedLinear(nn.Linear):
    """A linear layer that on a GPU pads its inputs with zeros to a multiple of 8: 16 bytes in bf16, which fast products
    of matrices want of every row."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.padded(x) if x.device.type == "cuda" else super().forward(x)

    def padded(self, x: Tensor) -> Tensor:
        """The same with padding."""
        more = (0, -self.in_features % 8)
        return nn.functional.linear(nn.functional.pad(x, more), nn.functional.pad(self.weight, more), self.bias)


class Torso(nn.Module):
    """What the tasks share, and actor and critic too: input features, then Linear, LayerNorm, SiLU, Linear, SiLU.

    What the heads see of the features themselves is appended, see `InputFeatures`.
    """

    def __init__(self, config: PolicyConfig, num_tasks: int, layout: ObservationLayout) -> None:
        super().__init__()
        first, second = config.torso
        self.num_tasks = num_tasks
        self.features = InputFeatures(
            layout,
            num_tasks,
            relative=config.relative_features,
            normalize=config.normalize_observation,
            direct=config.direct_features,
        )
        self.layers = nn.Sequential(
            AlignedLinear(self.features.size + num_tasks, first),
            nn.LayerNorm(first),
            nn.SiLU(),
            nn.Linear(first, second),
            nn.SiLU(),
        )
        self.out_features = second + self.features.own_size
        """H."""

    def forward(self, observation: Tensor, task_one_hot: Tensor) -> Tensor:
        """[..., D], [..., K] -> [..., H]."""
        x, own = self.features(observation, task_one_hot)
        return self._beside(self.layers(x), own)

    def copies(self) -> list[Tensor]:
        """The parameters once per task, [K, ...] each in the order of `parameters`, for gradients of their own."""
        return [p.detach().repeat(self.num_tasks, *[1] * p.dim()).requires_grad_() for p in self.parameters()]

    def forward_by_task(
        self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor, copies: list[Tensor]
    ) -> Tensor:
        """`forward` through the `copies` of each row's own task: no product is larger, and gradients come by task.

        Shapes: [B, D], [B, K], [B] -> [B, H].
        """
        weight1, bias1, gain, offset, weight2, bias2 = copies
        x, own = self.features(observation, task_one_hot)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            order = torch.argsort(task_idx)
            rows: Tensor | list[int] = torch.bincount(task_idx, minlength=self.num_tasks).tolist()
            linear, x, task_idx = split_linear, x.index_select(0, order), task_idx.index_select(0, order)
        else:
            linear, rows = gathered_linear, task_idx  # type: ignore[assignment]
            more = (0, -x.shape[-1] % 8)  # see `AlignedLinear`
            x, weight1 = nn.functional.pad(x, more), nn.functional.pad(weight1, more)
        x = linear(x, weight1.transpose(1, 2), bias1, rows)  # type: ignore[arg-type]
        x = nn.functional.layer_norm(x, x.shape[-1:])
        x = nn.functional.silu(x * rows_of(gain, task_idx) + rows_of(offset, task_idx))
        x = nn.functional.silu(linear(x, weight2.transpose(1, 2), bias2, rows))  # type: ignore[arg-type]
        x = x if linear is gathered_linear else x.index_select(0, torch.argsort(order))
        return self._beside(x, own)

    def _beside(self, hidden: Tensor, own: Tensor) -> Tensor:
        """Both in one, in the precision of the first: under autocast the heads would round the second anyway."""
        return torch.cat([hidden, own.to(hidden.dtype)], dim=-1) if self.features.direct else hidden


class ActorHeads(nn.Module):
    """Mean and standard deviation of the actions; the latter is one parameter per task and dimension, within bounds.

    The bounds are kept by projection: `project_std` clamps the parameter after each optimiser step. A limit inside of
    `std` would have no gradient beyond it, and training starts on the limit: what the first step had moved beyond it
    would never learn again.

    Attributes:
        std_limit: upper bound.
        std_floor: lower bound per task as a fraction of the limit, [K].
    """

    std_limit: Tensor
    std_floor: Tensor

    def __init__(self, config: PolicyConfig, num_tasks: int, in_features: int, action_size: int) -> None:
        super().__init__()
        # A small last layer starts the means near zero: the first rollouts explore instead of repeating a random habit.
        self.heads = TaskHeads(num_tasks, in_features, config.head_width(num_tasks), action_size, 0.01)
        log_std = torch.full((num_tasks, action_size), math.log(config.init_std))
        self.bounded_mean, self.learn_std = config.bounded_mean, config.learn_std
        self.log_std = nn.Parameter(log_std, requires_grad=config.learn_std)
        self.register_buffer("std_limit", torch.tensor(config.init_std))
        self.register_buffer("std_floor", torch.zeros(num_tasks), persistent=False)  # set anew in each iteration

    def std(self) -> Tensor:
        """Standard deviation per task and dimension, [K, A]."""
        return self.log_std.exp()

    @torch.no_grad()
    def project_std(self) -> None:
        """Clamp standard deviations to their bounds, or set them to the limit if they do not learn: in place, without
        waiting."""
        limit = self.std_limit.log()
        within = self.log_std.clamp(limit + self.std_floor.log()[:, None], limit)
        self.log_std.copy_(within if self.learn_std else limit.expand_as(self.log_std))

    def forward(self, hidden: Tensor, task_idx: Tensor) -> tuple[Tensor, Tensor]:
        """[..., H], [...] -> loc [..., A], scale [..., A], float32 also under autocast."""
        rows = task_idx.flatten()
        loc = self.heads(hidden.flatten(0, -2), rows)
        if self.bounded_mean:
            loc = loc.tanh()
        scale = rows_of(self.std(), rows)
        shape = (*task_idx.shape, loc.shape[-1])
        return loc.view(shape), scale.view(shape)


class CriticHeads(nn.Module):
    """Expected discounted return of the scaled reward.

    With ``popart`` (Preserving Outputs Precisely, while Adaptively Rescaling Targets; van Hasselt et al. 2016, per task
    as in Hessel et al. 2018) the heads have to tell normalised values, and their outputs are scaled back.
    """

    value_mean: Tensor
    value_std: Tensor
    updates: Tensor

    STD_FLOOR = 1e-2

    def __init__(self, config: PolicyConfig, num_tasks: int, in_features: int) -> None:
        super().__init__()
        self.popart = config.popart
        self.heads = TaskHeads(num_tasks, in_features, config.head_width(num_tasks), 1, 1.0)
        if self.popart:
            self.register_buffer("value_mean", torch.zeros(num_tasks))
            self.register_buffer("value_std", torch.ones(num_tasks))
            self.register_buffer("updates", torch.zeros(num_tasks))

    def forward(self, hidden: Tensor, task_idx: Tensor) -> Tensor:
        """[..., H], [...] -> [..., 1], float32 also under autocast."""
        rows = task_idx.flatten()
        value = self.heads(hidden.flatten(0, -2), rows)
        if self.popart:
            value = (
                value * self.value_std.index_select(0, rows)[:, None] + self.value_mean.index_select(0, rows)[:, None]
            )
        return value.view(*task_idx.shape, 1)

    @torch.no_grad()
    def adapt(self, target: Tensor, task_one_hot: Tensor, rate: float, ranks: Ranks = ALONE) -> None:
        """Take in the targets of a rollout, [N, 1] and [N, K], and change the last layer so that no output changes.

        Args:
            target: what values should be.
            task_one_hot: of which task; one without frames stays as it is.
            rate: of the exponential averages. The first rollout of a task counts as a whole.
            ranks: with a part of the rollout each.
        """
        sums = [torch.where(task_one_hot > 0, power, 0.0).sum(0) for power in (target, target**2)]
        count, first, second = ranks.total(torch.stack([task_one_hot.sum(0), *sums]))
        mean, square = first / count.clamp(min=1), second / count.clamp(min=1)
        fine = (count > 0) & (mean + square).isfinite()
        rate_now = torch.where(self.updates > 0, rate, 1.0)
        new_mean = torch.lerp(self.value_mean, mean, rate_now)
        new_square = torch.lerp(self.value_std**2 + self.value_mean**2, square, rate_now)
        new_std = (new_square - new_mean**2).clamp(min=self.STD_FLOOR**2).sqrt()
        new_mean, new_std = torch.where(fine, new_mean, self.value_mean), torch.where(fine, new_std, self.value_std)
        self.heads.weight2.mul_((self.value_std / new_std)[:, None, None])
        self.heads.bias2.mul_(self.value_std[:, None]).add_((self.value_mean - new_mean)[:, None])
        self.heads.bias2.div_(new_std[:, None])
        self.value_mean.copy_(new_mean)
        self.value_std.copy_(new_std)
        self.updates.add_(fine)
