"""The training loop: sample tasks, collect, learn, record."""

from __future__ import annotations

import functools
import time

import numpy as np
import torch
from numpy.typing import NDArray

from mtrl_vec.errors import Diverged
from mtrl_vec.learn.diagnosis import explained
from mtrl_vec.learn.exploration import exploration
from mtrl_vec.ranks import require_same
from mtrl_vec.train.checkpoints import header
from mtrl_vec.train.metrics import Stopwatch, machine_columns, prefixed, std_columns
from mtrl_vec.train.run import Run
from mtrl_vec.train.run_dir import DUMP_NAME, forget_launch
from mtrl_vec.train.sampling_methods import loss_weights
from mtrl_vec.train.task_sampling import TaskStatistics
from mtrl_vec.train.warm_start import policy_content


class Trainer(Run):
    """Trains one policy. ``Trainer(config).train()`` runs from start to end and leaves its results in ``run_dir``.

    ``Trainer.resume(run_dir).train()`` continues a run that was interrupted: on the CPU to the last bit. See `Run` for
    the arguments.
    """

    def train(self) -> None:
        """Run all iterations. On an interruption or a failure the last whole iteration is saved, then the error raised.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            WorkerDied: simulators died more often than ``max_restarts`` allows.
            Diverged: loss or gradients are no longer finite.
            RunFailed: another rank is gone, or its weights are no longer the same.
        """
        with self.opened() as record:
            start = time.perf_counter() - self.progress.elapsed
            while not self.progress.done:
                stopwatch = Stopwatch(self.timer)
                metrics = self.iterate()
                speeds = stopwatch.speeds(self.progress.frames_per_batch)
                evaluation = self.evaluate()
                self.progress.elapsed = time.perf_counter() - start
                record.write(self.row(metrics | speeds | evaluation))
                require_same(self.policy.state_dict().values(), self.ranks)
                self.checkpoints.take()
                self.checkpoints.save_if_due()
        self.ranks.together(lambda: None)  # until all have come this far, torchrun may start them again
        if self.ranks.first:
            forget_launch(self.run_dir)

    def iterate(self) -> dict[str, float]:
        """One iteration: sample tasks, collect a rollout, learn from it. Returns the metrics of learning."""
        with self.timer("task_sampling"):
            weights = loss_weights(self.task_sampling.task_weights, self.config.learner.task_weights)
            self.learner.set_task_weights(weights)
        self.explore(self.exploration())
        last = self.progress.iteration + 1 == self.progress.num_iterations
        try:
            rollout, metrics = self.pipeline(self.task_sampling.task_probs, last)
        except Diverged as error:
            when = f"iteration {self.progress.iteration + 1}"
            dump = self.run_dir / DUMP_NAME
            message = self.ranks.from_first(functools.partial(explained, error, self.config, when, dump))
            raise self.ranks.shared(Diverged(message, error.minibatch)) from error
        self.progress.iteration += 1
        self.progress.skipped_updates += int(metrics.pop("skipped_updates"))
        self.statistics.update(rollout)
        with self.timer("task_sampling"):
            self.task_sampling.update(self.task_statistics(metrics))
        by_task = zip(self.config.tasks, weights, strict=True)
        return prefixed(metrics | {f"{task}/weight": weight for task, weight in by_task})

    def exploration(self) -> NDArray[np.float64]:
        """How much each task has to explore now, [K]."""
        seen = self.statistics
        return exploration(seen.success, seen.frames, self.config.exploration_delay, unknown=seen.untrained)

    def explore(self, amount: NDArray[np.float64]) -> None:
        """Let each task explore as much as it has to, [K], from now on."""
        learner = self.config.learner
        self.acting.noise.set_correlation(learner.noise_correlation * amount)
        if learner.hold_std:
            self.policy.hold_std(torch.from_numpy(amount))

    def task_statistics(self, metrics: dict[str, float]) -> TaskStatistics:
        """What task sampling looks at, of the iteration that is just over."""
        return TaskStatistics(
            success=self.statistics.success,
            fast_success=self.statistics.fast_success.copy(),
            slow_success=self.statistics.slow_success.copy(),
            critic_loss=np.array([metrics[f"{task}/loss_critic"] for task in self.config.tasks]),
            frames=self.progress.frames,
            episodes=self.statistics.episodes,
        )

    def evaluate(self) -> dict[str, float]:
        """Evaluate the policy if that is due, and keep it if it is the best. Returns the columns of the metrics."""
        if not self.evaluation.due(self.progress):
            return self.evaluation.columns(None)
        with self.timer("evaluate"):
            rates = self.evaluation()
            kept = policy_content(self.policy, self.learner.reward_scale)
            self.evaluation.keep_if_best(rates, header(self.config, self.progress) | kept)
            return self.evaluation.columns(rates)

    def row(self, columns: dict[str, float]) -> dict[str, float]:
        """All columns of the metrics, given those of this iteration."""
        return {
            "iteration": self.progress.iteration,
            "frames": self.progress.frames,
            "time/elapsed": self.progress.elapsed,
            "train/skipped_updates": self.progress.skipped_updates,
            "train/restarts": self.progress.restarts,
            "train/unstable_episodes": self.statistics.unstable_episodes,
            **machine_columns(self.timer, self.rollouts.pids, self.device),
            **std_columns(self.config.tasks, self.policy.action_std()),
            **self.statistics.summary(),
            **columns,
        }
