"""The settings of task sampling: a class for each method, with what only that method reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mtrl_vec.config.checks import check_fields, require
from mtrl_vec.errors import InputError
from mtrl_vec.tasks.suite import resolve_tasks


@dataclass(frozen=True)
class UniformConfig:
    """Every environment keeps its task."""

    name: ClassVar[str] = "uniform"
    keeps_tasks: ClassVar[bool] = True
    """Whether environments keep the tasks that they start with."""

    def for_tasks(self, tasks: tuple[str, ...]) -> SamplingConfig:
        """These settings, resolved for a list of tasks. Raises InputError where they do not suit it."""
        return self


@dataclass(frozen=True)
class RandomConfig(UniformConfig):
    """A task is drawn for every episode, with equal probabilities."""

    name: ClassVar[str] = "random"
    keeps_tasks: ClassVar[bool] = False


@dataclass(frozen=True)
class CurriculumConfig(UniformConfig):
    """One task after the other."""

    name: ClassVar[str] = "curriculum"
    keeps_tasks: ClassVar[bool] = False
    curriculum: tuple[str, ...] | None = None
    """The tasks in the order to learn them. By default the order of --tasks."""
    curriculum_success: float = 0.9
    """Success rate at which a task is done."""
    curriculum_frames: int | None = None
    """Environment steps after which it is done in any case."""
    min_task_prob: float | None = None
    """Probability of each task that is done. By default 0.3 / K."""

    def __post_init__(self) -> None:
        check_fields(self, positive=("curriculum_frames",), fraction=("curriculum_success", "min_task_prob"))

    def for_tasks(self, tasks: tuple[str, ...]) -> SamplingConfig:
        """See `UniformConfig.for_tasks`."""
        least = _least(self, "min_task_prob", tasks)
        order = tasks if self.curriculum is None else tuple(task.name for task in resolve_tasks(self.curriculum))
        problem = f"must be an order of {', '.join(tasks)}"
        require(sorted(order) == sorted(tasks), "curriculum", ", ".join(order), problem)
        return dataclasses.replace(self, curriculum=order, min_task_prob=least)


@dataclass(frozen=True)
class DifficultyConfig(UniformConfig):
    """Every environment keeps its task; tasks that are difficult get larger weights in the loss."""

    name: ClassVar[str] = "difficulty"
    difficulty_by: Literal["success", "loss"] = "success"
    """Measure of difficulty. success: one minus the success rate. loss: how slowly the critic's loss falls."""
    temperature: float = 1.0
    """Flattens the weights; 1 is in proportion to what fails."""
    min_task_weight: float | None = None
    """Least weight of a task; all weights sum to 1. By default 0.3 / K."""

    def __post_init__(self) -> None:
        check_fields(self, positive=("temperature",), fraction=("min_task_weight",))

    def for_tasks(self, tasks: tuple[str, ...]) -> SamplingConfig:
        """See `UniformConfig.for_tasks`."""
        return dataclasses.replace(self, min_task_weight=_least(self, "min_task_weight", tasks))


@dataclass(frozen=True)
class SuccessConfig(UniformConfig):
    """Probabilities in proportion to one minus the success rate: tasks that fail are practised more."""

    name: ClassVar[str] = "success"
    keeps_tasks: ClassVar[bool] = False
    min_task_prob: float | None = None
    """Least probability of a task, without which it would be forgotten once it is learned. By default 0.4 / K."""

    def __post_init__(self) -> None:
        check_fields(self, fraction=("min_task_prob",))

    def for_tasks(self, tasks: tuple[str, ...]) -> SamplingConfig:
        """See `UniformConfig.for_tasks`."""
        return dataclasses.replace(self, min_task_prob=_least(self, "min_task_prob", tasks, 0.4 / len(tasks)))


@dataclass(frozen=True)
class ProgressConfig(UniformConfig):
    """Probabilities by learning progress: tasks whose success rate changes are practised more."""

    name: ClassVar[str] = "progress"
    keeps_tasks: ClassVar[bool] = False
    temperature: float = 1.0
    """Flattens the probabilities."""
    min_task_prob: float | None = None
    """Least probability of a task. By default 0.3 / K."""

    def __post_init__(self) -> None:
        check_fields(self, positive=("temperature",), fraction=("min_task_prob",))

    def for_tasks(self, tasks: tuple[str, ...]) -> SamplingConfig:
        """See `UniformConfig.for_tasks`."""
        return dataclasses.replace(self, min_task_prob=_least(self, "min_task_prob", tasks))


@dataclass(frozen=True)
class MetaConfig(ProgressConfig):
    """Probabilities chosen by a small network whose reward is learning progress."""

    name: ClassVar[str] = "meta"
    meta_lr: float = 0.01
    """Learning rate of the network."""

    def __post_init__(self) -> None:
        check_fields(self, positive=("temperature", "meta_lr"), fraction=("min_task_prob",))


SamplingConfig = UniformConfig  # what the methods have in common
SAMPLING_CONFIGS: dict[str, type[SamplingConfig]] = {
    config.name: config
    for config in (
        *(UniformConfig, SuccessConfig, RandomConfig, CurriculumConfig, DifficultyConfig, ProgressConfig),
        MetaConfig,
    )
}
"""The methods by name."""


def make_sampling_config(name: str, **settings: Any) -> SamplingConfig:
    """The configuration of a method.

    Args:
        name: of the method.
        settings: its fields.

    Raises:
        InputError: an unknown method, a setting that it does not have, or one with a value that does not work.
    """
    if name not in SAMPLING_CONFIGS:
        raise InputError(f"task_sampling is {name}: it must be one of {', '.join(SAMPLING_CONFIGS)}")
    fields = {field.name for field in dataclasses.fields(SAMPLING_CONFIGS[name])}
    for setting, value in settings.items():
        readers = [method for method, config in SAMPLING_CONFIGS.items() if hasattr(config, setting)]
        if setting not in fields:
            raise InputError(f"{setting} is {value}: it is only read with --task-sampling {' or '.join(readers)}")
    return SAMPLING_CONFIGS[name](**settings)


def _least(config: SamplingConfig, name: str, tasks: tuple[str, ...], default: float | None = None) -> float:
    """The least probability or weight of a task, checked, or its default."""
    k, value = len(tasks), getattr(config, name)
    if value is None:
        return default or 3 / (10 * k)  # rounds to 0.1 for three tasks
    require(value * k <= 1, name, value, f"must be at most 1/{k}, since there are {k} tasks")
    return float(value)
