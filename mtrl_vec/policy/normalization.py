"""Running statistics, kept in module buffers so that they travel with the policy and its checkpoints.

A batch with a number that is not finite leaves them unchanged: it spoils one update, and must not spoil all that
follow.

They change only between a whole update and the next rollout (`update`), never inside: the policy that collected a
rollout and the one that learns from it must see the same inputs.

Shapes: ``D`` size of an observation, ``G`` groups.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mtrl_vec.ranks import ALONE, Ranks


class Moments(Protocol):
    """Something with running moments in its buffers."""

    mean: Tensor
    var: Tensor
    count: Tensor


class ObservationNorm(nn.Module):
    """``(x - mean) / std`` with running moments, clipped to ±10; of all rows together, or of each group of rows.

    In each group a standard deviation is at least a fifth of the root mean square of those of all groups: what one task
    has not moved yet must not be blown up.

    Args:
        size: ``D``.
        num_groups: ``G``.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    VARIANCE_FLOOR = 1e-6  # a millimetre of standard deviation: what does not move must not be blown up into noise
    LEAST_OF_ALL = 0.2

    def __init__(self, size: int, num_groups: int = 1) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_groups, size))
        self.register_buffer("var", torch.ones(num_groups, size))
        self.register_buffer("count", torch.zeros(num_groups, 1))

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """[..., D], and of which group each row is, [...] -> [..., D]. Without ``group`` there is one only."""
        if group is None:
            return ((x - self.mean[0]) * torch.rsqrt(self.var[0] + self.VARIANCE_FLOOR)).clamp(-10, 10)
        seen = self.count > 0
        of_all = torch.where(seen, self.var, 0.0).sum(0) / seen.sum().clamp(min=1)
        rate = torch.rsqrt(torch.maximum(self.var, self.LEAST_OF_ALL**2 * of_all) + self.VARIANCE_FLOOR)
        mean, rate = (moment.index_select(0, group.flatten()).view(x.shape) for moment in (self.mean, rate))
        return ((x - mean) * rate).clamp(-10, 10)

    @torch.no_grad()
    def update(self, x: Tensor, one_hot: Tensor | None = None, ranks: Ranks = ALONE) -> None:
        """Add the observations of all ranks to the running moments, [..., D], each to those of its group, [..., G]."""
        x = x.reshape(-1, x.shape[-1])
        if one_hot is None:
            var, mean = torch.var_mean(x, dim=0, keepdim=True, correction=0)
            count = torch.full_like(self.count, len(x))
        else:
            mean, var, count = _moments_by_group(x, one_hot.reshape(-1, one_hot.shape[-1]))
        count = torch.where((mean + var).isfinite().all(), count, 0.0).expand_as(mean)
        for moments in ranks.each(torch.stack([mean, var, count])):
            merge_moments(self, moments[0], moments[1], moments[2, :, :1])


def _moments_by_group(x: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, D], [N, G] -> mean and variance of each group [G, D], and how many rows it has [G, 1]."""
    count = one_hot.sum(0)[:, None]
    share = one_hot.T / count.clamp(min=1)
    mean = share @ x
    mean = mean + share @ (x - one_hot @ mean)  # a sum of many rows in one product is off by tens of roundings
    return mean, share @ (x - one_hot @ mean) ** 2, count


def merge_moments(moments: Moments, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Merge the moments of ``count`` more samples into the running ones (Chan, Golub, LeVeque 1979)."""
    total = moments.count + count
    share = count / total.clamp(min=1)
    gap = torch.where(count > 0, mean - moments.mean, 0.0)
    spread = torch.where(count > 0, var, 0.0)
    moments.var.copy_(moments.var * (1 - share) + spread * share + gap**2 * share * (1 - share))
    moments.mean.add_(gap * share)
    moments.count.copy_(total)
