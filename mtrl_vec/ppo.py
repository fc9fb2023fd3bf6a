"""PPO on a rollout of all tasks: advantages, the loss, one optimiser step, and the loop over epochs and minibatches.

Everything here runs eagerly; `PPO` is the one place where it is compiled. Nothing in the update waits for the device:
the learning rate is a tensor, and metrics stay on the device until the caller reads them.

Shapes: ``B`` environments, ``T`` steps, ``N = B * T`` frames, ``K`` tasks.
"""

from __future__ import annotations

import contextlib

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from mtrl_vec.config import TrainConfig
from mtrl_vec.normalization import RewardScale
from mtrl_vec.policy import SharedPolicy

LEARNING_KEYS = (
    "observation",
    "task_one_hot",
    "task_idx",
    "action",
    "action_log_prob",
    "advantage",
    "value_target",
)
"""What the loss reads; the rest of a rollout is left behind when minibatches are cut."""

LR_BOUNDS = (1e-5, 3e-3)
MAX_LR_CHANGE = 1.5  # factor per iteration
STD_LIMIT_START = 0.4  # progress at which the limit begins to fall: until then the noise is for exploring


def normalize_advantage(advantage: Tensor, groups: Tensor) -> Tensor:
    """Zero mean and unit standard deviation within each group.

    Args:
        advantage: [N, 1].
        groups: [N, G] one-hot membership; a group without rows is left out. One column normalises over everything.
    """
    count = groups.sum(0).clamp(min=1)
    mean = (groups * advantage).sum(0) / count
    centred = advantage - (groups * mean).sum(1, keepdim=True)
    var = (groups * centred**2).sum(0) / count
    return centred * (groups * torch.rsqrt(var + 1e-8)).sum(1, keepdim=True)


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
    """

    def __init__(self, config: TrainConfig, policy: SharedPolicy) -> None:
        self.config = config
        self.policy = policy
        self.device = next(policy.parameters()).device
        self.reward_scale = RewardScale(config.num_envs, len(config.tasks), config.gamma).to(self.device)
        self.gae = GAE(
            gamma=config.gamma, lmbda=config.gae_lambda, value_network=None, vectorized=False, device=self.device
        )
        self.loss = ClipPPOLoss(
            policy.actor,
            policy.critic,
            clip_epsilon=config.clip_epsilon,
            entropy_bonus=config.entropy_coeff > 0,
            entropy_coeff=config.entropy_coeff,
            critic_coeff=config.critic_coeff,
            loss_critic_type="l2",
            functional=False,
        )
        self.params = [p for p in policy.parameters() if p.requires_grad]
        self.lr = torch.tensor(config.lr, device=self.device)
        self.optimizer = torch.optim.Adam(self.params, lr=self.lr, eps=1e-5, fused=True)
        # Minibatch order has a stream of its own, so that it does not depend on what else draws random numbers.
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.minibatch_loss = self._minibatch_loss
        if config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda"):
            # In place: the collector acts with the same modules.
            policy.actor[0].module.compile(fullgraph=True)
            policy.critic.module.compile(fullgraph=True)
            self.minibatch_loss = torch.compile(self._minibatch_loss, fullgraph=True)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bf16 for forward and loss on CUDA; the CPU stays in fp32."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    @torch.no_grad()
    def add_advantages(self, rollout: TensorDictBase) -> dict[str, Tensor]:
        """Add ``advantage`` and ``value_target`` [B, T, 1] to a rollout [B, T], in place. Its rewards stay as they are.

        An episode that was cut by the time limit goes on in the critic's eyes: its last step is bootstrapped from the
        value of its true last observation, ``next/observation``, not of the one after the reset.

        Returns:
            Metrics, as device tensors.
        """
        raw, one_hot = rollout["next", "reward"], rollout["task_one_hot"]
        reward = raw + self.config.success_bonus * rollout["next", "success"]
        if self.config.normalize_reward:
            self.reward_scale.update(reward.squeeze(-1), rollout["next", "done"].squeeze(-1), one_hot)
            reward = self.reward_scale(reward, one_hot)
        rollout["next", "reward"] = reward
        with self.autocast():
            self.policy.critic(rollout)
            # Mostly the same observations one step later, but for truncations and the last step. The epochs that follow
            # cost many times this.
            self.policy.critic(rollout["next"])
            if self.device.type == "cuda":
                # The rollout's log-probabilities come from another precision or kernel than the update's; taken as they
                # are, the probability ratio would start out as noise around 1.
                dist = self.policy.actor.get_dist(rollout)
                rollout["action_log_prob"] = dist.log_prob(rollout["action"])
        self.gae(rollout)
        rollout["next", "reward"] = raw
        groups = one_hot.flatten(0, 1)
        if not self.config.per_task_advantage:
            groups = torch.ones_like(groups[:, :1])
        advantage = rollout["advantage"]
        rollout["advantage"] = normalize_advantage(advantage.flatten(0, 1), groups).view_as(advantage)
        return {"explained_variance": explained_variance(rollout["state_value"], rollout["value_target"])}

    def update(self, rollout: TensorDictBase, progress: float) -> dict[str, Tensor]:
        """All epochs over a rollout [B, T] with advantages, then the learning rate and the statistics for the next one.

        Args:
            progress: fraction of the run that is over, for the annealing.

        Returns:
            Metrics, as device tensors: means over all minibatches, but ``approx_kl`` over the last epoch, when the
            policy is furthest from the one that acted.
        """
        cfg = self.config
        data = rollout.select(*LEARNING_KEYS).reshape(-1)
        metrics: list[dict[str, Tensor]] = []
        for _ in range(cfg.num_epochs):
            order = torch.randperm(len(data), device=self.device, generator=self.generator)
            for index in order.view(cfg.num_minibatches, -1):
                metrics.append(self.step(data[index]))
        mean = {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]}
        mean["approx_kl"] = torch.stack([m["approx_kl"] for m in metrics[-cfg.num_minibatches :]]).mean()
        mean["lr"] = self.lr.clone()
        if cfg.target_kl is not None:
            self.adapt_lr(mean["approx_kl"], annealed(cfg.target_kl, cfg.target_kl * cfg.final_kl_fraction, progress))
        self.policy.limit_std(annealed(cfg.init_std, cfg.final_std, progress, start=STD_LIMIT_START))
        self.policy.features.update(rollout["observation"])
        return mean

    def step(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """One optimiser step on a minibatch [n]. Returns its metrics, as device tensors."""
        with self.autocast(), set_exploration_type(ExplorationType.RANDOM):
            total, metrics = self.minibatch_loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.params, self.config.max_grad_norm)
        self.optimizer.step()
        return metrics

    def _minibatch_loss(self, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.loss(batch)
        total = out["loss_objective"] + out["loss_critic"]
        metrics = {
            "loss_policy": out["loss_objective"].detach(),
            "loss_critic": out["loss_critic"].detach(),
            # E[ratio - 1 - log ratio], a far less noisy estimate than E[-log ratio], and never negative
            "approx_kl": out["mean_ratio"] - 1 + out["kl_approx"],
            "clip_fraction": out["clip_fraction"],
        }
        if self.config.entropy_coeff > 0:
            total = total + out["loss_entropy"]
        return total, metrics

    @torch.no_grad()
    def adapt_lr(self, approx_kl: Tensor, target: float) -> None:
        """Move the learning rate towards the one that gives the target KL divergence.

        Near the old policy the divergence grows with the square of the step, hence the root. (The usual rule, a fixed
        factor outside of a dead band, does the same in larger jumps.)
        """
        change = torch.sqrt(target / approx_kl.clamp(min=1e-8)).clamp(1 / MAX_LR_CHANGE, MAX_LR_CHANGE)
        self.lr.mul_(change).clamp_(*LR_BOUNDS)
