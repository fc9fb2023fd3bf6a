"""Advantages and value targets of a rollout.

Shapes: ``B`` environments, ``T`` steps, ``N = B * T`` frames, ``K`` tasks.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.modules import IndependentNormal
from torchrl.objectives.value import GAE

from mtrl_vec.config import TrainConfig
from mtrl_vec.learn.device import autocast
from mtrl_vec.learn.reward_scale import RewardScale
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.ranks import ALONE, Ranks


def normalize_advantage(advantage: Tensor, groups: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Zero mean and unit standard deviation within each group, over all ranks.

    Args:
        advantage: [N, 1].
        groups: [N, G] one-hot membership; a group without rows is left out. One column normalises over everything.
        ranks: with a part of the rows each.
    """
    # Selected, not multiplied by 0: what is not a number in one group leaves the others alone.
    member = groups > 0
    count, sums = ranks.total(torch.stack([groups.sum(0), torch.where(member, advantage, 0.0).sum(0)]))
    count = count.clamp(min=1)
    mean = sums / count
    centred = advantage - torch.where(member, mean, 0.0).sum(1, keepdim=True)
    var = ranks.total(torch.where(member, centred**2, 0.0).sum(0)) / count
    return centred * torch.where(member, torch.rsqrt(var + 1e-8), 0.0).sum(1, keepdim=True)


def explained_variance(value: Tensor, target: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Fraction of the targets' variance that the values predict; 1 is perfect, 0 is no better than their mean."""
    both = torch.stack([target - value, target]).flatten(1)
    mean = ranks.total(both.mean(1)) / ranks.size
    error, spread = ranks.total((both - mean[:, None]).square().mean(1))
    return 1 - error / spread.clamp(min=1e-8)


class Advantages(nn.Module):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16, torchrl's `GAE`).

    Deviations: success is rewarded (`LearnerConfig.success_bonus`), rewards are scaled and advantages normalised per
    task. An episode cut by the time limit is bootstrapped from the value of its true last observation,
    ``next/observation``, not of the one after the reset: time limits are truncations, not terminations.

    Args:
        config: of the run.
        policy: whose critic judges, on its device.
        behaviour: the policy that collects rollouts.
        recompute_log_prob: also compute ``action_log_prob`` [B, T], under the precision of the update.
        ranks: with ``B`` environments each.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: SharedPolicy,
        behaviour: SharedPolicy,
        recompute_log_prob: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self._config, self._learner, self._ranks = config, config.learner, ranks
        self._policies = policy, behaviour  # in a tuple, so that they are not submodules
        self._recompute_log_prob = recompute_log_prob
        self._device = next(policy.parameters()).device
        num_envs, gamma = config.num_envs // ranks.size, config.learner.gamma
        self.reward_scale = RewardScale(num_envs, config.num_tasks, gamma).to(self._device)
        lmbda = config.learner.gae_lambda
        self.gae = GAE(gamma=gamma, lmbda=lmbda, value_network=None, vectorized=False, device=self._device)
        self.gae.set_keys()  # or the first call does, and what was compiled for it is compiled again for the second

    def forward(self, data: TensorDictBase) -> dict[str, Tensor]:
        """What to add to a rollout [B, T]: ``advantage`` and ``value_target`` [B, T, 1]; and ``explained_variance``."""
        policy, behaviour = self._policies
        recompute = self._recompute_log_prob or data.get("action_log_prob", None) is None  # collected on a GPU
        after, task = data["next"], (data["task_one_hot"], data["task_idx"])
        reward = after["reward"] + self._learner.success_bonus * after["success"]
        if self._learner.normalize_reward:
            self.reward_scale.update(reward.squeeze(-1), after["done"].squeeze(-1), task[0], self._ranks)
            reward = self.reward_scale(reward, task[0])
        # The next observations are mostly the same ones a step later, except at truncations and the last step. The
        # epochs that follow cost many times this.
        with autocast(self._device, self._config.runtime.precision):
            value, next_value = (policy.value(td["observation"], *task) for td in (data, after))
            if recompute:
                loc, scale = behaviour.distribution(data["observation"], *task)
        judged = {"state_value": next_value, "reward": reward, "done": after["done"], "terminated": after["terminated"]}
        estimate = self.gae(TensorDict({"state_value": value, "next": judged}, data.batch_size))
        advantage, target = estimate["advantage"], estimate["value_target"]
        groups = task[0].flatten(0, 1)
        if not self._learner.per_task_advantage:
            groups = torch.ones_like(groups[:, :1])
        added = {
            "advantage": normalize_advantage(advantage.flatten(0, 1), groups, self._ranks).view_as(advantage),
            "value_target": target,
            "explained_variance": explained_variance(value, target, self._ranks),
        }
        if recompute:
            added["action_log_prob"] = IndependentNormal(loc, scale, validate_args=False).log_prob(data["action"])
        return added
