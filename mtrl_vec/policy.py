"""The shared policy: one torso for all tasks, and a head per task that each row is routed to.

Shapes: ``B`` rows, ``K`` tasks, ``D`` observation size, ``A`` action size.
"""

from __future__ import annotations

import math

import torch
from tensordict.nn import InteractionType, TensorDictModule
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

    All heads are evaluated for all rows, in one matrix product per layer, and each row gathers its own. No loop over
    tasks, no masks, nothing that waits for the device; a row gives the other tasks' heads exactly zero gradient.
    """

    def __init__(self, num_tasks: int, in_features: int, hidden: int, out_features: int, out_gain: float) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(num_tasks, in_features, hidden))
        self.bias1 = nn.Parameter(torch.zeros(num_tasks, hidden))
        self.weight2 = nn.Parameter(torch.empty(num_tasks, hidden, out_features))
        self.bias2 = nn.Parameter(torch.zeros(num_tasks, out_features))
        for k in range(num_tasks):
            nn.init.orthogonal_(self.weight1[k], math.sqrt(2))
            nn.init.orthogonal_(self.weight2[k], out_gain)

    def forward(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """features [B, in], task_idx [B] -> [B, out]."""
        hidden = nn.functional.gelu(routed_linear(features, self.weight1, self.bias1, task_idx))
        # In fp32 also under autocast: bf16 would round a value of 10 to the next 1/16.
        with torch.autocast(hidden.device.type, enabled=False):
            return routed_linear(hidden.float(), self.weight2, self.bias2, task_idx)


def routed_linear(x: Tensor, weight: Tensor, bias: Tensor, task_idx: Tensor) -> Tensor:
    """``x[b] @ weight[task_idx[b]] + bias[task_idx[b]]`` for every row ``b``.

    Shapes: [B, in], [K, in, out], [K, out], [B] -> [B, out].

    One wide product ``[B, in] @ [in, K * out]`` and a row gather take two thirds of the time of a product batched over
    tasks, forward and backward, on the CPU.
    """
    k, _, out = weight.shape
    everything = torch.addmm(bias.flatten(), x, weight.transpose(0, 1).flatten(1))
    row = torch.arange(len(x), device=x.device) * k + task_idx
    return everything.view(-1, out).index_select(0, row)


class InputFeatures(nn.Module):
    """What a torso sees: the normalised observation and the task one-hot."""

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        self.observation_norm = ObservationNorm(OBSERVATION_SIZE)
        self.normalize = normalize

    def forward(self, observation: Tensor, task_one_hot: Tensor) -> Tensor:
        """[..., D], [..., K] -> [rows, D + K]."""
        if self.normalize:
            observation = self.observation_norm(observation)
        return torch.cat([observation, task_one_hot], dim=-1).flatten(0, -2)


class Actor(nn.Module):
    """Mean and standard deviation of the actions; the latter is one parameter per task and dimension, up to a limit."""

    std_limit: Tensor

    def __init__(self, features: InputFeatures, torso: nn.Module, heads: TaskHeads, log_std: nn.Parameter) -> None:
        super().__init__()
        self.features, self.torso, self.heads, self.log_std = features, torso, heads, log_std
        self.register_buffer("std_limit", log_std.detach().exp().max())

    def std(self) -> Tensor:
        """Standard deviation per task and dimension, [K, A]."""
        return torch.minimum(self.log_std.exp(), self.std_limit)

    def forward(self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D], [..., K], [...] -> loc [..., A], scale [..., A], float32 also under autocast."""
        rows = task_idx.flatten()
        loc = self.heads(self.torso(self.features(observation, task_one_hot)), rows)
        scale = self.std().index_select(0, rows)
        shape = (*task_idx.shape, ACTION_SIZE)
        return loc.view(shape), scale.view(shape)


class Critic(nn.Module):
    """Expected discounted return of the scaled reward."""

    def __init__(self, features: InputFeatures, torso: nn.Module, heads: TaskHeads) -> None:
        super().__init__()
        self.features, self.torso, self.heads = features, torso, heads

    def forward(self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> Tensor:
        """[..., D], [..., K], [...] -> [..., 1], float32 also under autocast."""
        value = self.heads(self.torso(self.features(observation, task_one_hot)), task_idx.flatten())
        return value.view(*task_idx.shape, 1)


class SharedPolicy(nn.Module):
    """Actor and critic of all tasks, as TensorDict modules.

    ``actor`` is a `ProbabilisticActor` that adds ``loc``, ``scale``, ``action`` and ``action_log_prob``; ``critic``
    adds ``state_value``. Both read ``observation`` [..., D], ``task_one_hot`` [..., K] and ``task_idx`` [...].

    Actions are normal around ``loc``, unbounded; the simulator clips them. With ``shared_torso`` actor and critic
    differ only in their heads.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.num_tasks = k = len(config.tasks)
        width = config.torso[1]
        self.features = InputFeatures(config.normalize_observation)
        in_features = OBSERVATION_SIZE + k
        actor_torso = make_torso(in_features, config.torso)
        critic_torso = actor_torso if config.shared_torso else make_torso(in_features, config.torso)
        log_std = nn.Parameter(torch.full((k, ACTION_SIZE), math.log(config.init_std)), requires_grad=config.learn_std)
        # A small last layer starts the means near zero: the first rollouts explore instead of repeating a random habit.
        actor = Actor(self.features, actor_torso, TaskHeads(k, width, config.head, ACTION_SIZE, 0.01), log_std)
        critic = Critic(self.features, critic_torso, TaskHeads(k, width, config.head, 1, 1.0))
        inputs = ["observation", "task_one_hot", "task_idx"]
        self.actor = ProbabilisticActor(
            TensorDictModule(actor, in_keys=inputs, out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=IndependentNormal,
            distribution_kwargs={"validate_args": False},  # validation waits for the device
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        )
        self.critic = TensorDictModule(critic, in_keys=inputs, out_keys=["state_value"])

    @property
    def observation_norm(self) -> ObservationNorm:
        """The running observation statistics."""
        return self.features.observation_norm

    def action_std(self) -> Tensor:
        """Standard deviation of the actions per task and dimension, [K, A]."""
        return self.actor[0].module.std().detach()

    def limit_std(self, limit: float) -> None:
        """Keep the standard deviations at or below a value from now on."""
        self.actor[0].module.std_limit.fill_(limit)
