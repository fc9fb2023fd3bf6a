"""The commands and their flags.

Everything is a dataclass that tyro turns into flags, flat whatever its groups. Nothing heavy is imported, so that
``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mtrl_vec.config import EnvironmentConfig, LearnerConfig, PolicyConfig, RuntimeConfig, TrainConfig
from mtrl_vec.config.sampling import SamplingConfig, SuccessConfig, make_sampling_config

CHECKPOINT_HELP = (
    "checkpoint file; the folder of a run, for its best policy; one that is included: 'pretrained' (three tasks), "
    "'pretrained-mt10' or 'pretrained-mt50'; or hf:owner/name, one on the Hugging Face Hub"
)

Method = Literal["uniform", "success", "random", "curriculum", "difficulty", "progress", "meta"]


@dataclass(frozen=True)
class SamplingFlags:
    """Task sampling: which tasks new episodes get, and how much each task counts in the loss.

    Settings that the chosen method does not use are rejected; None means the method's default.
    """

    task_sampling: Method = "success"
    """success: more episodes of what fails. uniform: every environment keeps its task. random: a task is drawn for each
    episode. curriculum: one task after the other. difficulty: larger weights for what fails. progress: probabilities by
    learning progress. meta: probabilities chosen by a small network whose reward is learning progress."""
    curriculum: tuple[str, ...] | None = None
    """With curriculum: the tasks in the order to learn them. By default the order of --tasks."""
    curriculum_success: float | None = None
    """With curriculum: success rate at which a task is done. By default 0.9."""
    curriculum_frames: int | None = None
    """With curriculum: environment steps after which a task is done in any case. By default no limit."""
    min_task_prob: float | None = None
    """With success, progress and meta: least probability of a task; with curriculum: probability of each that is done.
    By default 0.4 / K with success, and 0.3 / K with the others."""
    min_task_weight: float | None = None
    """With difficulty: minimum weight of a task in the loss; all weights sum to 1. By default 0.3 / K."""
    temperature: float | None = None
    """With difficulty, progress and meta: flattens weights or probabilities. By default 1."""
    difficulty_by: Literal["success", "loss"] | None = None
    """With difficulty: what makes a task difficult. success (default): it fails. loss: its critic loss falls slowly."""
    meta_lr: float | None = None
    """With meta: learning rate of the network. By default 0.01."""

    @classmethod
    def of(cls, config: SamplingConfig) -> SamplingFlags:
        """The flags that mean a configuration."""
        return cls(config.name, **dataclasses.asdict(config))  # type: ignore[arg-type]

    def config(self) -> SamplingConfig:
        """The configuration that the flags mean. Raises InputError."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return make_sampling_config(given.pop("task_sampling"), **given)


_GROUPS = ("seed", "init_from", "environment", "policy", "learner", "runtime")


@dataclass(frozen=True)
class TrainCommand:
    """Train one policy on all tasks, or continue a run.

    Example: python -m mtrl_vec train --tasks push-v3 --total-frames 2000000
    """

    resume: Path | None = None
    """Continue the run in this folder. Only runtime flags may change, except --run-dir and --overwrite."""
    preset: Literal["cpu", "gpu", "tutorial"] = "cpu"
    """Other defaults; other flags override them."""
    seed: int = 1
    """Seed of the environments, the initial weights and the actions."""
    init_from: Path | None = None
    """Start from the policy of this checkpoint (or run, or 'pretrained'): its torso, statistics, and the heads of tasks
    that it knows by name; other tasks get fresh heads."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sampling: SamplingFlags = field(default_factory=lambda: SamplingFlags.of(SuccessConfig()))
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @classmethod
    def of(cls, config: TrainConfig, **others: Any) -> Any:
        """The command whose flags mean a configuration."""
        groups = {name: getattr(config, name) for name in _GROUPS}
        return cls(**groups, sampling=SamplingFlags.of(config.sampling), **others)

    def config(self) -> TrainConfig:
        """The configuration that the flags mean. Raises InputError."""
        groups = {name: getattr(self, name) for name in _GROUPS}
        return TrainConfig(**groups, sampling=self.sampling.config())


@dataclass(frozen=True)
class ProfileCommand(TrainCommand):
    """Train for a few iterations and show where the time goes; leaves a trace for Perfetto. Takes the flags of train.

    Example: python -m mtrl_vec profile --iterations 5 --json profile.json
    """

    iterations: int = 5
    """Iterations to measure; some more run before them to warm up, and one after, for the trace."""
    json: Path | None = None
    """Also write the numbers to this file."""


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate trained policies under Meta-World's official protocol: 50 goals per task and seed, mean action.

    Runs in Meta-World's own environments, which do not have tasks of your own: leave those out of --tasks.

    Example: python -m mtrl_vec eval runs/my-run pretrained --seeds 100 200 --json results.json
    """

    checkpoints: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(help=f"Each a {CHECKPOINT_HELP}; or an ONNX file written by export."),
    ]
    tasks: tuple[str, ...] | None = None
    """Which of the policies' tasks; by default all. Each has the same goals as when all are evaluated."""
    seeds: tuple[int, ...] = (100,)
    """Seeds of Meta-World's goals, 1 or more; each is another 50 goals a task."""
    num_workers: int | None = None
    """Processes, each with a task and seed at a time. By default one per core. Results do not depend on it."""
    json: Path | None = None
    """Also write the results to this file."""
    quiet: bool = False
    """Show nothing but the results, and no progress."""


