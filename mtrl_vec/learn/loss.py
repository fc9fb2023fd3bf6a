"""The loss of one minibatch.

Shapes: ``n`` frames, ``K`` tasks.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import ClipPPOLoss

from mtrl_vec.config import TrainConfig
from mtrl_vec.learn.device import autocast
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.routing import rows_of

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


class MinibatchLoss:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7, torchrl's `ClipPPOLoss`) and the critic's squared error.

    Frames are weighted by their tasks.

    Args:
        config: of the run.
        policy: on its device.
    """

    def __init__(self, config: TrainConfig, policy: SharedPolicy) -> None:
        self._config, self._policy = config, policy
        self._device = next(policy.parameters()).device
        self.task_weights = torch.ones(config.num_tasks, device=self._device)
        """Weights of the tasks in the loss, [K], normalised to a mean of 1."""
        self._loss = ClipPPOLoss(
            policy.actor_heads,
            policy.critic_heads,
            clip_epsilon=config.learner.clip_epsilon,
            entropy_bonus=False,  # its checks wait for the device
            critic_coeff=config.learner.critic_coeff,
            loss_critic_type="l2",
            functional=False,
            reduction="none",  # frames are weighted by their tasks
        )
        # TorchRL's exploration type is one for the whole process, where simulators may be acting in another thread.
        self._loss.deterministic_sampling_mode = ExplorationType.RANDOM

    def __call__(self, batch: TensorDictBase, copies: list[Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a minibatch [n] with `LEARNING_KEYS`.

        Args:
            batch: the minibatch.
            copies: the torso's parameters once per task, see `mtrl_vec.policy.modules.Torso.copies`.
        """
        # In here: a compiled backward pass would take over what is in force around the call, and round the heads' too.
        with autocast(self._device, self._config.runtime.precision):
            if copies is None:
                inputs = self._policy.torso(batch.clone(recurse=False))
            else:
                rows = batch["observation"], batch["task_one_hot"], batch["task_idx"]
                hidden = self._policy.torso.module.forward_by_task(*rows, copies)
                inputs = batch.clone(recurse=False).set("hidden", hidden)
            out = self._loss(inputs)
        weight = self.task_weights.index_select(0, batch["task_idx"])
        if self._config.policy.popart:  # the error in normalised values
            std = self._policy.critic_heads.module.value_std.index_select(0, batch["task_idx"])
            out["loss_critic"] = out["loss_critic"] / std**2
        total = (weight * out["loss_objective"]).mean() + (weight * out["loss_critic"]).mean()
        metrics = {
            "loss_policy": out["loss_objective"].detach().mean(),
            "loss_critic": out["loss_critic"].detach().mean(),
            "task_loss_critic": out["loss_critic"].detach() @ batch["task_one_hot"],  # [K], sums
            "task_frames": batch["task_one_hot"].sum(0),
            # E[ratio - 1 - log ratio], a far less noisy estimate than E[-log ratio], and never negative
            "approx_kl": out["mean_ratio"] - 1 + out["kl_approx"],
            "clip_fraction": out["clip_fraction"],
        }
        if self._config.learner.entropy_coeff > 0:
            # Of normal distributions, up to a constant: the sum of the logarithms of the standard deviations.
            log_std = self._policy.actor_heads[0].module.std().log().sum(-1, keepdim=True)
            entropy = rows_of(log_std, batch["task_idx"]).squeeze(-1)
            total = total - self._config.learner.entropy_coeff * (weight * entropy).mean()
        return total, metrics
