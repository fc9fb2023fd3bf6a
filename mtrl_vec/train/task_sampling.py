"""Task sampling: which tasks new episodes get, and how much each task counts in the loss.

A method looks at the statistics of each iteration and updates task probabilities and task weights. Both are
distributions over the tasks: not negative, and 1 in sum. All of it is NumPy, a few numbers per task.

Shapes: ``K`` tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mtrl_vec.config.sampling import CurriculumConfig, DifficultyConfig, ProgressConfig, SamplingConfig, SuccessConfig

Array = NDArray[np.float64]

ENOUGH_EPISODES = 20
"""Minimum number of episodes before a success rate is trusted."""
PROGRESS_UNIT = 0.2
"""Unit of learning progress: a task with this much more is practised ``e`` times as much (at a temperature of 1)."""


@dataclass(frozen=True)
class TaskStatistics:
    """Statistics of one iteration, [K] each unless stated otherwise; NaN where nothing is known yet."""

    success: Array
    """Success rate of the last whole episodes."""
    fast_success: Array
    """Fast moving average of the success rate."""
    slow_success: Array
    """Slow moving average of the success rate."""
    critic_loss: Array
    """Loss of the critic."""
    frames: int
    """Environment steps so far, over all tasks."""
    episodes: NDArray[np.int64]
    """Number of whole episodes that the success rate is of, at most 50."""

    @property
    def learning_progress(self) -> Array:
        """How the success rate has changed of late, up or down, [K]."""
        return self.fast_success - self.slow_success


def with_floor(probs: Array, floor: float) -> Array:
    """Mix with the uniform distribution so that none is below ``floor``, [K] -> [K]."""
    return floor + (1 - len(probs) * floor) * probs


def softmax(values: Array) -> Array:
    """Probabilities by the exponentials of values, [K] -> [K]."""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def proportional(values: Array, temperature: float) -> Array:
    """Probabilities by non-negative values to the power of ``1 / temperature``; equal ones where all are zero."""
    powers = (values / values.max()) ** (1 / temperature) if values.max() > 0 else np.ones_like(values)
    return powers / powers.sum()


class Uniform:
    """Every environment keeps its task, and all tasks have equal weights. Also the base of the other methods.

    Args:
        config: of the method.
        tasks: names of the tasks.

    Attributes:
        task_probs: [K], with which episodes that start from now on draw their tasks; None where environments keep them.
        task_weights: [K], in the loss.
    """

    STATE: tuple[str, ...] = ("task_probs", "task_weights")
    """Attributes that the method continues from."""

    def __init__(self, config: SamplingConfig, tasks: tuple[str, ...]) -> None:
        self.num_tasks = k = len(tasks)
        self.task_probs: Array | None = None
        self.task_weights: Array = np.full(k, 1 / k)

    def update(self, statistics: TaskStatistics) -> None:
        """Look at an iteration, and update probabilities and weights."""

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that the method continues from, as plain tensors and values."""
        values = {name: getattr(self, name) for name in self.STATE}
        return {name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        for name in self.STATE:
            value = state[name]
            setattr(self, name, value.numpy().copy() if isinstance(value, torch.Tensor) else value)


class Random(Uniform):
    """A task drawn at random for every episode, with equal probabilities."""

    def __init__(self, config: SamplingConfig, tasks: tuple[str, ...]) -> None:
        super().__init__(config, tasks)
        self.task_probs = np.full(self.num_tasks, 1 / self.num_tasks)


class Success(Random):
    """Probabilities in proportion to one minus the success rate, and none below ``min_task_prob``.

    Equal where all tasks succeed or nothing is known yet.
    """

    def __init__(self, config: SuccessConfig, tasks: tuple[str, ...]) -> None:
        super().__init__(config, tasks)
        assert config.min_task_prob is not None  # settings of a run are resolved
        self._least = config.min_task_prob

    def update(self, statistics: TaskStatistics) -> None:
        """Follow the current success rates."""
        probs = proportional(1 - np.nan_to_num(statistics.success, nan=0.0), temperature=1.0)
        self.task_probs = with_floor(probs, self._least)


class Curriculum(Uniform):
    """One task after the other, in the order of ``curriculum``.

    A task is done when its success rate reaches ``curriculum_success``, or ``curriculum_frames`` environment steps (of
    all tasks) after it began. Tasks that are done keep a probability of ``min_task_prob`` each, so that they are not
    forgotten; those to come get nothing. After the last one all probabilities are equal.
    """

    STATE = (*Uniform.STATE, "_stage", "_stage_began")

    def __init__(self, config: CurriculumConfig, tasks: tuple[str, ...]) -> None:
        super().__init__(config, tasks)
        self._config = config
        assert config.min_task_prob is not None  # settings of a run are resolved
        self._least = config.min_task_prob
        self._order = [tasks.index(name) for name in config.curriculum or tasks]
        self._stage, self._stage_began = 0, 0
        self._set_probs()

    def update(self, statistics: TaskStatistics) -> None:
        """Advance to the next task if the current one is done."""
        if self._stage >= len(self._order):
            return
        limit = self._config.curriculum_frames
        task = self._order[self._stage]
        enough = statistics.episodes[task] >= ENOUGH_EPISODES
        learned = statistics.success[task] >= self._config.curriculum_success and enough
        if learned or (limit is not None and statistics.frames - self._stage_began >= limit):
            self._stage, self._stage_began = self._stage + 1, statistics.frames
            self._set_probs()

    def _set_probs(self) -> None:
        probs = np.full(self.num_tasks, 1 / self.num_tasks)
        if self._stage < len(self._order):
            done = self._order[: self._stage]
            probs[:] = 0.0
            probs[done] = self._least
            probs[self._order[self._stage]] = 1 - self._least * len(done)
        self.task_probs = probs


class Difficulty(Uniform):
    """Weights in the loss by difficulty. Environments keep their tasks.

    ``difficulty_by`` ``success``: in proportion to one minus the success rate. ``loss``: by how little the critic's
    loss has fallen, dynamic weight averaging (Liu, Johns, Davison 2019, eq. 7): the softmax of the ratios of the losses
    of the last two iterations. ``temperature`` flattens either.
    """

    STATE = (*Uniform.STATE, "_losses")

    def __init__(self, config: DifficultyConfig, tasks: tuple[str, ...]) -> None:
        super().__init__(config, tasks)
        self._config = config
        assert config.min_task_weight is not None  # settings of a run are resolved
        self._least = config.min_task_weight
        self._losses = np.full((2, self.num_tasks), np.nan)  # of the iteration before, and of the one before that

    def update(self, statistics: TaskStatistics) -> None:
        """Update the weights."""
        if self._config.difficulty_by == "success":
            weights = proportional(1 - np.nan_to_num(statistics.success, nan=0.0), self._config.temperature)
        else:
            self._losses = np.stack([statistics.critic_loss, self._losses[0]])
            ratios = np.nan_to_num(self._losses[0] / self._losses[1], nan=1.0, posinf=1.0)
            weights = softmax(ratios / self._config.temperature)
        self.task_weights = with_floor(weights, self._least)


class LearningProgress(Random):
    """Probabilities by absolute learning progress: practise what is being learned, or forgotten.

    A bandit over tasks as in Teacher-Student curriculum learning (Matiisen et al. 2017), with its Boltzmann
    distribution. Progress is the difference of a fast and a slow moving average of the success rate. Where little
    changes, probabilities are about equal. (In proportion to progress they would follow noise, and starve tasks that
    have not begun to be learned.)
    """

    def __init__(self, config: ProgressConfig, tasks: tuple[str, ...]) -> None:
        super().__init__(config, tasks)
        self._config = config
        assert config.min_task_prob is not None  # settings of a run are resolved
        self._least = config.min_task_prob

    def update(self, statistics: TaskStatistics) -> None:
        """Follow the current progress."""
        progress = np.abs(statistics.learning_progress)
        probs = softmax(progress / (PROGRESS_UNIT * self._config.temperature))
        self.task_probs = with_floor(probs, self._least)