@dataclass(frozen=True)
class PlotCommand:
    """Draw success and return of runs, over frames and over time. Runs that differ only in seed are one curve.

    Of more than six tasks: mean success, the number of tasks at 98 %, and a small panel per task.

    Example: python -m mtrl_vec plot runs/a runs/b --out curves
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, or files like their metrics.csv."""
    out: Path = Path("learning")
    """Where to: gets the endings .png and .svg."""
    quiet: bool = False
    """Do not print the names of the files."""


@dataclass(frozen=True)
class VideoCommand:
    """Film a policy on several tasks at once: its mean actions, on fresh goals.

    Example: python -m mtrl_vec video pretrained --out video
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help=f"A {CHECKPOINT_HELP}.")]
    out: Path = Path("video")
    """Where to: gets the endings .mp4 and .gif."""
    tasks: tuple[str, ...] | None = None
    """Which of the policy's tasks; by default all."""
    episodes: int = 2
    """Episodes of each task, one after the other."""
    seed: int = 0
    """Seed of the goals."""
    quiet: bool = False
    """Do not print the names of the files."""


@dataclass(frozen=True)
class ExportCommand:
    """Write a policy as an ONNX model, for programs without PyTorch: normalisation and routing are in it.

    Inputs: observation [n, 39] float32 and task_idx [n] int64. Output: action [n, 4], the mean one, within [-1, 1].

    Example: python -m mtrl_vec export runs/my-run --onnx policy.onnx
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help=f"A {CHECKPOINT_HELP}.")]
    onnx: Path = Path("policy.onnx")
    """Output file; ends in .onnx."""
    quiet: bool = False
    """Do not print the names of the files."""


@dataclass(frozen=True)
class PushCommand:
    """Upload a policy with a model card to the Hugging Face Hub; log in first, with: hf auth login

    Example: python -m mtrl_vec push runs/my-run my-name/mt10 --results results.json
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help=f"A {CHECKPOINT_HELP}.")]
    repository: Annotated[str, tyro.conf.Positional]
    """owner/name; created if it does not exist."""
    results: Path | None = None
    """What eval --json wrote for this policy: success rates for the card."""
    private: bool = False
    """Make a new repository private; otherwise the hub's default applies."""
    quiet: bool = False
    """Do not print the address."""


@dataclass(frozen=True)
class RecordCommand:
    """Record demonstrations by a policy, as a dataset of LeRobot (format v3.0) for imitation learning.

    Each frame has the robot's state, the whole observation, action, reward, success, and a picture.

    Example: python -m mtrl_vec record pretrained-mt10 --episodes 50 --out demonstrations
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help=f"A {CHECKPOINT_HELP}.")]
    out: Path = Path("demonstrations")
    """Folder to create."""
    tasks: tuple[str, ...] | None = None
    """Which of the policy's tasks; by default all."""
    episodes: int = 10
    """Episodes per task."""
    max_episode_steps: int = 500
    """Time limit of an episode, in environment steps of 12.5 ms. One that succeeds ends ten steps later."""
    keep_failures: bool = False
    """Also record episodes without success. Otherwise up to three are tried for each one that is wanted."""
    image_size: int = 128
    """Width and height of the pictures, in pixels; 0: none. Without a GPU a picture takes about 0.05 s."""
    seed: int = 0
    """Seed of the goals and of where objects start."""
    quiet: bool = False
    """Show nothing but warnings."""


@dataclass(frozen=True)
class DoctorCommand:
    """Show versions, the machine, and what training would use; include the output in bug reports.

    Example: python -m mtrl_vec doctor
    """

    json: Path | None = None
    """Also write it to this file."""


COMMANDS: dict[str, type] = {
    "train": TrainCommand,
    "eval": EvalCommand,
    "plot": PlotCommand,
    "video": VideoCommand,
    "profile": ProfileCommand,
    "export": ExportCommand,
    "push": PushCommand,
    "record": RecordCommand,
    "doctor": DoctorCommand,
}
