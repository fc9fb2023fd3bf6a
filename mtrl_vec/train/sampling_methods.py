"""The methods of task sampling by name, and the weights that they come to in the loss.

Shapes: ``K`` tasks.
"""

from __future__ import annotations

import numpy as np

from mtrl_vec.config import TrainConfig
from mtrl_vec.train.meta_sampling import Meta
from mtrl_vec.train.task_sampling import Curriculum, Difficulty, LearningProgress, Random, Success, Uniform

METHODS: dict[str, type[Uniform]] = {
    "uniform": Uniform,
    "success": Success,
    "random": Random,
    "curriculum": Curriculum,
    "difficulty": Difficulty,
    "progress": LearningProgress,
    "meta": Meta,
}


def make_task_sampling(config: TrainConfig) -> Uniform:
    """The method that a configuration asks for."""
    seed = {"seed": config.seed} if config.sampling.name == "meta" else {}
    return METHODS[config.sampling.name](config.sampling.for_tasks(config.tasks), config.tasks, **seed)


def loss_weights(task_weights: np.ndarray, fixed: tuple[float, ...] | None) -> list[float]:
    """Task weights [K] of a method times fixed ones, [K], 1 in sum."""
    by_hand = np.array(fixed or np.ones(len(task_weights)))
    weights = task_weights * by_hand
    if not weights.any():  # the method wants only tasks that are switched off
        weights = by_hand
    return (weights / weights.sum()).tolist()
