"""PPO on a rollout of all tasks: advantages, one optimiser step, and the loop over epochs and minibatches.

Everything here runs eagerly; the constructor of `PPO` is the one place where it is compiled and, on a GPU, captured in
a CUDA graph. Nothing in the update waits for the device: the learning rate is a tensor, and metrics stay on the device
until all epochs are queued.

Each rank computes the gradient over its own frames of a minibatch. One sum over the ranks per optimiser step adds up
gradients and metrics; from there on all ranks do the same.

Shapes: ``B`` environments of this rank, ``T`` steps, ``N = B * T`` frames, ``R`` ranks, ``K`` tasks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import Diverged
from mtrl_vec.learn.advantages import Advantages
from mtrl_vec.learn.device import DeviceCopy, GraphedCall, on_stream
from mtrl_vec.learn.flat import FlatCopy
from mtrl_vec.learn.gradients import METHODS, combine, cosines_with_others, gram_matrix
from mtrl_vec.learn.learning_rate import adapt_lr, annealed
from mtrl_vec.learn.loss import LEARNING_KEYS, MinibatchLoss
from mtrl_vec.learn.minibatches import Minibatches
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.timing import Timer

ROLLOUT_KEYS = (
    *LEARNING_KEYS[:5],
    *(("next", name) for name in ("observation", "reward", "success", "done", "terminated")),
)
"""What is learned from, out of what the collector brings."""

STEP_METRICS = ("loss_policy", "loss_critic", "approx_kl", "clip_fraction", "grad_norm")
"""Metrics of every optimiser step over all tasks."""

POPART_RATE = 0.1  # per iteration
STD_LIMIT_START = 0.4
"""Progress at which the limit of the standard deviation begins to fall: until then the noise is for exploring."""


class PPO:
    """The learner: holds loss, optimiser and the annealed targets for one policy.

    See `Advantages` and `MinibatchLoss` for what is optimised; the learning rate follows the measured KL divergence,
    see `mtrl_vec.learn.learning_rate`.

    Args:
        config: of the run.
        policy: on its device.
        timer: counts the sections ``load``, ``advantages`` and ``update``.
        behaviour: what collects the rollouts, if not ``policy``: on a GPU it gives their log-probabilities.
        ranks: which learn together.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: SharedPolicy,
        timer: Timer | None = None,
        behaviour: SharedPolicy | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self._learner, self._k = config, config.learner, config.num_tasks
        self.ranks = ranks
        self.policy = policy
        self.timer = timer or Timer()
        self.device = next(policy.parameters()).device
        on_gpu = self.device.type == "cuda"
        self.advantages: Callable[..., dict[str, Tensor]] = Advantages(
            config, policy, behaviour or policy, on_gpu, ranks
        )
        self.reward_scale = self.advantages.reward_scale
        self.loss = MinibatchLoss(config, policy)
        self.minibatch_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] = self.loss
        self.coefficients = METHODS[self._learner.gradient_method]
        self.params = [p for p in policy.parameters() if p.requires_grad]
        self.lr = torch.tensor(self._learner.lr, device=self.device)
        self.optimizer = torch.optim.Adam(self.params, lr=self.lr, eps=1e-5, fused=True, capturable=on_gpu)
        # Minibatch order has a stream of its own, so that it does not depend on what else draws random numbers.
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.to_device = DeviceCopy(self.device) if on_gpu else None
        self._sums, self._sums_by_task = (FlatCopy(needed=ranks.size > 1) for _ in range(2))
        self.random = torch.zeros(self._k, self._k, device=self.device)  # for `coefficients`
        self.gram = torch.full_like(self.random, torch.nan)
        """Gram matrix [K, K] of the tasks' gradients over the torso in the last step, if it kept them apart."""
        self.skipped_in_a_row = torch.zeros((), device=self.device)
        # Fused optimisers leave everything as it is where this is 1, without anybody having to wait for it.
        self.optimizer.found_inf = torch.zeros((), device=self.device)  # type: ignore[attr-defined]
        self._prepare(on_gpu)

    def _prepare(self, on_gpu: bool) -> None:
        """Compile and capture what the settings ask for."""
        self.minibatches = Minibatches(self.config, self.generator, self.ranks, fixed_shapes=on_gpu)
        combines, logs = self._learner.gradient_method != "none", self.config.runtime.log_gradients
        if self.config.runtime.compile == "on":
            self.advantages = torch.compile(self.advantages, fullgraph=True)
            self.minibatch_loss = torch.compile(self.loss.__call__, fullgraph=True)
        plain, by_task = (self._backward, self._descend), (self._backward_by_task, self._descend_by_task)
        graphs = on_gpu and self.config.runtime.cuda_graphs
        usual, last = by_task if combines else plain, by_task if combines or logs else plain
        steps = self._learner.num_epochs * self._learner.num_minibatches
        self.step = self._made_step(*usual, warmup=max(1, steps - 1) if graphs else None)
        # Of an update: once in a while is enough to log.
        self.last_step = self.step if last == usual else self._made_step(*last, warmup=1 if graphs else None)

    def _made_step(
        self, backward: Callable[[], Tensor], descend: Callable[[], Tensor], warmup: int | None
    ) -> Callable[[], Tensor]:
        """One optimiser step out of its halves; as one CUDA graph after ``warmup`` calls, if that is given.

        Ranks add up between two graphs: NCCL's watchdog does not see a message that is part of one, and it would wait
        for ever where another rank is gone.
        """

        alone = self.ranks.size == 1
        if warmup is not None and not alone:
            backward, descend = GraphedCall(backward, warmup), GraphedCall(descend, warmup)

        def step() -> Tensor:
            self.ranks.add(backward())
            return descend()

        return step if warmup is None or not alone else GraphedCall(step, warmup)

    def learn(self, rollout: TensorDictBase, progress: float) -> dict[str, float]:
        """Learn from a rollout [B, T], which is on the CPU and is not changed. A GPU may read it until this returns.

        Args:
            rollout: with at least `ROLLOUT_KEYS`.
            progress: fraction of the run that is over, for the annealing.

        Returns:
            Metrics, see `add_advantages` and `update`. Reading them is the only time that this waits for the device.

        Raises:
            Diverged: too many optimiser steps in a row were skipped.
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
                if values.pop("skipped_in_a_row") >= self.config.runtime.max_skipped_updates:
                    what = {
                        "policy_state": self.policy.state_dict(),
                        "minibatch": self.minibatches.current_of_all_ranks(),
                    }
                    raise Diverged("the update no longer has finite numbers", what)
                self.prepare_next(data, metrics["approx_kl"], progress)
                return values

    @torch.no_grad()
    def add_advantages(self, data: TensorDictBase) -> dict[str, Tensor]:
        """Add ``advantage`` and ``value_target`` [B, T, 1] to a rollout [B, T] on the policy's device, in place.

        On a GPU ``action_log_prob`` is added as well, under the precision of the update.

        Returns:
            Metrics, as device tensors.
        """
        compiled = self.config.runtime.compile == "on"
        with self.ranks.naming_the_lost() if compiled else contextlib.nullcontext():
            added = self.advantages(data)
        explained = added.pop("explained_variance")
        data.update(added)
        if self.config.policy.popart:
            targets = added["value_target"].flatten(0, 1), data["task_one_hot"].flatten(0, 1)
            self.policy.critic_heads.module.adapt(*targets, POPART_RATE, self.ranks)
        return {"explained_variance": explained}

    def set_task_weights(self, weights: Sequence[float]) -> None:
        """Weight the tasks in the loss from now on, [K], any scale. A task of weight zero gets no gradient."""
        mean = sum(weights) / len(weights)
        self.loss.task_weights.copy_(torch.tensor([weight / mean for weight in weights]))

    def update(self, data: TensorDictBase) -> dict[str, Tensor]:
        """All epochs over a rollout [B, T] with advantages. Nothing in it waits for the device.

        Returns:
            Metrics, as device tensors: means over all minibatches that were not skipped; except ``approx_kl``, over the
            last epoch, when the policy is furthest from the one that acted, and those of the tasks' gradients, from the
            last step.
        """
        cfg = self._learner
        self.minibatches.take(data.select(*LEARNING_KEYS).reshape(-1))
        steps: list[Tensor] = []
        for epoch in range(cfg.num_epochs):
            self.minibatches.shuffle()
            for i in range(cfg.num_minibatches):
                self.minibatches.choose(i)
                if cfg.gradient_method == "pcgrad":
                    self.random.copy_(torch.rand(self.random.shape, device=self.device, generator=self.generator))
                last = epoch + 1 == cfg.num_epochs and i + 1 == cfg.num_minibatches
                steps.append((self.last_step if last else self.step)().clone())
        skipped, in_a_row, table = torch.stack(steps).tensor_split([1, 2], dim=1)
        table = table.masked_fill(skipped > 0, torch.nan)
        names = [*STEP_METRICS, *(f"{task}/loss_critic" for task in self.config.tasks)]
        metrics = dict(zip(names, table.nanmean(0).unbind(), strict=True))
        metrics["approx_kl"] = table[-cfg.num_minibatches :, STEP_METRICS.index("approx_kl")].nanmean()
        norms, cosines = self.gram.diagonal().sqrt(), cosines_with_others(self.gram)
        for name, column in (("grad_norm", norms), ("grad_cosine", cosines)):
            metrics |= {f"{task}/{name}": value for task, value in zip(self.config.tasks, column, strict=True)}
        metrics["lr"] = self.lr.clone()
        return metrics | {"skipped_updates": skipped.sum(), "skipped_in_a_row": in_a_row[-1, 0]}

    def prepare_next(self, data: TensorDictBase, approx_kl: Tensor, progress: float) -> None:
        """Learning rate, limit of the noise and statistics of the observations for the next rollout.

        Args:
            data: the last rollout, [B, T].
            approx_kl: see `update`.
            progress: fraction of the run that is over, for the annealing.
        """
        cfg = self._learner
        if (target := self.config.target_kl) is not None:
            adapt_lr(self.lr, approx_kl, annealed(target, target * self.config.final_kl_fraction, progress))
        init_std = self.config.policy.init_std
        self.policy.limit_std(annealed(init_std, cfg.final_std, progress, start=STD_LIMIT_START))
        self.policy.torso.module.features.update(data["observation"], data["task_one_hot"], self.ranks)

    def _backward(self) -> Tensor:
        """First half of an optimiser step: what the ranks have to add up, as one vector."""
        total, metrics = self.minibatch_loss(self.minibatches.current())
        self.optimizer.zero_grad(set_to_none=True)
        (total * self.minibatches.share).backward()
        return self._sums([self._numbers(total, metrics), *(p.grad for p in self.params if p.grad is not None)])

    def _backward_by_task(self) -> Tensor:
        """The same with the tasks' gradients over the torso kept apart."""
        copies = self.policy.torso.module.copies()
        # Where only the last step goes by task it is not worth compiling.
        loss = self.loss if self._learner.gradient_method == "none" else self.minibatch_loss
        total, metrics = loss(self.minibatches.current(), copies)
        self.optimizer.zero_grad(set_to_none=True)
        (total * self.minibatches.share).backward()
        gradients = [p.grad for p in (*copies, *self.params) if p.grad is not None]
        return self._sums_by_task([self._numbers(total, metrics), *gradients])

    def _numbers(self, total: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """What is added up besides gradients: loss and metrics by this rank's share, and sums per task, [5 + 2 K]."""
        means = torch.stack([total.detach(), *(metrics[name] for name in STEP_METRICS[:-1])])
        share = self.minibatches.share
        counted = share.ceil()  # 0 where this rank has no frame of the minibatch
        return torch.cat([means * share, metrics["task_loss_critic"] * counted, metrics["task_frames"] * counted])

    def _descend(self) -> Tensor:
        """Second half: a step along the gradient, skipped where loss or gradient are not finite.

        Returns:
            Whether it was skipped, how many were in a row, `STEP_METRICS`, and the critic's loss per task: [2 + 5 + K].
        """
        numbers, *gradients = self._sums.parts
        return self._take_step(numbers, gradients)

    def _descend_by_task(self) -> Tensor:
        """The same with the tasks' gradients over the torso noted in `gram`, and combined by the method."""
        numbers, *gradients = self._sums_by_task.parts
        count = len(list(self.policy.torso.parameters()))
        by_task, others = gradients[:count], gradients[count:]
        self.gram.copy_(gram_matrix(by_task))
        combined = combine(by_task, self.coefficients(self.gram, self.random))
        return self._take_step(numbers, [*combined, *others])

    def _take_step(self, numbers: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        for parameter, gradient in zip(self.params, gradients, strict=True):
            parameter.grad = gradient
        means, task_loss, task_frames = numbers.split([len(STEP_METRICS), self._k, self._k])
        grad_norm = nn.utils.clip_grad_norm_(self.params, self._learner.max_grad_norm)
        skipped = 1.0 - torch.isfinite(means[0] + grad_norm).float()
        self.optimizer.found_inf.copy_(skipped)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.policy.project_std()
        self.skipped_in_a_row.add_(1).mul_(skipped)
        counts = torch.stack([skipped, self.skipped_in_a_row])
        return torch.cat([counts, means[1:], grad_norm[None], task_loss / task_frames])

    def state_dict(self) -> dict[str, Any]:
        """Everything that learning continues from, except the policy; not a copy. On the first rank of all ranks."""
        scale = self.reward_scale.state_dict()
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr": self.lr,
            "reward_scale": scale | self.ranks.rows_at_first({"returns": scale["returns"]}),
            "skipped_in_a_row": self.skipped_in_a_row,
            "minibatch_order": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`. What a CUDA graph has captured stays in its place."""
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
        returns = state["reward_scale"]["returns"]
        self.reward_scale.load_state_dict(state["reward_scale"] | {"returns": returns[self.ranks.part(len(returns))]})
        self.skipped_in_a_row.copy_(state["skipped_in_a_row"])
        if state["minibatch_order"].numel() == self.generator.get_state().numel():  # else it comes from another device
            self.generator.set_state(state["minibatch_order"])
