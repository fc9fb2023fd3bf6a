"""The settings of a training run, in groups by what they are about.

Shapes: ``B`` environments, ``T`` steps per rollout, ``K`` tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtrl_vec.config.checks import check_fields, check_seed, require
from mtrl_vec.tasks.suite import registered_names

Device = Literal["auto", "cpu", "cuda"]
Compile = Literal["off", "on"]
Precision = Literal["fp32", "bf16"]
GradientMethod = Literal["none", "pcgrad", "cagrad"]


@dataclass(frozen=True)
class EnvironmentConfig:
    """What is simulated."""

    tasks: tuple[str, ...] = ("MT3",)
    """Tasks to learn together: sets (MT3, MT10, MT50), names of tasks, or both."""
    num_envs: int | None = None
    """B, simulations running side by side; environment i starts with task i modulo K. By default 72 per task,
    clamped to 360 to 1440."""
    max_episode_steps: int | None = None
    """Time limit of an episode, in environment steps. Meta-World's own, which `eval` keeps to, is 500; but a policy
    that works needs far fewer, and learns more from a new episode than from holding the goal. By default 100 for up to
    3 tasks and 150 for more."""
    goals_seed: int | None = None
    """Train on Meta-World's 50 fixed goals per task for this benchmark seed, instead of fresh goals every episode."""
    fresh_starts: bool = False
    """In the ten tasks whose start depends on the drawn goal, simulate it at every reset (3 to 6 ms), instead of
    drawing from 500 goals per task whose starts are simulated once."""
    random_phase: bool = True
    """Start the environments at random points of their first episode, so that resets are spread over time."""

    def __post_init__(self) -> None:
        require(not isinstance(self.tasks, str), "tasks", self.tasks, "must be a list of names")
        object.__setattr__(self, "tasks", registered_names(self.tasks))
        check_fields(self, positive=("num_envs", "max_episode_steps"))
        check_seed("goals_seed", self.goals_seed)


@dataclass(frozen=True)
class PolicyConfig:
    """The networks."""

    torso: tuple[int, int] = (256, 256)
    """Widths of the two hidden layers that all tasks share, and actor and critic too."""
    head: int | None = None
    """Width of the hidden layer of each task's head. By default that of the policy to start from, if there is one; else
    128 for up to 3 tasks, and 64 for more, where wider heads would take a third to half of an update."""
    bounded_mean: bool = True
    """Keep the mean actions within [-1, 1], the actions' range, by tanh. With a mean far outside, clipping removes
    the noise, and nothing is explored."""
    init_std: float = 1.0
    """Initial standard deviation of the actions, in units of the action range's half width."""
    learn_std: bool = True
    """Learn the standard deviation, one per task and action dimension; otherwise it stays at its limit."""
    relative_features: bool = True
    """Add motions and distances to the positions in the policy's input."""
    normalize_observation: bool = True
    """Normalise observations by their running mean and variance."""
    direct_features: bool = True
    """Also feed the observation itself to the heads, normalised by the mean and variance of their own task:
    observations vary less within one task than across several, and success depends on a few centimetres."""
    popart: bool = True
    """Normalise each task's values by running statistics of their targets (PopArt), whatever their scale."""

    def __post_init__(self) -> None:
        require(len(self.torso) == 2 and min(self.torso) > 0, "torso", self.torso, "must be two positive widths")
        check_fields(self, positive=("head", "init_std"))

    def head_width(self, num_tasks: int) -> int:
        """Width of the hidden layer of the heads of ``num_tasks`` tasks."""
        return self.head or (128 if num_tasks <= 3 else 64)


