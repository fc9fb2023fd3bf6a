"""The shared policy: one torso for all tasks, and a head per task that each row is routed to.

Shapes: ``B`` rows, ``K`` tasks, ``D`` observation size, ``H`` width of the torso's output, ``A`` action size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from tensordict.nn import InteractionType, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor

from mtrl_vec.config import TrainConfig
from mtrl_vec.normalization import ObservationNorm
from mtrl_vec.sim import ACTION_SIZE, OBSERVATION_SIZE

MANY_TASKS = 8
"""From this number on a GPU sorts rows by task instead of computing all heads for all of them: see `TaskHeads`."""


class TaskHeads(nn.Module):
    """``K`` two-layer perceptrons in stacked weights ``[K, in, out]``; every row gets the output of its own task's.

    There are several ways to the same result, which ``benchmarks/routing.py`` compares; `forward` takes the fastest in
    the precision at hand (on a GPU: by reckoning, not yet by measuring). In all of them a row gives the other tasks'
    heads exactly zero gradient.
    """

    def __init__(self, num_tasks: int, in_features: int, hidden: int, out_features: int, out_gain: float) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(num_tasks, in_features, hidden))
        self.bias1 = nn.Parameter(torch.zeros(num_tasks, hidden))
        self.weight2 = nn.Parameter(torch.empty(num_tasks, hidden, out_features))
        self.bias2 = nn.Parameter(torch.zeros(num_tasks, out_features))
        aligned = in_features % 8 == 0 and hidden % 8 == 0  # rows of 16 bytes, as grouped products want them
        self._sort_on_gpu = num_tasks >= MANY_TASKS and aligned
        for k in range(num_tasks):
            nn.init.orthogonal_(self.weight1[k], math.sqrt(2))
            nn.init.orthogonal_(self.weight2[k], out_gain)

    def forward(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """features [B, in], task_idx [B] -> [B, out]."""
        if features.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.split(features, task_idx)
        if features.device.type == "cuda" and features.dtype == torch.bfloat16 and self._sort_on_gpu:
            return self.grouped(features, task_idx)
        return self.gathered(features, task_idx)

    def split(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """Rows sorted by task, each head on its own; to learn the sizes one would have to wait for a GPU."""
        order = torch.argsort(task_idx)
        counts = torch.bincount(task_idx, minlength=len(self.weight1)).tolist()
        rows = features.index_select(0, order)
        hidden = nn.functional.silu(split_linear(rows, self.weight1, self.bias1, counts))
        return self._output(hidden, split_linear, counts).index_select(0, torch.argsort(order))

    def gathered(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """All heads on all rows, of which each row gathers its own."""
        hidden = nn.functional.silu(gathered_linear(features, self.weight1, self.bias1, task_idx))
        return self._output(hidden, gathered_linear, task_idx)

    def grouped(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """Rows sorted by task, all heads in one grouped product, which takes the sizes from the device: in bf16."""
        order = torch.argsort(task_idx)
        sorted_idx = task_idx.index_select(0, order)
        tasks = torch.arange(len(self.weight1), device=task_idx.device)
        ends = torch.searchsorted(sorted_idx, tasks, right=True).int()
        rows, weight = features.index_select(0, order).bfloat16(), self.weight1.bfloat16()
        product = nn.functional.grouped_mm(rows, weight, offs=ends)
        hidden = nn.functional.silu(product + self.bias1.bfloat16().index_select(0, sorted_idx))
        return self._output(hidden, gathered_linear, sorted_idx).index_select(0, torch.argsort(order))

    def _output(self, hidden: Tensor, linear: Callable[..., Tensor], rows: Tensor | list[int]) -> Tensor:
        # In fp32 also under autocast: bf16 would round a value of 10 to the next 1/16.
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float(), self.weight2, self.bias2, rows)


def split_linear(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
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
    """What the torso sees: the observation, relative and normalised as the settings say, and the task one-hot."""

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
        """[..., D], [..., K] -> [..., size + K]."""
        features = relative_features(observation) if self.relative else observation
        if self.normalize:
            features = self.observation_norm(features)
        return torch.cat([features, task_one_hot], dim=-1)


class Torso(nn.Module):
    """What the tasks share, and actor and critic too: input features, then Linear, LayerNorm, SiLU, Linear, SiLU."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        first, second = config.torso
        self.num_tasks = len(config.tasks)
        self.features = InputFeatures(config.relative_inputs, config.normalize_observation)
        self.layers = nn.Sequential(
            nn.Linear(self.features.size + len(config.tasks), first),
            nn.LayerNorm(first),
            nn.SiLU(),
            nn.Linear(first, second),
            nn.SiLU(),
        )

    def forward(self, observation: Tensor, task_one_hot: Tensor) -> Tensor:
        """[..., D], [..., K] -> [..., H]."""
        return self.layers(self.features(observation, task_one_hot))

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
        x = self.features(observation, task_one_hot)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            order = torch.argsort(task_idx)
            rows: Tensor | list[int] = torch.bincount(task_idx, minlength=self.num_tasks).tolist()
            linear, x, task_idx = split_linear, x.index_select(0, order), task_idx.index_select(0, order)
        else:
            linear, rows = gathered_linear, task_idx  # type: ignore[assignment]
        x = linear(x, weight1.transpose(1, 2), bias1, rows)  # type: ignore[arg-type]
        x = nn.functional.layer_norm(x, x.shape[-1:])
        x = nn.functional.silu(x * gain.index_select(0, task_idx) + offset.index_select(0, task_idx))
        x = nn.functional.silu(linear(x, weight2.transpose(1, 2), bias2, rows))  # type: ignore[arg-type]
        return x if linear is gathered_linear else x.index_select(0, torch.argsort(order))


