"""The parts of a training run: made from its settings, restored from a checkpoint, opened and closed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from tensordict import TensorDictBase

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.learn.ppo import PPO
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.checkpoint import load_latest
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.timing import Timer
from mtrl_vec.train.checkpoints import Checkpoints, Stateful
from mtrl_vec.train.evaluation import Evaluation
from mtrl_vec.train.log import require_wandb
from mtrl_vec.train.pipeline import Alternating, Overlapping
from mtrl_vec.train.progress import Progress
from mtrl_vec.train.record import Record, Silence
from mtrl_vec.train.recovery import Recovery
from mtrl_vec.train.resolve import require_agreement, resolve
from mtrl_vec.train.rollouts import Rollouts
from mtrl_vec.train.run_dir import (
    continue_run_dir,
    describe_changes,
    prepare_run_dir,
    remove_if_empty,
    require_visible,
    resumed_config,
    write_config,
)
from mtrl_vec.train.sampling_methods import make_task_sampling
from mtrl_vec.train.statistics import EpisodeStatistics
from mtrl_vec.train.warm_start import WarmStart, head_of


class Run:
    """The parts of a training run.

    Args:
        config: what to train.
        timer: counts the sections of an iteration.
        checkpoint: whole state of a run to continue, as `mtrl_vec.policy.checkpoint.load_latest` returns it, in the
            folder that ``config`` names.
        ranks: which train it together. The first one reads and writes files.

    Raises:
        InputError: a device that is missing, a run folder that exists, a checkpoint or a policy that does not fit, or
            ranks that do not go together.
    """

    def __init__(
        self,
        config: TrainConfig,
        timer: Timer | None = None,
        *,
        checkpoint: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        starts = config.init_from is not None and checkpoint is None
        known = ranks.from_first(lambda: _known_head(config, checkpoint))
        if config.policy.head is None:
            config = config.replace(head=known)
        config = ranks.together(lambda: resolve(config, ranks))
        require_agreement(config, ranks)
        if config.runtime.wandb:
            ranks.from_first(require_wandb)
        # Before the folder is touched: a bad policy must leave nothing behind, and --overwrite not remove a good one.
        warm_start = ranks.from_first(lambda: WarmStart(config)) if starts else None
        self.lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

        def claim() -> Path:
            place = prepare_run_dir(config) if checkpoint is None else continue_run_dir(config, checkpoint)
            folder, self.lock = place
            return folder

        self.run_dir = ranks.from_first(claim)
        try:
            ranks.together(lambda: require_visible(self.run_dir))
        except InputError:
            if ranks.first and checkpoint is None:
                remove_if_empty(self.run_dir, 0)
            raise
        self.config = config = config.replace(run_dir=self.run_dir)
        self.device = torch.device(config.runtime.device)
        self.timer = timer or Timer()
        self._start = "" if warm_start is None else str(warm_start)
        self._changes = "" if checkpoint is None else describe_changes(config, checkpoint)

        # The order matters: weights are drawn first, then acting continues torch's random stream.
        torch.manual_seed(config.seed)
        self.progress = Progress(config.frames_per_batch, config.num_iterations)
        self.policy = SharedPolicy.for_tasks(config.policy, config.tasks).to(self.device)
        if warm_start is not None:
            warm_start.copy_policy(self.policy)
        if ranks.size > 1:  # the same seed does not draw the same weights on every kind of processor
            weights = {name: tensor.cpu() for name, tensor in self.policy.state_dict().items()}
            self.policy.load_state_dict(ranks.from_first(lambda: weights))
        self.acting = ActingPolicy(self.policy, config, self.timer, lagging=config.learner.overlap, ranks=ranks)
        self.learner = PPO(config, self.policy, self.timer, self.acting.previous, ranks)
        if warm_start is not None:
            warm_start.copy_reward_scale(self.learner.reward_scale)
        self.recovery = Recovery(config.runtime.max_restarts, self.progress, ranks)
        self.rollouts = Rollouts(config, self.acting, self.recovery, self.timer, ranks)
        self.pipeline = self._make_pipeline()
        whole = not config.environment.random_phase
        self.statistics = EpisodeStatistics(config.tasks, config.num_envs, whole=whole, ranks=ranks)
        if warm_start is not None:
            self.statistics.untrained[[config.tasks.index(task) for task in warm_start.known]] = 0.0
        self.task_sampling = make_task_sampling(config)
        self.evaluation = Evaluation(config, self.run_dir, self.policy, self.recovery, ranks)
        # Everything that a checkpoint holds; restored in this order, since acting copies the policy.
        parts: dict[str, Stateful] = {
            "progress": self.progress,
            "policy": self.policy,
            "acting": self.acting,
            "learner": self.learner,
            "rollouts": self.rollouts,
            "pipeline": self.pipeline,
            "statistics": self.statistics,
            "task_sampling": self.task_sampling,
            "evaluation": self.evaluation,
        }
        self.checkpoints = Checkpoints(self.run_dir, config, parts, self.progress, self.timer, ranks)
        if checkpoint is not None:
            self.checkpoints.restore(checkpoint)
        ranks.from_first(lambda: write_config(self.run_dir, config))

    def _make_pipeline(self) -> Alternating:
        if self.config.learner.overlap:
            return Overlapping(self.rollouts, self.learn, self.acting, self.ranks)
        return Alternating(self.rollouts, self.learn)

    @classmethod
    def resume(cls, run_dir: Path | str, *, ranks: Ranks = ALONE, **changes: Any) -> Self:
        """Continue a run from its newest readable checkpoint.

        Args:
            run_dir: its folder.
            ranks: which train it together: not necessarily as many as before.
            changes: settings to change, out of `mtrl_vec.config.RuntimeConfig`; for example ``total_frames``.

        Raises:
            InputError: nothing to continue from, or a change that would make it another run.
        """
        checkpoint, problems = ranks.from_first(lambda: load_latest(Path(run_dir)))
        for problem in problems:
            warnings.warn(problem, stacklevel=2)
        config = ranks.from_first(lambda: resumed_config(Path(run_dir), checkpoint)).replace(**changes)
        return cls(config, checkpoint=checkpoint, ranks=ranks)

    @property
    def frames(self) -> int:
        """Environment steps of the last whole iteration: what remains after an interruption."""
        return self.checkpoints.frames

    def learn(self, rollout: TensorDictBase) -> dict[str, float]:
        """Learn from a rollout [B, T] at this point of the run."""
        return self.learner.learn(rollout, self.progress.fraction)

    def _record(self) -> Record | Silence:
        return Record(self.config, self.run_dir, self.progress) if self.ranks.first else Silence()

    @contextlib.contextmanager
    def opened(self) -> Iterator[Record | Silence]:
        """Terminal and log files, and everything closed at the end: each part even if another fails."""
        with contextlib.ExitStack() as closing:  # in reverse order
            closing.enter_context(self.lock)
            if self.ranks.first:
                closing.callback(lambda: remove_if_empty(self.run_dir, self.frames))
            record = self.ranks.together(self._record)
            closing.enter_context(record)
            for part in (self.recovery, self.checkpoints, self.evaluation):
                part.notify = record.event
            closing.callback(self.pipeline.close)
            closing.callback(self.evaluation.close)
            closing.callback(self.checkpoints.save)  # first of all, before anything can hang
            if self._start:
                record.event(self._start)
            if self.progress.iteration:
                record.event(f"resumed after {self.frames:,} frames{self._changes}")
            yield record


def _known_head(config: TrainConfig, checkpoint: Mapping[str, Any] | None) -> int | None:
    """The width of the heads of the run to continue, or of the policy to start from; None without either."""
    if checkpoint is not None:
        return checkpoint["config"]["policy"]["head"]
    return None if config.init_from is None else head_of(config.init_from)
