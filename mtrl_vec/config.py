"""Everything that can be set about a training run, validated before anything starts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mtrl_vec.errors import InputError
from mtrl_vec.tasks import MAX_EPISODE_STEPS, TASKS, resolve_tasks

MAX_SEED = 2**32 - 1
"""NumPy's and Meta-World's seeds have 32 bits."""

Device = Literal["auto", "cpu", "cuda"]
Compile = Literal["auto", "off", "on"]
Precision = Literal["auto", "fp32", "bf16"]
ScheduleName = Literal["uniform", "random", "curriculum", "difficulty", "progress", "meta"]
Balance = Literal["none", "pcgrad", "cagrad"]
DifficultyBy = Literal["success", "loss"]
CHOICES = {
    "device": get_args(Device),
    "compile": get_args(Compile),
    "precision": get_args(Precision),
    "schedule": get_args(ScheduleName),
    "difficulty_by": get_args(DifficultyBy),
    "balance": get_args(Balance),
}
USED_BY = {
    **dict.fromkeys(("curriculum", "curriculum_success", "curriculum_frames"), ("curriculum",)),
    "difficulty_by": ("difficulty",),
    "meta_lr": ("meta",),
    "temperature": ("difficulty", "progress", "meta"),
    "share_floor": ("curriculum", "difficulty", "progress", "meta"),
}
"""Settings that only some schedules look at."""

HOW_NOT_WHAT = {
    *("device", "compile", "cuda_graphs", "precision", "num_workers", "run_dir", "overwrite", "quiet", "wandb"),
    *("total_frames", "checkpoint_seconds", "max_restarts", "max_skipped_updates", "eval_interval", "eval_episodes"),
}
"""Settings that may change when a run is resumed: how and how long it runs, not what is learned."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Shapes: ``B`` environments, ``T`` steps per rollout, ``K`` tasks."""

    tasks: tuple[str, ...] = tuple(task.name for task in TASKS)
    """Tasks to learn together; in equal shares, unless --schedule says otherwise."""
    total_frames: int = 2_000_000
    """Environment steps to train for, over all tasks; rounded up to whole iterations."""
    seed: int = 1
    """Seed of the environments, the initial weights and the actions."""
    device: Device = "auto"
    """Where the policy lives and learns. auto: CUDA when there is one."""
    compile: Compile = "auto"
    """Compile advantages and loss with torch.compile, and acting on CUDA. auto: on CUDA only. On 2 CPU cores
    compiled updates are slower, since they compute all heads for all rows."""
    cuda_graphs: bool = True
    """On CUDA, replay optimiser steps as one CUDA graph each."""
    precision: Precision = "auto"
    """Of forward passes and losses; weights, their gradients and the optimiser are always fp32. auto: bf16 on CUDA,
    fp32 on the CPU."""
    overlap: bool = False
    """Collect the next rollout while learning from the last one, with a policy that is one iteration behind."""
    run_dir: Path | None = None
    """Where results go. By default a new folder under runs/."""
    overwrite: bool = False
    """Replace the run in --run-dir if there is one."""
    quiet: bool = False
    """Show nothing but events and errors."""
    wandb: bool = False
    """Also log to Weights & Biases, which has to be installed."""
    checkpoint_seconds: float = 60.0
    """Between checkpoints, of which the last three are kept. 0: after every iteration."""
    max_restarts: int = 3
    """How often in a run simulator processes that died are replaced. It goes on from the last whole iteration, as if
    nothing had happened."""
    max_skipped_updates: int = 36
    """Optimiser steps are skipped where loss or gradients are not finite. A run stops after an iteration that ends with
    this many in a row, with a diagnosis."""

    num_envs: int = 360
    """B, simulations running side by side. 120 a task: most numbers of workers share them evenly."""
    num_workers: int | None = None
    """Simulator processes, over which the environments are spread evenly. By default what suits the machine."""
    max_episode_steps: int = 100
    """Time limit of an episode, in environment steps. Meta-World's own, which `eval` keeps to, is 500; but a policy
    that works needs few (the pretrained one at most 49 on 180 fresh goals), and practises more with a new start than
    with holding on to the goal."""
    goals_seed: int | None = None
    """Train on Meta-World's 50 fixed goals per task for this benchmark seed, instead of fresh goals every episode."""
    random_phase: bool = True
    """Start the environments at random points of their first episode, so that resets are spread over time."""

    torso: tuple[int, int] = (256, 256)
    """Widths of the two hidden layers that the tasks share, and actor and critic as well."""
    head: int = 128
    """Width of the hidden layer of each task's head."""
    init_std: float = 1.0
    """Initial standard deviation of the actions, in units of the action range's half width."""
    final_std: float = 0.3
    """Limit of the standard deviation at the end; it falls linearly from init_std between 40 and 90 % of the run. It is
    the mean action that gets evaluated, and it must not come to rely on the noise."""
    learn_std: bool = True
    """Learn the standard deviation, one per task and action dimension; otherwise it stays at its limit."""

    num_steps: int = 32
    """T, steps per environment and iteration."""
    num_epochs: int = 6
    """Passes over a rollout."""
    num_minibatches: int = 6
    """Minibatches per pass."""
    lr: float = 3e-4
    """Adam's learning rate; the initial one where target_kl adapts it, within 1e-5 and 3e-3."""
    target_kl: float | None = 0.02
    """Adapt the learning rate so that one iteration moves the policy by this KL divergence, in nats. None: constant."""
    final_kl_fraction: float = 0.2
    """Fraction of target_kl that is left at the end; annealed linearly until 90 % of the run."""
    eval_interval: int = 250_000
    """Frames between evaluations while training; the policy that does best in them is kept in best.pt. 0: none."""
    eval_episodes: int = 60
    """Episodes per task of such an evaluation, rounded up to what the workers share evenly: always the same goals, mean
    action, the time limit of training."""

    schedule: ScheduleName = "uniform"
    """Which tasks to practise, and how to weigh them in the loss: see `mtrl_vec.schedule`. uniform: every environment
    keeps its task. random: drawn for each episode. curriculum: one task after the other. difficulty: weights by what
    fails. progress: shares by learning progress. meta: shares chosen by a network that is paid in learning progress."""
    share_floor: float = 0.1
    """Of the share (curriculum, once it is done; progress, meta) or weight (difficulty) of each task."""
    temperature: float = 1.0
    """Flattens the weights of difficulty (1: in proportion) and the shares of progress and meta."""
    curriculum: tuple[str, ...] | None = None
    """The tasks in the order to learn them. By default the order of --tasks."""
    curriculum_success: float = 0.9
    """Success rate at which a task of the curriculum is done."""
    curriculum_frames: int | None = None
    """Environment steps after which it is done in any case."""
    difficulty_by: DifficultyBy = "success"
    """What is difficult: success, what fails; loss, where the critic's loss falls slowly."""
    meta_lr: float = 0.01
    """Learning rate of the meta-controller."""
    balance: Balance = "none"
    """How the tasks' gradients over the shared torso are combined: see `mtrl_vec.balance`. none: added up."""
    task_weights: tuple[float, ...] | None = None
    """Fixed weights of the tasks in the loss, times those of the schedule, in the order of --tasks. Any scale."""

    success_bonus: float = 5.0
    """Added to Meta-World's reward (at most 10) in every step that counts as a success, for learning only. Reach needs
    it: a hand 6 cm from the goal gets 9.8 and no success, and one inside of 5 cm gets 10."""
    gamma: float = 0.99
    """Discount per environment step."""
    gae_lambda: float = 0.97
    """Lambda of generalised advantage estimation."""
    clip_epsilon: float = 0.2
    """PPO's clipping range of the probability ratio."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    critic_coeff: float = 0.5
    """Weight of the critic's squared error."""
    max_grad_norm: float = 1.0
    """Clipping of the global gradient norm."""
    relative_inputs: bool = True
    """Show the policy motions and distances instead of positions alone (see `mtrl_vec.policy.relative_features`)."""
    normalize_observation: bool = True
    """Normalise observations by their running mean and variance."""
    normalize_reward: bool = True
    """Scale each task's reward by the running standard deviation of its discounted return."""
    popart: bool = False
    """Normalise each task's values by running statistics of their targets (PopArt), whatever their scale."""
    per_task_advantage: bool = True
    """Normalise advantages within each task, instead of over the whole rollout."""

    def __post_init__(self) -> None:
        _require(not isinstance(self.tasks, str), "tasks", self.tasks, "must be a list of names")
        resolved = tuple(task.name for task in resolve_tasks(self.tasks))
        object.__setattr__(self, "tasks", resolved)
        positive = (
            "total_frames num_envs max_episode_steps head init_std final_std num_steps num_epochs num_minibatches lr"
        )
        for name in (
            *positive.split(),
            "temperature",
            "meta_lr",
            "eval_episodes",
            "clip_epsilon",
            "max_grad_norm",
            "max_skipped_updates",
        ):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        not_negative = "eval_interval success_bonus entropy_coeff critic_coeff checkpoint_seconds max_restarts"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _require(not isinstance(value, float) or math.isfinite(value), field.name, value, "must be finite")
        for name, choices in CHOICES.items():
            _require(getattr(self, name) in choices, name, getattr(self, name), f"must be one of {', '.join(choices)}")
        for name in ("seed", "goals_seed"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= MAX_SEED, name, value, f"must be between 0 and {MAX_SEED}")
        for name in ("gamma", "gae_lambda", "final_kl_fraction", "share_floor", "curriculum_success"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be between 0 and 1")
        for name in not_negative.split():
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        _require(len(self.torso) == 2 and min(self.torso) > 0, "torso", self.torso, "must be two positive widths")
        _require(self.target_kl is None or self.target_kl > 0, "target_kl", self.target_kl, "must be positive or None")
        self._check_schedule()
        workers = self.num_workers
        _require(workers is None or workers > 0, "num_workers", workers, "must be positive")
        share = (workers or 1) * len(self.tasks)
        _require(
            self.num_envs % share == 0,
            "num_envs",
            self.num_envs,
            f"must be a multiple of {share}: {workers or 1} worker(s) times {len(self.tasks)} task(s)",
        )
        _require(
            self.frames_per_batch % self.num_minibatches == 0,
            "num_minibatches",
            self.num_minibatches,
            f"must divide the {self.frames_per_batch} frames of a rollout (num_envs * num_steps)",
        )

    def _check_schedule(self) -> None:
        k, floor, frames, weights = len(self.tasks), self.share_floor, self.curriculum_frames, self.task_weights
        _require(floor * k <= 1, "share_floor", floor, f"must be at most 1/{k}, as there are {k} tasks")
        _require(frames is None or frames > 0, "curriculum_frames", frames, "must be positive or None")
        if self.curriculum is not None:
            order = tuple(task.name for task in resolve_tasks(self.curriculum))
            object.__setattr__(self, "curriculum", order)
            names = ", ".join(self.tasks)
            _require(
                sorted(order) == sorted(self.tasks), "curriculum", ", ".join(order), f"must be an order of {names}"
            )
        if weights is not None:
            _require(len(weights) == k, "task_weights", weights, f"must be {k} numbers, one for each task")
            ok = all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
            _require(ok, "task_weights", weights, "must not be negative, and not all zero")
            ok = self.schedule != "curriculum" or min(weights) > 0
            _require(ok, "task_weights", weights, "must be positive in a curriculum: it waits for each to be learned")
        for name, schedules in USED_BY.items():
            value = getattr(self, name)  # whose default is the class's attribute
            used = self.schedule in schedules or value == getattr(type(self), name)
            _require(used, name, value, f"must stay as it is without --schedule {' or '.join(schedules)}")

    def compiles(self, device_type: str) -> bool:
        """Whether to compile on ``cpu`` or ``cuda``."""
        return self.compile == "on" or (self.compile == "auto" and device_type == "cuda")

    @property
    def frames_per_batch(self) -> int:
        """Frames per iteration, ``B * T``."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        """Frames per optimiser step."""
        return self.frames_per_batch // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run."""
        return -(-self.total_frames // self.frames_per_batch)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON and checkpoints."""
        values = dataclasses.asdict(self)
        values["run_dir"] = None if self.run_dir is None else str(self.run_dir)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def differences(self, other: TrainConfig) -> dict[str, Any]:
        """The settings, with their values here, in which this differs from another one."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if getattr(self, name) != getattr(other, name)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Raises TypeError on unknown fields."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        values["run_dir"] = None if values["run_dir"] is None else Path(values["run_dir"])
        return cls(**values)


def _require(condition: bool, name: str, value: object, problem: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value}: it {problem}")


PRESETS: dict[str, TrainConfig] = {
    "cpu": TrainConfig(),
    # Wider and with larger minibatches: a GPU has an update done in no time, so that the simulators are all there is to
    # wait for, and they prefer to be many per worker. Fewer updates per frame want more frames. Not yet tried on a GPU.
    "gpu": TrainConfig(num_envs=1440, total_frames=4_000_000, eval_interval=500_000),
    # The values of the tutorial that this project grew from, without its mistakes. Its batch of 512 frames is what 24
    # minibatches of 192 environments and 64 steps come to.
    "tutorial": TrainConfig(
        num_envs=192,
        num_steps=64,
        torso=(512, 512),
        head=128,
        init_std=1.0,
        final_std=1.0,
        learn_std=False,
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
        relative_inputs=False,
        success_bonus=0.0,
        normalize_observation=False,
        normalize_reward=False,
        per_task_advantage=False,
    ),
}
"""Named starting points for `train --preset`. Without one it is ``gpu`` where CUDA is used, else ``cpu``."""