class ActorHeads(nn.Module):
    """Mean and standard deviation of the actions; the latter is one parameter per task and dimension, up to a limit."""

    std_limit: Tensor

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        k = len(config.tasks)
        # A small last layer starts the means near zero: the first rollouts explore instead of repeating a random habit.
        self.heads = TaskHeads(k, config.torso[1], config.head, ACTION_SIZE, 0.01)
        log_std = torch.full((k, ACTION_SIZE), math.log(config.init_std))
        self.log_std = nn.Parameter(log_std, requires_grad=config.learn_std)
        self.register_buffer("std_limit", torch.tensor(config.init_std))

    def std(self) -> Tensor:
        """Standard deviation per task and dimension, [K, A]."""
        return torch.minimum(self.log_std.exp(), self.std_limit)

    def forward(self, hidden: Tensor, task_idx: Tensor) -> tuple[Tensor, Tensor]:
        """[..., H], [...] -> loc [..., A], scale [..., A], float32 also under autocast."""
        rows = task_idx.flatten()
        loc = self.heads(hidden.flatten(0, -2), rows)
        scale = self.std().index_select(0, rows)
        shape = (*task_idx.shape, ACTION_SIZE)
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

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        k = len(config.tasks)
        self.popart = config.popart
        self.heads = TaskHeads(k, config.torso[1], config.head, 1, 1.0)
        if self.popart:
            self.register_buffer("value_mean", torch.zeros(k))
            self.register_buffer("value_std", torch.ones(k))
            self.register_buffer("updates", torch.zeros(k))

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
    def adapt(self, target: Tensor, task_one_hot: Tensor, rate: float) -> None:
        """Take in the targets of a rollout, [N, 1] and [N, K], and change the last layer so that no output changes.

        Args:
            target: what values should be.
            task_one_hot: of which task; one without frames stays as it is.
            rate: of the exponential averages. The first rollout of a task counts as a whole.
        """
        count = task_one_hot.sum(0)
        mean = torch.where(task_one_hot > 0, target, 0.0).sum(0) / count.clamp(min=1)
        square = torch.where(task_one_hot > 0, target**2, 0.0).sum(0) / count.clamp(min=1)
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


class SharedPolicy(nn.Module):
    """Actor and critic of all tasks: one torso, and heads per task for either, as TensorDict modules.

    `torso` turns ``observation`` [..., D] and ``task_one_hot`` [..., K] into ``hidden`` [..., H]; from that and
    ``task_idx`` [...], `actor_heads` adds ``loc``, ``scale``, ``action`` and ``action_log_prob``, and `critic_heads`
    ``state_value``. Either reads the same ``hidden``, which an update therefore computes once.

    Actions are normal around ``loc``, unbounded; the simulator clips them.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.num_tasks = len(config.tasks)
        self.torso = TensorDictModule(Torso(config), in_keys=["observation", "task_one_hot"], out_keys=["hidden"])
        self.actor_heads = ProbabilisticActor(
            TensorDictModule(ActorHeads(config), in_keys=["hidden", "task_idx"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=IndependentNormal,
            distribution_kwargs={"validate_args": False},  # validation waits for the device
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        )
        self.critic_heads = TensorDictModule(
            CriticHeads(config), in_keys=["hidden", "task_idx"], out_keys=["state_value"]
        )

    @property
    def actor(self) -> ProbabilisticTensorDictSequential:
        """Torso and actor heads in one, for acting: an action sampled or the mean, by torchrl's exploration type."""
        modules = self.torso, *self.actor_heads
        return ProbabilisticTensorDictSequential(*modules).select_out_keys("loc", "scale", "action", "action_log_prob")

    def distribution(self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D], [..., K], [...] -> mean and standard deviation of the actions, [..., A] each."""
        return self.actor_heads[0].module(self.torso.module(observation, task_one_hot), task_idx)

    def value(self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> Tensor:
        """[..., D], [..., K], [...] -> expected discounted return of the scaled reward, [..., 1]."""
        return self.critic_heads.module(self.torso.module(observation, task_one_hot), task_idx)

    def action_std(self) -> Tensor:
        """Standard deviation of the actions per task and dimension, [K, A]."""
        return self.actor_heads[0].module.std().detach()

    def limit_std(self, limit: float) -> None:
        """Keep the standard deviations at or below a value from now on."""
        self.actor_heads[0].module.std_limit.fill_(limit)
