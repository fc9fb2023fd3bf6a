"""The evaluation while training: in our own simulators, with the mean action, in all worker processes at once.

Shapes: ``K`` tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from mtrl_vec.config import TrainConfig
from mtrl_vec.envs import SimulatorPool, make_env
from mtrl_vec.envs.make import default_num_workers
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.checkpoint import BEST_NAME, save_checkpoint
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.timing import Timer
from mtrl_vec.train.progress import Progress
from mtrl_vec.train.recovery import Recovery
from mtrl_vec.train.rollouts import single_threaded


def simulated_successes(acting: ActingPolicy, env: EnvBase, num_tasks: int, num_steps: int) -> Tensor:
    """How many environments of each task succeed at any of ``num_steps`` steps, and how many there are, [2, K].

    Args:
        acting: the policy, with its mean actions.
        env: environments of all tasks, see `mtrl_vec.envs.make_env`; they are reset first.
        num_tasks: ``K``.
        num_steps: their time limit.
    """
    rows = slice(None) if acting.rows is None else acting.rows
    state = env.reset()
    success = torch.zeros(state["success"].numel(), dtype=torch.bool)
    for _ in range(num_steps):
        state = step_mdp(env.step(acting(state)))
        success |= state["success"].flatten()
        if success[rows].all():
            break
    task_idx, success = state["task_idx"].flatten()[rows], success[rows]
    return torch.stack([torch.bincount(idx, minlength=num_tasks) for idx in (task_idx[success], task_idx)])


class Evaluation:
    """Evaluates the policy in training, and keeps the best one.

    Always on the same goals, ``eval_episodes`` a task, which training does not see: policies of a
    run are directly comparable, and a run that is resumed evaluates as one that was not interrupted.
    The processes start with the first evaluation and sleep between them.

    Args:
        config: of the run.
        folder: of the run, where the best policy is kept.
        policy: as it is in training.
        recovery: from simulators that die.
        ranks: over which the episodes are spread.

    Attributes:
        best_success: mean success over the tasks of the policy in ``best.pt``; negative before the first evaluation.
        notify: is told of problems with writing it.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, policy: SharedPolicy, recovery: Recovery, ranks: Ranks = ALONE
    ) -> None:
        self._config, self._folder, self._recovery, self._ranks = config, folder, recovery, ranks
        # Not compiled: that would take longer, for another number of rows, than all evaluations of a run.
        self._acting = ActingPolicy(policy, config.replace(compile="off"), Timer(), mean=True)
        self._pool: SimulatorPool | None = None
        self.best_success = -1.0
        self.notify: Callable[[str], None] = lambda message: None

    def due(self, progress: Progress) -> bool:
        """Whether the policy is to be evaluated after the last iteration."""
        interval = self._config.eval_interval
        return bool(interval) and (progress.done or progress.passed_multiple(interval))

    def columns(self, rates: list[float] | None) -> dict[str, float]:
        """The ``eval/`` columns for success rates [K]; NaN without an evaluation."""
        rates = [math.nan] * self._config.num_tasks if rates is None else rates
        columns = {f"eval/{task}/success_rate": rate for task, rate in zip(self._config.tasks, rates, strict=True)}
        mean = round(sum(rates) / len(rates), 6)  # 1/3 + 2/3 is no tie otherwise
        return columns | {"eval/mean_success_rate": mean}

    def __call__(self) -> list[float]:
        """Success rates per task, [K].

        Raises:
            WorkerDied: simulators died more often than allowed.
        """
        with single_threaded():
            successes, episodes = self._ranks.sum(self._recovery(self._attempt, self.close))
        return (successes.float() / episodes).tolist()

    def _attempt(self) -> Tensor:
        environment = self._config.environment
        own = self._ranks.part(self._config.eval_episodes * self._config.num_tasks)
        if self._pool is None:
            self._pool = make_env(
                environment.tasks,
                # The policy acts for all at once here, so that twice as many workers for two halves are no use.
                num_workers=min(self._config.runtime.num_workers or 1, default_num_workers(self._ranks.cores)),
                num_envs=own.stop - own.start,
                first_slot=self._config.num_envs + own.start,  # random streams that training does not use
                max_episode_steps=self._config.max_episode_steps,
                random_phase=False,
                rest_after_success=True,
                fresh_starts=True,  # not those that training practises
            )
            self._acting.rows = self._pool.rows
            self._pool.start()
        self._pool.set_seed(self._config.seed, static_seed=True)
        num_tasks, num_steps = self._config.num_tasks, self._config.max_episode_steps
        return simulated_successes(self._acting, self._pool, num_tasks, num_steps)

    def keep_if_best(self, rates: list[float], content: Mapping[str, Any]) -> None:
        """Save the policy if none did better so far; ties go to the later one, which has learned more.

        Args:
            rates: see `__call__`.
            content: what to save beside the results.
        """
        results = self.columns(rates)
        if not self._ranks.first:
            return
        if results["eval/mean_success_rate"] < self.best_success:
            return
        try:
            save_checkpoint(self._folder / BEST_NAME, {**content, "evaluation": results})
            self.best_success = results["eval/mean_success_rate"]
        except OSError as error:
            self.notify(f"cannot write {BEST_NAME} in {self._folder} ({error.strerror}): the run continues")

    def state_dict(self) -> dict[str, Any]:
        """What the evaluation continues from."""
        return {"best_success": self.best_success}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.best_success = state["best_success"]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close(raise_if_closed=False)
            self._pool = None
