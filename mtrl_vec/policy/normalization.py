"""Running statistics, kept in module buffers so that they travel with the policy and its checkpoints.

A batch with a number that is not finite leaves them unchanged: it spoils one update, and must not spoil all that
follow.

They change only between a whole update and the next rollout (`update`), never inside: the policy that collected a
rollout and the one that learns from it must see the same inputs.

Shapes: ``D`` observation size.
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
    """``(x - mean) / std`` with running moments over all observations seen, clipped to ±10."""

    mean: Tensor
    var: Tensor
    count: Tensor

    VARIANCE_FLOOR = 1e-6  # a millimetre of standard deviation: what does not move must not be blown up into noise

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return ((x - self.mean) * torch.rsqrt(self.var + self.VARIANCE_FLOOR)).clamp(-10, 10)

    @torch.no_grad()
    def update(self, x: Tensor, ranks: Ranks = ALONE) -> None:
        """Add the observations of all ranks to the running moments, of any batch shape [..., D]."""
        x = x.reshape(-1, x.shape[-1])
        var, mean = torch.var_mean(x, dim=0, correction=0)
        count = torch.where((mean + var).isfinite().all(), len(x), 0.0).expand_as(mean)
        for moments in ranks.each(torch.stack([mean, var, count])):
            merge_moments(self, moments[0], moments[1], moments[2, 0])


def merge_moments(moments: Moments, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Merge the moments of ``count`` more samples into the running ones (Chan, Golub, LeVeque 1979)."""
    total = moments.count + count
    share = count / total.clamp(min=1)
    gap = torch.where(count > 0, mean - moments.mean, 0.0)
    spread = torch.where(count > 0, var, 0.0)
    moments.var.copy_(moments.var * (1 - share) + spread * share + gap**2 * share * (1 - share))
    moments.mean.add_(gap * share)
    moments.count.copy_(total)
