"""What a run tells: the columns of its metrics, and the statistics of its episodes.

Shapes: ``B`` environments, ``T`` steps, ``K`` tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase

SECTIONS = {
    "collect": "collecting rollouts",
    "simulate": "stepping the simulators, which is part of collecting",
    "infer": "choosing actions, which is part of collecting (and where a GPU's work is waited for)",
    "transfer": "moving data to the GPU and back, which is part of collecting",
    "load": "moving rollouts to the GPU",
    "advantages": "advantages",
    "update": "epochs over the rollouts",
    "schedule": "deciding what to practise",
    "evaluate": "evaluations while training",
    "checkpoint": "copying the state of everything after each iteration, and writing it now and then",
}
"""Of the timer. With ``overlap`` collecting and learning go on at once, and add up to more than the whole."""

COLUMNS = {
    "iteration": "iterations so far: a rollout of all environments and learning from it",
    "frames": "environment steps learned from so far, over all tasks",
    "time/elapsed": "seconds of training so far; time between an interruption and its resumption is left out",
    "time/sps": "steps per second of this iteration, learning included, evaluation not",
    "time/sps_simulate": "steps per second of simulating by itself",
    "time/sps_infer": "steps per second of choosing actions by itself",
    "time/sps_update": "steps per second of the epochs by themselves",
    **{f"time/{name}": f"seconds so far: {what}" for name, what in SECTIONS.items()},
    "memory/processes": "resident memory of learner and simulators in MB; what they share counts in each",
    "memory/device": "GPU memory in use by tensors in MB; 0 without one",
    "train/<task>/success_rate": "share of the last 50 whole episodes in which any step was a success",
    "train/<task>/return": "their mean sum of rewards",
    "train/<task>/episode_length": "their mean length in steps",
    "train/<task>/progress": "learning progress: a fast less a slow moving average of the success rate",
    "train/<task>/share": "share of the rollout's frames",
    "train/<task>/weight": "weight in the loss; 1 in sum over the tasks",
    "train/<task>/loss_critic": "the critic's squared error, with its coefficient, in units of the scaled reward",
    "train/<task>/grad_norm": "norm of its gradient over the torso, with its weight, in the last minibatch",
    "train/<task>/grad_cosine": "cosine of that with the gradient of all other tasks: below 0 they are in conflict",
    "train/<task>/action_std": "mean standard deviation of the actions",
    "train/loss_policy": "PPO's clipped objective, mean over the minibatches",
    "train/loss_critic": "the critic's squared error, with its coefficient, mean over the minibatches",
    "train/approx_kl": "how far the iteration moved the policy, in nats, mean over the last epoch",
    "train/clip_fraction": "share of frames whose probability ratio was clipped, mean over the minibatches",
    "train/explained_variance": "share of the returns' variance that the critic predicts: 1 is perfect",
    "train/grad_norm": "norm of the gradient before clipping, mean over the minibatches",
    "train/lr": "learning rate, which follows approx_kl",
    "train/action_std": "mean standard deviation of the actions over all tasks",
    "train/skipped_updates": "optimiser steps skipped so far, since loss or gradients were not finite",
    "train/unstable_episodes": "episodes cut so far because the physics broke down",
    "train/restarts": "times so far that dead simulator processes were replaced",
    "eval/<task>/success_rate": "of the evaluation after this iteration; nan where there was none",
    "eval/mean_success_rate": "mean over the tasks",
}
"""Of ``metrics.csv`` and TensorBoard, and what they mean; README.md has the same table."""


def column_names(tasks: Sequence[str]) -> list[str]:
    """`COLUMNS` with one of each ``<task>`` column per task."""
    names: list[str] = []
    for name in COLUMNS:
        names += [name.replace("<task>", task) for task in tasks] if "<task>" in name else [name]
    return names


def resident_megabytes(pids: Iterable[int]) -> float:
    """Memory of this process and of others, as far as they still run."""
    total = psutil.Process().memory_info().rss
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_info().rss
        except psutil.Error:
            continue
    return total / 1e6


FAST, SLOW = 0.3, 0.1
"""Rates per iteration of the two moving averages of success whose difference is learning progress."""


class EpisodeStatistics:
    """Success, return and length of the last ``window`` whole episodes of every task, from consecutive rollouts.

    An episode is successful if any of its steps was. Episodes that did not start at their first step (random phases) or
    ended in unstable physics are left out.

    Attributes:
        fast_success, slow_success: [K], moving averages of the success rate over the rollouts.
    """

    def __init__(self, tasks: Sequence[str], num_envs: int, whole: bool, window: int = 50) -> None:
        """``whole``: the first episodes start at their first step."""
        self.tasks = tuple(tasks)
        self.unstable_episodes = 0
        self._whole = np.full(num_envs, whole)
        self._return = np.zeros(num_envs)
        self._success = np.zeros(num_envs, dtype=bool)
        self._length = np.zeros(num_envs, dtype=np.int64)
        self._recent: list[deque[tuple[bool, float, int]]] = [deque(maxlen=window) for _ in tasks]
        self._share = np.full(len(tasks), np.nan)
        self.fast_success, self.slow_success = np.zeros(len(tasks)), np.zeros(len(tasks))

    def update(self, rollout: TensorDictBase) -> None:
        """Take in a rollout [B, T] with raw rewards."""

        def column(*key: str) -> NDArray:
            return rollout[key].squeeze(-1).cpu().numpy()

        reward, success = column("next", "reward"), column("next", "success")
        done, unstable = column("next", "done"), column("next", "unstable")
        task_idx = rollout["task_idx"].cpu().numpy()
        self.unstable_episodes += int(unstable.sum())
        self._share = np.bincount(task_idx.ravel(), minlength=len(self.tasks)) / task_idx.size
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
        """The ``<task>`` columns that come from episodes; NaN while there are none."""
        out: dict[str, float] = {}
        progress = self.fast_success - self.slow_success
        for task, recent, share, change in zip(self.tasks, self._recent, self._share, progress, strict=True):
            means = np.mean(recent, axis=0) if recent else (np.nan,) * 3
            names = ("success_rate", "return", "episode_length")
            out |= {f"train/{task}/{name}": float(mean) for name, mean in zip(names, means, strict=True)}
            out[f"train/{task}/share"], out[f"train/{task}/progress"] = float(share), float(change)
        return out

    def episodes(self) -> list[int]:
        """Whole episodes that the statistics of each task are of, [K], at most ``window``."""
        return [len(recent) for recent in self._recent]

    def state(self) -> dict[str, Any]:
        """A copy of all that the statistics go on from, as plain tensors and values."""
        return {
            "unstable_episodes": self.unstable_episodes,
            "recent": [[tuple(episode) for episode in recent] for recent in self._recent],
            **{name: torch.tensor(column) for name, column in self._columns().items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.unstable_episodes = state["unstable_episodes"]
        for recent, episodes in zip(self._recent, state["recent"], strict=True):
            recent.clear()
            recent.extend(episodes)
        for name, column in self._columns().items():
            column[:] = state[name].numpy()

    def _columns(self) -> dict[str, NDArray]:
        episodes = {"whole": self._whole, "return": self._return, "success": self._success, "length": self._length}
        return episodes | {"fast_success": self.fast_success, "slow_success": self.slow_success}
