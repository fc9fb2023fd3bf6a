"""PPO on a rollout of all tasks: advantages, the loss, one optimiser step, and the loop over epochs and minibatches.

Everything here runs eagerly; the constructor of `PPO` is the one place where it is compiled and, on a GPU, captured in
a CUDA graph. Nothing in the update waits for the device: the learning rate is a tensor, and metrics stay on the device
until all epochs are queued.

Shapes: ``B`` environments, ``T`` steps, ``N = B * T`` frames, ``K`` tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType
from torchrl.modules import IndependentNormal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from mtrl_vec.balance import METHODS, combine, cosines_with_others, gram_matrix, norms_and_cosines
from mtrl_vec.config import TrainConfig
from mtrl_vec.device import DeviceCopy, GraphedCall, autocast, on_stream
from mtrl_vec.errors import Diverged
from mtrl_vec.normalization import RewardScale
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.timing import Timer

LEARNING_KEYS = (
    "observation",
    "task_one_hot",
    "task_idx",
    "action",
    "action_log_prob",
    "value_target",
    "advantage",
)
"""What the loss reads; the rest of a rollout is left behind when minibatches are cut."""

ROLLOUT_KEYS = (
    *LEARNING_KEYS[:5],
    *(("next", name) for name in ("observation", "reward", "success", "done", "terminated")),
)
"""What is learned from of what the collector brings."""

STEP_METRICS = ("loss_policy", "loss_critic", "approx_kl", "clip_fraction", "grad_norm")
"""What every optimiser step tells of all tasks."""

LR_BOUNDS = (1e-5, 3e-3)
POPART_RATE = 0.1  # per iteration
MAX_LR_CHANGE = 1.5  # factor per iteration
STD_LIMIT_START = 0.4  # progress at which the limit begins to fall: until then the noise is for exploring


def normalize_advantage(advantage: Tensor, groups: Tensor) -> Tensor:
    """Zero mean and unit standard deviation within each group.

    Args:
        advantage: [N, 1].
        groups: [N, G] one-hot membership; a group without rows is left out. One column normalises over everything.
    """
    # Selected, not multiplied by 0: what is not a number in one group leaves the others alone.
    member, count = groups > 0, groups.sum(0).clamp(min=1)
    mean = torch.where(member, advantage, 0.0).sum(0) / count
    centred = advantage - torch.where(member, mean, 0.0).sum(1, keepdim=True)
    var = torch.where(member, centred**2, 0.0).sum(0) / count
    return centred * torch.where(member, torch.rsqrt(var + 1e-8), 0.0).sum(1, keepdim=True)


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """Share of the targets' variance that the values predict; 1 is perfect, 0 is no better than their mean."""
    return 1 - (target - value).var() / target.var().clamp(min=1e-8)


def annealed(first: float, final: float, progress: float, start: float = 0.0, end: float = 0.9) -> float:
    """From ``first`` to ``final``, linearly between two points of the run's progress, constant before and after."""
    return first + (final - first) * min(1.0, max(0.0, progress - start) / (end - start))


