"""The shared policy: one torso for all tasks, and a head per task that each row is routed to.

Shapes: ``B`` rows, ``K`` tasks, ``D`` observation size, ``A`` action size.
"""

from __future__ import annotations

import math

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor

from mtrl_vec.config import TrainConfig
from mtrl_vec.normalization import ObservationNorm
from mtrl_vec.sim import ACTION_SIZE, OBSERVATION_SIZE


def make_torso(in_features: int, widths: tuple[int, int]) -> nn.Sequential:
    """Linear, LayerNorm, GELU, Linear, GELU."""
    first, second = widths
    return nn.Sequential(
        nn.Linear(in_features, first), nn.LayerNorm(first), nn.GELU(), nn.Linear(first, second), nn.GELU()
    )


class TaskHeads(nn.Module):
    """``K`` two-layer perceptrons in stacked weights ``[K, in, out]``; every row gets the output of its own task's.

    All heads are evaluated for all rows in one batched matrix product per layer, and each row gathers its own. No loop
    over tasks, no masks, nothing that waits for the device; the other heads receive exactly zero gradient from the row.
    """

    def __init__(self, num_tasks: int, in_features: int, hidden: int, out_features: int, out_gain: float) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(num_tasks, in_features, hidden))
        self.bias1 = nn.Parameter(torch.zeros(num_tasks, 1, hidden))
        self.weight2 = nn.Parameter(torch.empty(num_tasks, hidden, out_features))
        self.bias2 = nn.Parameter(torch.zeros(num_tasks, 1, out_features))
        for k in range(num_tasks):
            nn.init.orthogonal_(self.weight1[k], math.sqrt(2))
            nn.init.orthogonal_(self.weight2[k], out_gain)

    def forward(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """features [B, in], task_idx [B] -> [B, out]."""
        hidden = route(torch.matmul(features, self.weight1) + self.bias1, task_idx)
        hidden = nn.functional.gelu(hidden)
        return route(torch.matmul(hidden, self.weight2) + self.bias2, task_idx)


def route(stacked: Tensor, task_idx: Tensor) -> Tensor:
    """Row ``b`` of the output is row ``b`` of what head ``task_idx[b]`` computed: [K, B, F], [B] -> [B, F]."""
    index = task_idx[None, :, None].expand(1, -1, stacked.shape[-1])
    return stacked.gather(0, index).squeeze(0)


class SharedPolicy(nn.Module):
    """Actor and critic of all tasks: normalised observation and task one-hot, torso, task heads.

    Action means and values come from the heads, the standard deviation is one per task and action dimension.

    Use ``actor`` (a `ProbabilisticActor`) and ``critic`` (a `TensorDictModule`) on TensorDicts that carry
    ``observation`` [..., D], ``task_one_hot`` [..., K] and ``task_idx`` [...].
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        k = len(config.tasks)
        self.normalize = config.normalize_observation
        self.observation_norm = ObservationNorm(OBSERVATION_SIZE)
        self.actor_torso = make_torso(OBSERVATION_SIZE + k, config.torso)
        critic_torso = self.actor_torso if config.shared_torso else make_torso(OBSERVATION_SIZE + k, config.torso)
        self.critic_torso = critic_torso
        # A small last layer starts the means near zero: the first rollouts are then exploration, not random habit.
        self.actor_heads = TaskHeads(k, config.torso[1], config.head, ACTION_SIZE, out_gain=0.01)
        self.critic_heads = TaskHeads(k, config.torso[1], config.head, 1, out_gain=1.0)
        log_std = torch.full((k, ACTION_SIZE), math.log(config.init_std))
        self.log_std = nn.Parameter(log_std, requires_grad=config.learn_std)

    def features(self, observation: Tensor, task_one_hot: Tensor) -> Tensor:
        """[..., D], [..., K] -> [..., D + K], the torsos' input."""
        if self.normalize:
            observation = self.observation_norm(observation)
        return torch.cat([observation, task_one_hot], dim=-1)

    def action_parameters(self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the actions, each [..., A], float32."""
        rows = task_idx.reshape(-1)
        hidden = self.actor_torso(self.features(observation, task_one_hot))
        loc = self.actor_heads(hidden.reshape(-1, hidden.shape[-1]), rows).float()
        std = self.log_std.exp()[rows]
        shape = (*task_idx.shape, ACTION_SIZE)
        return loc.reshape(shape), std.reshape(shape)

    def state_value(self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> Tensor:
        """Value in units of the scaled reward, [..., 1], float32."""
        hidden = self.critic_torso(self.features(observation, task_one_hot))
        value = self.critic_heads(hidden.reshape(-1, hidden.shape[-1]), task_idx.reshape(-1)).float()
        return value.reshape(*task_idx.shape, 1)
