"""Scaling rewards, task by task.

Shapes: ``B`` environments, ``T`` steps, ``K`` tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrl_vec.policy.normalization import merge_moments
from mtrl_vec.ranks import ALONE, Ranks


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
    def update(self, reward: Tensor, done: Tensor, task_one_hot: Tensor, ranks: Ranks = ALONE) -> None:
        """Add the rollouts of all ranks to the running statistics: [B, T], [B, T] and [B, T, K] each."""
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
        for moments in ranks.each(torch.stack([mean, var, count * (mean + var).isfinite()])):
            merge_moments(self, *moments)

    def forward(self, reward: Tensor, task_one_hot: Tensor) -> Tensor:
        """Scale rewards [..., 1] by their tasks [..., K]."""
        return reward * (task_one_hot * torch.rsqrt(self.var + 1e-8)).sum(-1, keepdim=True)