@dataclass(frozen=True)
class LearnerConfig:
    """PPO."""

    num_steps: int = 32
    """T, steps per environment and iteration."""
    num_epochs: int = 2
    """Passes over a rollout."""
    num_minibatches: int = 24
    """Minibatches per pass. Leftover frames are dropped, different ones in each pass."""
    lr: float = 3e-4
    """Adam's learning rate. With target_kl it is only the initial one, and then varies between 1e-5 and 3e-3."""
    target_kl: float | Literal["auto"] | None = "auto"
    """Adapt the learning rate so that one iteration moves the policy by this KL divergence, in nats. None: constant.
    auto: 0.02 for up to 360 environments, then in proportion to their number, but at most 0.04."""
    final_kl_fraction: float | None = None
    """Fraction of target_kl that is left at the end; annealed linearly until 90 % of the run. By default 0.5 for up to
    3 tasks and 0.2 for more."""
    final_std: float = 0.3
    """Limit of the standard deviation at the end; it falls linearly from init_std between 40 and 90 % of the run.
    Evaluation uses the mean action, so the policy must not come to depend on the noise."""
    gradient_method: GradientMethod = "none"
    """How the tasks' gradients over the shared torso are combined. none: added up. pcgrad: conflicts are projected out.
    cagrad: the task that gains least gains as much as possible."""
    task_weights: tuple[float, ...] | None = None
    """Fixed weights of the tasks in the loss, times those of the task sampling, in the order of --tasks; any scale. By
    default all are equal."""
    noise_correlation: float = 0.85
    """Correlation of the actions' noise from one step to the next in tasks without success; it falls linearly to 0 at a
    success rate of 50 %. Correlated noise finds what white noise misses, such as how to open a drawer."""
    hold_std: bool = True
    """Keep the standard deviation of tasks without success at its limit; this fades as noise_correlation does."""
    exploration_delay: int | None = None
    """Environment steps of a task before correlated noise and held standard deviations begin; they are in full force
    after twice as many. By default 150,000 for up to 3 tasks, which are learned sooner without, and 0 for more."""
    success_bonus: float = 5.0
    """Added to Meta-World's reward (at most 10) in every step that counts as a success, for learning only. Reach needs
    it: a hand 6 cm from the goal gets 9.8 and no success, and one within 5 cm gets 10."""
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
    normalize_reward: bool = True
    """Scale each task's reward by the running standard deviation of its discounted return."""
    per_task_advantage: bool = True
    """Normalise advantages within each task, instead of over the whole rollout."""
    overlap: bool = False
    """Collect the next rollout while learning from the last one, with a policy that is one iteration behind."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            positive=(
                *("num_steps", "num_epochs", "num_minibatches", "lr", "target_kl"),
                *("final_std", "clip_epsilon", "critic_coeff", "max_grad_norm"),
            ),
            not_negative=("success_bonus", "entropy_coeff", "exploration_delay"),
            fraction=("gamma", "gae_lambda", "final_kl_fraction", "clip_epsilon", "noise_correlation"),
        )
        require(self.noise_correlation < 1, "noise_correlation", self.noise_correlation, "must be less than 1")


@dataclass(frozen=True)
class RuntimeConfig:
    """How and how long a run executes, not what it learns. All but run_dir and overwrite may change on resume."""

    total_frames: int | None = None
    """Environment steps to train for, over all tasks; rounded up to whole iterations. By default 360,000 per task, or
    500,000 with more than ten tasks, but at least 2,000,000."""
    run_dir: Path | None = None
    """Where results go. By default a new folder under runs/."""
    overwrite: bool = False
    """Replace the run in --run-dir if there is one."""
    quiet: bool = False
    """Show nothing but events and errors."""
    wandb: bool = False
    """Also log to Weights & Biases, which has to be installed."""
    num_workers: int | None = None
    """Simulator processes of each rank, over which its environments are spread. By default one per core, or one less
    with more than two cores; with double_buffer twice as many, if there are more and the policy acts on the CPU."""
    double_buffer: bool = False
    """Let the policy act for half of the simulator processes while the other half simulates. It gains nothing on 2
    cores; with more, the simulators would otherwise idle while the policy acts. Products round by their size, so that
    results may differ in the last bit where a half has only a few environments of a task."""
    device: Device = "auto"
    """Device of the policy and its updates. auto: CUDA if it is available."""
    precision: Precision = "fp32"
    """Precision of forward passes and losses; weights, gradients and optimiser state are always fp32."""
    compile: Compile = "off"
    """Compile advantages and loss with torch.compile, and acting on CUDA. On 2 CPU cores compiled updates are slower,
    since they compute all heads for all rows."""
    cuda_graphs: bool = False
    """On CUDA, replay optimiser steps as one CUDA graph each, or with several ranks as two."""
    eval_interval: int | None = None
    """Frames between evaluations while training; the policy that does best in them is kept in best.pt. 0: none. By
    default an eighth of total_frames, but at least 250,000."""
    eval_episodes: int | None = None
    """Episodes per task of such an evaluation: always the same goals, mean action, the time limit of training. By
    default 60 for up to 3 tasks and 30 for more."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints, of which the last three are kept. 0: after every iteration."""
    log_gradients: bool = False
    """Also log norms and cosines of the tasks' gradients over the torso, from the last minibatch of each iteration. The
    methods that combine gradients log them in any case."""
    max_restarts: int = 3
    """How many times simulator processes that died are replaced before the run fails, counted anew after a resume. The
    run continues from the last whole rollout, as if nothing had happened."""
    max_skipped_updates: int = 36
    """Optimiser steps are skipped where loss or gradients are not finite. A run stops after an iteration that ends with
    this many in a row, with a diagnosis."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            positive=("total_frames", "num_workers", "eval_episodes", "max_skipped_updates"),
            not_negative=("eval_interval", "checkpoint_seconds", "max_restarts"),
        )
