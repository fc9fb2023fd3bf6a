"""`TrainConfig`: all settings of a training run, in their groups."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtrl_vec.config.checks import check_seed, require
from mtrl_vec.config.sampling import (
    SAMPLING_CONFIGS,
    CurriculumConfig,
    SamplingConfig,
    SuccessConfig,
    UniformConfig,
    make_sampling_config,
)
from mtrl_vec.config.sections import EnvironmentConfig, LearnerConfig, PolicyConfig, RuntimeConfig
from mtrl_vec.errors import InputError
from mtrl_vec.tasks.task import MAX_EPISODE_STEPS

SECTIONS = {
    "environment": EnvironmentConfig,
    "policy": PolicyConfig,
    "learner": LearnerConfig,
    "runtime": RuntimeConfig,
}
"""The groups whose settings have a name of their own, so that `TrainConfig.replace` finds them."""
_GROUP_OF = {f.name: section for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Shapes: ``B`` environments, ``T`` steps per rollout, ``K`` tasks.

    `TrainConfig.of` and `replace` take the settings of all groups by name: ``TrainConfig.of(num_envs=720, lr=1e-3)``.
    """

    seed: int = 1
    """Seed of the environments, the initial weights and the actions."""
    init_from: Path | None = None
    """Checkpoint of a trained policy to start from."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sampling: SamplingConfig = field(default_factory=SuccessConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        self.sampling.for_tasks(self.tasks)  # raises where it does not suit them
        frames, minibatches = self.frames_per_batch, self.learner.num_minibatches
        problem = f"must be at most the {frames} frames of a rollout (num_envs * num_steps)"
        require(minibatches <= frames, "num_minibatches", minibatches, problem)
        if self.sampling.keeps_tasks:
            problem = f"must be at least the {self.num_tasks} tasks: with --task-sampling {self.sampling.name}, "
            problem += "environments keep their tasks"
            require(self.num_envs >= self.num_tasks, "num_envs", self.num_envs, problem)
        self._check_task_weights()

    def _check_task_weights(self) -> None:
        weights, k = self.learner.task_weights, len(self.tasks)
        if weights is None:
            return
        require(len(weights) == k, "task_weights", weights, f"must be {k} numbers, one for each task")
        ok = all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
        require(ok, "task_weights", weights, "must not be negative, and not all zero")
        ok = self.sampling.name != "curriculum" or min(weights) > 0
        require(ok, "task_weights", weights, "must be positive in a curriculum: it waits for each to be learned")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the policy's heads."""
        return self.environment.tasks

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.tasks)

    @property
    def num_envs(self) -> int:
        """B."""
        return self.environment.num_envs or min(max(360, 72 * self.num_tasks), 1440)

    @property
    def max_episode_steps(self) -> int:
        """Time limit of an episode, in environment steps."""
        return self.environment.max_episode_steps or (100 if self.num_tasks <= 3 else 150)

    @property
    def target_kl(self) -> float | None:
        """KL divergence by which an iteration moves the policy, in nats; None: the learning rate is constant."""
        target = self.learner.target_kl
        return 0.02 * min(max(1, self.num_envs / 360), 2) if target == "auto" else target

    @property
    def final_kl_fraction(self) -> float:
        """Fraction of `target_kl` that is left at the end."""
        fraction = self.learner.final_kl_fraction
        return (0.5 if self.num_tasks <= 3 else 0.2) if fraction is None else fraction

    @property
    def exploration_delay(self) -> int:
        """Environment steps of a task after which it begins to explore, see `LearnerConfig.hold_std`."""
        delay = self.learner.exploration_delay
        return (150_000 if self.num_tasks <= 3 else 0) if delay is None else delay

    @property
    def total_frames(self) -> int:
        """Environment steps to train for."""
        per_task = 360_000 if self.num_tasks <= 10 else 500_000
        return self.runtime.total_frames or max(2_000_000, per_task * self.num_tasks)

    @property
    def eval_interval(self) -> int:
        """Frames between evaluations while training; 0: none."""
        interval = self.runtime.eval_interval
        return max(250_000, self.total_frames // 8) if interval is None else interval

    @property
    def eval_episodes(self) -> int:
        """Episodes per task of such an evaluation."""
        return self.runtime.eval_episodes or (60 if self.num_tasks <= 3 else 30)

    @property
    def frames_per_batch(self) -> int:
        """Frames per iteration, ``B * T``."""
        return self.num_envs * self.learner.num_steps

    @property
    def minibatch_size(self) -> int:
        """Frames per optimiser step."""
        return self.frames_per_batch // self.learner.num_minibatches

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run."""
        return -(-self.total_frames // self.frames_per_batch)

    @classmethod
    def of(cls, **settings: Any) -> TrainConfig:
        """The defaults but for some settings of any group, see `replace`."""
        return cls().replace(**settings)

    def replace(self, **settings: Any) -> TrainConfig:
        """A copy with other settings.

        Args:
            settings: ``seed``, ``init_from``, ``sampling`` (a configuration, or the name of a method with its
                defaults), or any field of the other groups.

        Raises:
            InputError: a setting that does not exist, or a value that does not work.
        """
        groups: dict[str, dict[str, Any]] = {}
        changes: dict[str, Any] = {}
        for name, value in settings.items():
            if name in _GROUP_OF:
                groups.setdefault(_GROUP_OF[name], {})[name] = value
            elif name == "sampling" and isinstance(value, str):
                changes[name] = make_sampling_config(value)
            elif name in {f.name for f in dataclasses.fields(self)}:
                changes[name] = value
            else:
                raise InputError(f"there is no setting {name!r}: see mtrl_vec.config.TrainConfig for those that exist")
        if "tasks" in settings and self.learner.task_weights is not None:
            groups.setdefault("learner", {}).setdefault("task_weights", None)  # those of other tasks
        for group, values in groups.items():
            changes[group] = dataclasses.replace(changes.get(group, getattr(self, group)), **values)
        if isinstance(self.sampling, CurriculumConfig) and "tasks" in settings:
            changes.setdefault("sampling", dataclasses.replace(self.sampling, curriculum=None))
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values in groups, for JSON and checkpoints."""
        groups = {name: _plain(dataclasses.asdict(getattr(self, name))) for name in SECTIONS}
        sampling = {"method": self.sampling.name, **_plain(dataclasses.asdict(self.sampling))}
        start = None if self.init_from is None else str(self.init_from)
        return {"seed": self.seed, "init_from": start, **groups, "sampling": sampling}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; missing fields get their defaults. Raises KeyError or TypeError on unknown ones."""
        values = dict(values)
        groups = {name: _sequences(values.pop(name)) for name in SECTIONS}
        if (folder := groups["runtime"].get("run_dir")) is not None:
            groups["runtime"]["run_dir"] = Path(folder)
        if values.get("init_from") is not None:
            values["init_from"] = Path(values["init_from"])
        sampling = _sequences(values.pop("sampling"))
        method = SAMPLING_CONFIGS[sampling.pop("method")]
        sections = {name: SECTIONS[name](**fields) for name, fields in groups.items()}
        return cls(**values, **sections, sampling=method(**sampling))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def _sequences(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


PRESETS: dict[str, TrainConfig] = {
    "cpu": TrainConfig(),
    # Wider and with larger minibatches: on a GPU an update takes no time, so that the simulators are all there is to
    # wait for, and they prefer to be many per worker. Fewer updates per frame need more frames. Not yet tried on a GPU.
    "gpu": TrainConfig.of(
        num_envs=1440,
        num_epochs=6,
        num_minibatches=6,
        total_frames=4_000_000,
        precision="bf16",
        compile="on",
        cuda_graphs=True,
    ),
    # The values of the tutorial that this project grew from, without its mistakes. Its batch of 512 frames is what 24
    # minibatches of 192 environments and 64 steps come to.
    "tutorial": TrainConfig.of(
        num_envs=192,
        num_steps=64,
        torso=(512, 512),
        head=128,
        popart=False,
        bounded_mean=False,
        init_std=1.0,
        final_std=1.0,
        learn_std=False,
        noise_correlation=0.0,
        hold_std=False,
        sampling=UniformConfig(),
        num_epochs=4,
        num_minibatches=24,
        lr=3e-4,
        target_kl=None,
        gamma=0.99,
        gae_lambda=0.95,
        clip_epsilon=0.2,
        max_grad_norm=0.5,
        max_episode_steps=MAX_EPISODE_STEPS,
        random_phase=False,
        relative_features=False,
        success_bonus=0.0,
        normalize_observation=False,
        direct_features=False,
        normalize_reward=False,
        per_task_advantage=False,
    ),
}
"""Named starting points for `train --preset`; ``cpu`` holds the defaults."""