class PPO:
    """The learner: holds loss, optimiser and the annealed targets for one policy.

    PPO (Schulman et al. 2017, eq. 7, torchrl's `ClipPPOLoss`) with generalised advantages (Schulman et al. 2016, eq.
    16, torchrl's `GAE`). Deviations: success is rewarded (`TrainConfig.success_bonus`), rewards are scaled and
    advantages normalised per task, and the learning rate follows the measured KL divergence (see `adapt_lr`).

    Args:
        config: the hyperparameters.
        policy: on its device.
        timer: counts the sections ``load``, ``advantages`` and ``update``.
        behaviour: what collects the rollouts, if not ``policy``: on a GPU it gives their log-probabilities.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: SharedPolicy,
        timer: Timer | None = None,
        behaviour: SharedPolicy | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.behaviour = behaviour or policy
        self.timer = timer or Timer()
        self.device = next(policy.parameters()).device
        on_gpu = self.device.type == "cuda"
        self.reward_scale = RewardScale(config.num_envs, len(config.tasks), config.gamma).to(self.device)
        self.gae = GAE(
            gamma=config.gamma, lmbda=config.gae_lambda, value_network=None, vectorized=False, device=self.device
        )
        self.loss = ClipPPOLoss(
            policy.actor_heads,
            policy.critic_heads,
            clip_epsilon=config.clip_epsilon,
            entropy_bonus=False,  # its checks wait for the device
            critic_coeff=config.critic_coeff,
            loss_critic_type="l2",
            functional=False,
            reduction="none",  # frames are weighted by their tasks
        )
        # TorchRL's exploration type is one for the whole process, where simulators may be acting in another thread.
        self.loss.deterministic_sampling_mode = ExplorationType.RANDOM
        self.coefficients = METHODS[config.balance]
        self.params = [p for p in policy.parameters() if p.requires_grad]
        self.lr = torch.tensor(config.lr, device=self.device)
        self.optimizer = torch.optim.Adam(self.params, lr=self.lr, eps=1e-5, fused=True, capturable=on_gpu)
        # Minibatch order has a stream of its own, so that it does not depend on what else draws random numbers.
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.to_device = DeviceCopy(self.device) if on_gpu else None
        # Frames [N] to learn from, and the rows of the next minibatch: on a GPU always in the same memory.
        self.frames: TensorDictBase | None = None
        self.rows = torch.zeros(config.minibatch_size, dtype=torch.long, device=self.device)
        # Of a frame in the loss, by its task, [K]: 1 on average over the tasks.
        self.task_weights = torch.ones(len(config.tasks), device=self.device)
        self.random = torch.zeros(len(config.tasks), len(config.tasks), device=self.device)  # for `coefficients`
        self.gram = torch.full_like(self.random, torch.nan)
        """Of the tasks' gradients over the torso in the last step of `update`, see `mtrl_vec.balance.gram_matrix`."""
        self.skipped_in_a_row = torch.zeros((), device=self.device)
        # Fused optimisers leave everything as it is where this is 1, without anybody having to wait for it.
        self.optimizer.found_inf = torch.zeros((), device=self.device)  # type: ignore[attr-defined]

        self.advantages, self.minibatch_loss = self._advantages, self._minibatch_loss
        self.step: Callable[[], Tensor] = self._step if config.balance == "none" else self._step_by_task
        self.last_step: Callable[[], Tensor] = self._step_by_task  # of an update: once in a while is enough to know
        if config.compiles(self.device.type):
            self.advantages = torch.compile(self._advantages, fullgraph=True)
            self.minibatch_loss = torch.compile(self._minibatch_loss, fullgraph=True)
        if on_gpu and config.cuda_graphs:
            steps = config.num_epochs * config.num_minibatches
            self.step, self.last_step = GraphedCall(self.step, max(1, steps - 1)), GraphedCall(self.last_step, 1)
        if config.balance != "none":
            self.last_step = self.step

    def learn(self, rollout: TensorDictBase, progress: float) -> dict[str, float]:
        """Everything there is to do with a rollout [B, T], which is on the CPU and stays as it is.

        Args:
            progress: fraction of the run that is over, for the annealing.

        Returns:
            Metrics, see `add_advantages` and `update`. Reading them is the one time that this waits for the device.

        Raises:
            Diverged: so many optimiser steps in a row were skipped that there is no sense in going on.
        """
        with on_stream(self.stream):
            with self.timer("load"):
                data = rollout.select(*ROLLOUT_KEYS, strict=False)
                if self.to_device is not None:
                    data = self.to_device(data)
            with self.timer("advantages"):
                metrics = self.add_advantages(data)
            with self.timer("update"):
                metrics |= self.update(data)
                values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
                if values.pop("skipped_in_a_row") >= self.config.max_skipped_updates:
                    raise Diverged("the update has no finite numbers any more", self._last_minibatch())
                self.prepare_next(data, metrics["approx_kl"], progress)
                return values

    @torch.no_grad()
    def add_advantages(self, data: TensorDictBase) -> dict[str, Tensor]:
        """Add ``advantage`` and ``value_target`` [B, T, 1] to a rollout [B, T] on the policy's device, in place.

        On a GPU ``action_log_prob`` is added as well, under the precision of the update.

        Returns:
            Metrics, as device tensors.
        """
        added = self.advantages(data)
        explained = added.pop("explained_variance")
        data.update(added)
        if self.config.popart:
            targets = added["value_target"].flatten(0, 1), data["task_one_hot"].flatten(0, 1)
            self.policy.critic_heads.module.adapt(*targets, POPART_RATE)
        return {"explained_variance": explained}

    def _advantages(self, data: TensorDictBase) -> dict[str, Tensor]:
        """An episode that was cut by the time limit goes on in the critic's eyes: its last step is bootstrapped from
        the value of its true last observation, ``next/observation``, not of the one after the reset.
        """
        after, task = data["next"], (data["task_one_hot"], data["task_idx"])
        reward = after["reward"] + self.config.success_bonus * after["success"]
        if self.config.normalize_reward:
            self.reward_scale.update(reward.squeeze(-1), after["done"].squeeze(-1), task[0])
            reward = self.reward_scale(reward, task[0])
        # The next observations are mostly the same ones a step later, but for truncations and the last step. The epochs
        # that follow cost many times this.
        with autocast(self.device, self.config.precision):
            value, next_value = (self.policy.value(td["observation"], *task) for td in (data, after))
            if self.to_device is not None:
                loc, scale = self.behaviour.distribution(data["observation"], *task)
        judged = {"state_value": next_value, "reward": reward, "done": after["done"], "terminated": after["terminated"]}
        estimate = self.gae(TensorDict({"state_value": value, "next": judged}, data.batch_size))
        advantage, target = estimate["advantage"], estimate["value_target"]
        groups = task[0].flatten(0, 1)
        if not self.config.per_task_advantage:
            groups = torch.ones_like(groups[:, :1])
        added = {
            "advantage": normalize_advantage(advantage.flatten(0, 1), groups).view_as(advantage),
            "value_target": target,
            "explained_variance": explained_variance(value, target),
        }
        if self.to_device is not None:
            added["action_log_prob"] = IndependentNormal(loc, scale, validate_args=False).log_prob(data["action"])
        return added

    def weigh(self, weights: Sequence[float]) -> None:
        """Weigh the tasks in the loss from now on, [K] in proportion. One of zero has no gradient, if it is finite."""
        mean = sum(weights) / len(weights)
        self.task_weights.copy_(torch.tensor([weight / mean for weight in weights]))

    def update(self, data: TensorDictBase) -> dict[str, Tensor]:
        """All epochs over a rollout [B, T] with advantages. Nothing in it waits for the device.

        Returns:
            Metrics, as device tensors: means over all minibatches that were not skipped, but ``approx_kl`` over the
            last epoch, when the policy is furthest from the one that acted, and of the tasks' gradients in the last
            step.
        """
        cfg = self.config
        self._take(data.select(*LEARNING_KEYS).reshape(-1))
        steps: list[Tensor] = []
        for epoch in range(cfg.num_epochs):
            order = torch.randperm(cfg.frames_per_batch, device=self.device, generator=self.generator)
            for i, rows in enumerate(order.view(cfg.num_minibatches, -1)):
                self.rows.copy_(rows)
                if cfg.balance == "pcgrad":
                    self.random.copy_(torch.rand(self.random.shape, device=self.device, generator=self.generator))
                last = epoch + 1 == cfg.num_epochs and i + 1 == cfg.num_minibatches
                steps.append((self.last_step if last else self.step)().clone())
        skipped, in_a_row, table = torch.stack(steps).tensor_split([1, 2], dim=1)
        table = table.masked_fill(skipped > 0, torch.nan)
        names = [*STEP_METRICS, *(f"{task}/loss_critic" for task in cfg.tasks)]
        metrics = dict(zip(names, table.nanmean(0).unbind(), strict=True))
        metrics["approx_kl"] = table[-cfg.num_minibatches :, STEP_METRICS.index("approx_kl")].nanmean()
        norms, cosines = norms_and_cosines(self.gram)[0], cosines_with_others(self.gram)
        for name, column in (("grad_norm", norms), ("grad_cosine", cosines)):
            metrics |= {f"{task}/{name}": value for task, value in zip(cfg.tasks, column, strict=True)}
        metrics["lr"] = self.lr.clone()
        return metrics | {"skipped_updates": skipped.sum(), "skipped_in_a_row": in_a_row[-1, 0]}

    def prepare_next(self, data: TensorDictBase, approx_kl: Tensor, progress: float) -> None:
        """Learning rate, limit of the noise and statistics of the observations for the next rollout.

        Args:
            data: the last rollout, [B, T].
            approx_kl: see `update`.
            progress: fraction of the run that is over, for the annealing.
        """
        cfg = self.config
        if cfg.target_kl is not None:
            self.adapt_lr(approx_kl, annealed(cfg.target_kl, cfg.target_kl * cfg.final_kl_fraction, progress))
        self.policy.limit_std(annealed(cfg.init_std, cfg.final_std, progress, start=STD_LIMIT_START))
        self.policy.torso.module.features.update(data["observation"])

    def _take(self, frames: TensorDictBase) -> None:
        if self.to_device is None:
            self.frames = frames
        elif self.frames is None:
            self.frames = frames.clone()
        else:
            for key, value in frames.items():
                self.frames[key].copy_(value)

    def _step(self) -> Tensor:
        """One optimiser step on `rows` of `frames`, skipped where loss or gradients are not finite.

        Returns:
            Whether it was skipped, how many were in a row, `STEP_METRICS`, and the critic's loss per task: [2 + 5 + K].
        """
        total, metrics = self.minibatch_loss(self._minibatch())
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        return self._descend(total, metrics)

    def _step_by_task(self) -> Tensor:
        """The same with the tasks' gradients over the torso known, in `gram`, and combined as ``balance`` says."""
        torso = self.policy.torso.module
        copies = torso.copies()
        # Where only the last step goes by task it is not worth compiling.
        loss = self._minibatch_loss if self.config.balance == "none" else self.minibatch_loss
        total, metrics = loss(self._minibatch(), copies)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        by_task = [c.grad for c in copies if c.grad is not None]
        self.gram.copy_(gram_matrix(by_task))
        combined = combine(by_task, self.coefficients(self.gram, self.random))
        for parameter, gradient in zip(torso.parameters(), combined, strict=True):
            parameter.grad = gradient
        return self._descend(total, metrics)

    def _minibatch(self) -> TensorDictBase:
        assert self.frames is not None
        return self.frames[self.rows]

    def _descend(self, total: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.params, self.config.max_grad_norm)
        skipped = 1.0 - torch.isfinite(total.detach() + metrics["grad_norm"]).float()
        self.optimizer.found_inf.copy_(skipped)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.skipped_in_a_row.add_(1).mul_(skipped)
        counts, means = torch.stack([skipped, self.skipped_in_a_row]), torch.stack([metrics[m] for m in STEP_METRICS])
        return torch.cat([counts, means, metrics["task_loss_critic"]])

    def _last_minibatch(self) -> dict[str, Any]:
        return {"policy_state": self.policy.state_dict(), "minibatch": self._minibatch().to_dict()}

    def state(self) -> dict[str, Any]:
        """All that learning goes on from, but the policy; not a copy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr": self.lr,
            "reward_scale": self.reward_scale.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "minibatch_order": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. What a CUDA graph has captured stays in its place."""
        if self.optimizer.state:
            for i, p in enumerate(self.params):
                saved = state["optimizer"]["state"].get(i)  # none before the first step
                for name, tensor in self.optimizer.state[p].items():
                    tensor.copy_(saved[name] if saved else torch.zeros_like(tensor))
        else:
            # The settings stay this device's own, the learning rate the tensor that it is.
            own = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": copy.deepcopy(state["optimizer"]["state"]), "param_groups": own})
            self.optimizer.param_groups[0]["lr"] = self.lr
        self.lr.copy_(state["lr"])
        self.reward_scale.load_state_dict(state["reward_scale"])
        self.skipped_in_a_row.copy_(state["skipped_in_a_row"])
        if state["minibatch_order"].numel() == self.generator.get_state().numel():  # else it comes from another device
            self.generator.set_state(state["minibatch_order"])

    def _minibatch_loss(
        self, batch: TensorDictBase, copies: list[Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # In here: a compiled backward pass would take over what is in force around the call, and round the heads' too.
        with autocast(self.device, self.config.precision):
            if copies is None:
                inputs = self.policy.torso(batch.clone(recurse=False))
            else:
                rows = batch["observation"], batch["task_one_hot"], batch["task_idx"]
                hidden = self.policy.torso.module.forward_by_task(*rows, copies)
                inputs = batch.clone(recurse=False).set("hidden", hidden)
            out = self.loss(inputs)
        weight = self.task_weights.index_select(0, batch["task_idx"])
        if self.config.popart:  # the error in normalised values
            std = self.policy.critic_heads.module.value_std.index_select(0, batch["task_idx"])
            out["loss_critic"] = out["loss_critic"] / std**2
        total = (weight * out["loss_objective"]).mean() + (weight * out["loss_critic"]).mean()
        metrics = {
            "loss_policy": out["loss_objective"].detach().mean(),
            "loss_critic": out["loss_critic"].detach().mean(),
            "task_loss_critic": out["loss_critic"].detach() @ batch["task_one_hot"] / batch["task_one_hot"].sum(0),
            # E[ratio - 1 - log ratio], a far less noisy estimate than E[-log ratio], and never negative
            "approx_kl": out["mean_ratio"] - 1 + out["kl_approx"],
            "clip_fraction": out["clip_fraction"],
        }
        if self.config.entropy_coeff > 0:
            # Of normal distributions, but for a constant: the sum of the logarithms of the standard deviations.
            log_std = self.policy.actor_heads[0].module.std().log().sum(-1).index_select(0, batch["task_idx"])
            total = total - self.config.entropy_coeff * (weight * log_std).mean()
        return total, metrics

    @torch.no_grad()
    def adapt_lr(self, approx_kl: Tensor, target: float) -> None:
        """Move the learning rate towards the one that gives the target KL divergence.

        Near the old policy the divergence grows with the square of the step, hence the root. (The usual rule, a fixed
        factor outside of a dead band, does the same in larger jumps.)
        """
        change = torch.sqrt(target / approx_kl.clamp(min=1e-8)).clamp(1 / MAX_LR_CHANGE, MAX_LR_CHANGE)
        change = change.nan_to_num(1.0)  # where all steps of the last epoch were skipped
        self.lr.mul_(change).clamp_(*LR_BOUNDS)
