"""Running statistics, kept in module buffers so that they travel with the policy and its checkpoints.

A number that is not finite leaves them as they are: it spoils one update, and must not spoil all that follow.

They change only between a whole update and the next rollout (`update`), never inside: the policy that collected a
rollout and the one that learns from it must see the same inputs.

Shapes: ``B`` environments, ``T`` steps, ``K`` tasks, ``D`` observation size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    def update(self, x: Tensor) -> None:
        """Take in observations of any batch shape, [..., D]."""
        x = x.reshape(-1, x.shape[-1])
        var, mean = torch.var_mean(x, dim=0, correction=0)
        _merge(self, mean, var, torch.where((mean + var).isfinite().all(), len(x), 0.0))


def _merge(moments: ObservationNorm | RewardScale, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Merge the moments of ``count`` more samples into the running ones (Chan, Golub, LeVeque 1979)."""
    total = moments.count + count
    share = count / total.clamp(min=1)
    gap = torch.where(count > 0, mean - moments.mean, 0.0)
    spread = torch.where(count > 0, var, 0.0)
    moments.var.copy_(moments.var * (1 - share) + spread * share + gap**2 * share * (1 - share))
    moments.mean.add_(gap * share)
    moments.count.copy_(total)


class RewardScale(nn.Module):
    """Divide each task's reward by the running standard deviation of its discounted return.

    The per-task form of what ``gymnasium.wrappers.NormalizeReward`` does: tasks whose returns differ by orders of
    magnitude then weigh alike in a shared network. Rewards are scaled, not shifted.
    """

    returns: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, num_envs: int, num_tasks: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("returns", torch.zeros(num_envs))  # discounted, of the episodes under way
        self.register_buffer("mean", torch.zeros(num_tasks))
        self.register_buffer("var", torch.ones(num_tasks))
        self.register_buffer("count", torch.zeros(num_tasks))

    @torch.no_grad()
    def update(self, reward: Tensor, done: Tensor, task_one_hot: Tensor) -> None:
        """Take in a rollout: reward [B, T], done [B, T], task_one_hot [B, T, K]."""
        returns = torch.empty_like(reward)
        running = self.returns
        for t in range(reward.shape[1]):
            running = running * self.gamma + reward[:, t]
            returns[:, t] = running
            running = running * ~done[:, t]
        self.returns.copy_(running.nan_to_num(0.0, 0.0, 0.0))

        weight = task_one_hot.flatten(0, 1)  # [B T, K]
        x = returns.flatten()[:, None]
        count = weight.sum(0)
        mean = torch.where(weight > 0, x, 0.0).sum(0) / count.clamp(min=1)
        var = torch.where(weight > 0, (x - mean) ** 2, 0.0).sum(0) / count.clamp(min=1)
        _merge(self, mean, var, count * (mean + var).isfinite())

    def forward(self, reward: Tensor, task_one_hot: Tensor) -> Tensor:
        """Scale rewards [..., 1] by their tasks [..., K]."""
        return reward * (task_one_hot * torch.rsqrt(self.var + 1e-8)).sum(-1, keepdim=True)
