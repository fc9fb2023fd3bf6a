"""Statistics of the episodes of a run.

Shapes: ``B`` environments of all ranks, ``T`` steps, ``K`` tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase

from mtrl_vec.ranks import ALONE, Ranks

FAST, SLOW = 0.3, 0.1
"""Rates per iteration of the two moving averages of success whose difference is learning progress."""


class EpisodeStatistics:
    """Success, return and length of the last ``window`` whole episodes of every task, from consecutive rollouts.

    Every rank knows those of all ranks.

    An episode is successful if any of its steps was. Episodes that did not start at their first step (random phases) or
    ended in unstable physics are left out.

    Args:
        tasks: their names.
        num_envs: ``B``.
        whole: the first episodes start at their first step.
        ranks: with a part of the environments each.
        window: episodes per task.

    Attributes:
        unstable_episodes: episodes so far that were cut because the physics became unstable.
        fast_success, slow_success: [K], moving averages of the success rate over the rollouts.
        frames: [K], environment steps so far.
        untrained: [K], 1 for tasks that the run has to learn from nothing, 0 for those that its first policy knew.
    """

    def __init__(
        self, tasks: Sequence[str], num_envs: int, whole: bool, ranks: Ranks = ALONE, window: int = 50
    ) -> None:
        self.tasks, self._ranks = tuple(tasks), ranks
        self.unstable_episodes = 0
        self._whole = np.full(num_envs, whole)
        self._return = np.zeros(num_envs)
        self._success = np.zeros(num_envs, dtype=bool)
        self._length = np.zeros(num_envs, dtype=np.int64)
        self._recent: list[deque[tuple[bool, float, int]]] = [deque(maxlen=window) for _ in tasks]
        self._frame_fraction = np.full(len(tasks), np.nan)
        self.fast_success, self.slow_success = np.zeros(len(tasks)), np.zeros(len(tasks))
        self.untrained = np.ones(len(tasks))
        self.frames = np.zeros(len(tasks), dtype=np.int64)

    def update(self, rollout: TensorDictBase) -> None:
        """Add a rollout with raw rewards, of which each rank has its own environments."""
        after = rollout["next"]
        flags = torch.cat([after["success"], after["done"], after["unstable"]], -1)
        reward = self._ranks.rows(after["reward"].squeeze(-1)).cpu().numpy()
        success, done, unstable = self._ranks.rows(flags.byte()).bool().cpu().numpy().transpose(2, 0, 1)
        task_idx = self._ranks.rows(rollout["task_idx"].short()).cpu().numpy()
        self.unstable_episodes += int(unstable.sum())
        count = np.bincount(task_idx.ravel(), minlength=len(self.tasks))
        self.frames += count
        self._frame_fraction = count / task_idx.size
        for t in range(reward.shape[1]):
            self._return += reward[:, t]
            self._success |= success[:, t]
            self._length += 1
            for env in np.flatnonzero(done[:, t]):
                if self._whole[env] and not unstable[env, t]:
                    episode = bool(self._success[env]), float(self._return[env]), int(self._length[env])
                    self._recent[task_idx[env, t]].append(episode)
                self._whole[env], self._return[env], self._success[env], self._length[env] = True, 0.0, False, 0
        # Episodes that have not ended have not succeeded.
        rates = np.array([np.mean([episode[0] for episode in recent] or 0.0) for recent in self._recent])
        self.fast_success += FAST * (rates - self.fast_success)
        self.slow_success += SLOW * (rates - self.slow_success)

    def summary(self) -> dict[str, float]:
        """The ``train/<task>/`` columns that come from episodes; NaN while there are none."""
        out: dict[str, float] = {}
        progress = self.fast_success - self.slow_success
        for task, recent, fraction, change in zip(
            self.tasks, self._recent, self._frame_fraction, progress, strict=True
        ):
            means = np.mean(recent, axis=0) if recent else (np.nan,) * 3
            names = ("success_rate", "return", "episode_length")
            out |= {f"train/{task}/{name}": float(mean) for name, mean in zip(names, means, strict=True)}
            out |= {
                f"train/{task}/frame_fraction": float(fraction),
                f"train/{task}/learning_progress": float(change),
            }
        return out

    @property
    def success(self) -> NDArray[np.float64]:
        """Success rates of the last whole episodes, [K]; NaN where there are none."""
        return np.array([np.mean([e[0] for e in recent]) if recent else np.nan for recent in self._recent])

    @property
    def episodes(self) -> NDArray[np.int64]:
        """Number of whole episodes that these rates are of, [K], at most ``window``."""
        return np.array([len(recent) for recent in self._recent])

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that the statistics continue from, as plain tensors and values."""
        return {
            "unstable_episodes": self.unstable_episodes,
            "recent": [[tuple(episode) for episode in recent] for recent in self._recent],
            **{name: torch.tensor(column) for name, column in self._columns().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.unstable_episodes = state["unstable_episodes"]
        for recent, episodes in zip(self._recent, state["recent"], strict=True):
            recent.clear()
            recent.extend(episodes)
        for name, column in self._columns().items():
            column[:] = state[name].numpy()

    def _columns(self) -> dict[str, NDArray]:
        episodes = {"whole": self._whole, "return": self._return, "success": self._success, "length": self._length}
        rates = {"fast_success": self.fast_success, "slow_success": self.slow_success}
        return episodes | rates | {"untrained": self.untrained, "frames": self.frames}
