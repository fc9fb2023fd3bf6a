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
    """Linear, LayerNorm, SiLU, Linear, SiLU."""
    first, second = widths
    return nn.Sequential(
        nn.Linear(in_features, first), nn.LayerNorm(first), nn.SiLU(), nn.Linear(first, second), nn.SiLU()
    )


class TaskHeads(nn.Module):
    """``K`` two-layer perceptrons in stacked weights ``[K, in, out]``; every row gets the output of its own task's.

    On the CPU rows are sorted by task, and each head does its own share. On a GPU the sizes of the shares would have to
    be waited for; there, and in compiled code, all heads are evaluated for all rows in one product per layer, and each
    row gathers its own. Either way a row gives the other tasks' heads exactly zero gradient.
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
        if features.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.grouped(features, task_idx)
        return self.gathered(features, task_idx)

    def grouped(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """`forward`, one head after the other on its own rows."""
        order = torch.argsort(task_idx)
        counts = torch.bincount(task_idx, minlength=len(self.weight1)).tolist()
        rows = features.index_select(0, order)
        hidden = nn.functional.silu(grouped_linear(rows, self.weight1, self.bias1, counts))
        return grouped_linear(hidden, self.weight2, self.bias2, counts).index_select(0, torch.argsort(order))

    def gathered(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """`forward`, all heads on all rows; nothing in it waits for the device."""
        hidden = nn.functional.silu(gathered_linear(features, self.weight1, self.bias1, task_idx))
        # In fp32 also under autocast: bf16 would round a value of 10 to the next 1/16.
        with torch.autocast(hidden.device.type, enabled=False):
            return gathered_linear(hidden.float(), self.weight2, self.bias2, task_idx)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
    """The first ``counts[0]`` rows times ``weight[0]``, the next ``counts[1]`` times ``weight[1]``, and so on.

    Shapes: [B, in], [K, in, out], [K, out] -> [B, out].
    """
    products = zip(x.split(counts), weight, bias, strict=True)
    return torch.cat([torch.addmm(b, rows, w) for rows, w, b in products])


def gathered_linear(x: Tensor, weight: Tensor, bias: Tensor, task_idx: Tensor) -> Tensor:
    """``x[b] @ weight[task_idx[b]] + bias[task_idx[b]]`` for every row ``b``: a wide product, then a row gather.

    Shapes: [B, in], [K, in, out], [K, out], [B] -> [B, out].
    """
    k, _, out = weight.shape
    everything = torch.addmm(bias.flatten(), x, weight.transpose(0, 1).flatten(1))
    row = torch.arange(len(x), device=x.device) * k + task_idx
    return everything.view(-1, out).index_select(0, row)


RELATIVE_SIZE = 34


def relative_features(observation: Tensor) -> Tensor:
    """Meta-World's observation [..., 39] as what the tasks are about, [..., 34].

    The hand, its opening, the object's position and rotation; how each of them moved in the last step; the goal; and
    the ways from hand to object, from object to goal and from hand to goal. All linear in the observation, so a network
    could work them out by itself. But a grasp is a matter of a centimetre and a motion one of millimetres, in positions
    that vary by decimetres: only once normalised on their own are they large enough to learn from early.

    Left out are the previous frame, which the motion replaces, and the frame's padding.
    """
    frame, previous, goal = observation[..., :11], observation[..., 18:29], observation[..., 36:39]
    hand, obj = observation[..., :3], observation[..., 4:7]
    return torch.cat([frame, frame - previous, goal, obj - hand, goal - obj, goal - hand], dim=-1)


class InputFeatures(nn.Module):
    """What a torso sees: the observation, relative and normalised as the settings say, and the task one-hot."""

    def __init__(self, relative: bool, normalize: bool) -> None:
        super().__init__()
        self.relative, self.normalize = relative, normalize
        self.size = RELATIVE_SIZE if relative else OBSERVATION_SIZE
        self.observation_norm = ObservationNorm(self.size)

    def update(self, observation: Tensor) -> None:
        """Take observations [..., D] into the running statistics."""
        if self.normalize:
            self.observation_norm.update(relative_features(observation) if self.relative else observation)

    def forward(self, observation: Tensor, task_one_hot: Tensor) -> Tensor:
        """[..., D], [..., K] -> [rows, size + K]."""
        features = relative_features(observation) if self.relative else observation
        if self.normalize:
            features = self.observation_norm(features)
        return torch.cat([features, task_one_hot], dim=-1).flatten(0, -2)


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
        self.features = InputFeatures(config.relative_inputs, config.normalize_observation)
        in_features = self.features.size + k
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

    def action_std(self) -> Tensor:
        """Standard deviation of the actions per task and dimension, [K, A]."""
        return self.actor[0].module.std().detach()

    def limit_std(self, limit: float) -> None:
        """Keep the standard deviations at or below a value from now on."""
        self.actor[0].module.std_limit.fill_(limit)
