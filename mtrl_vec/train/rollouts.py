"""Where rollouts come from: the simulators of a run, and what happens when they die.

Shapes: ``B`` environments of this rank, ``T`` steps, ``K`` tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase

from mtrl_vec.config import TrainConfig
from mtrl_vec.envs import SimulatorPool, make_env
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.timing import Timer
from mtrl_vec.train.recovery import Recovery


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Keep torch to one thread. While the workers simulate, a second one costs them more than it gives the policy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Rollouts:
    """Rollouts of all environments of this rank, one after the other.

    Simulators start with the first rollout. If one dies, all simulators and the noise of the actions are restored to
    the end of the last rollout, so that results are unaffected. The memory of a rollout is used again by the one after
    the next.

    Args:
        config: of the run.
        acting: chooses the actions.
        recovery: from simulators that die.
        timer: counts the sections ``collect``, ``simulate`` and ``checkpoint``.
        ranks: over which the environments of the run are spread.
    """

    def __init__(
        self, config: TrainConfig, acting: ActingPolicy, recovery: Recovery, timer: Timer, ranks: Ranks = ALONE
    ) -> None:
        self._config, self._acting, self._recovery, self._timer = config, acting, recovery, timer
        self._ranks = ranks
        self._pool: SimulatorPool | None = None
        self._task_probs: NDArray[np.float64] | None = None
        self._simulators: dict[str, NDArray] | None = None  # after the last rollout; None before the first

    @property
    def pids(self) -> list[int]:
        """Process ids of the simulators."""
        return [] if self._pool is None else self._pool.pids

    def collect(self, task_probs: NDArray[np.float64] | None) -> TensorDictBase:
        """The next rollout, [B, T].

        Args:
            task_probs: probabilities [K] with which new episodes draw their tasks; None: environments keep theirs.

        Raises:
            WorkerDied: simulators died more often than allowed.
        """
        noise = self._acting.noise.state_dict()

        def restart() -> None:
            self._start(task_probs)
            self._acting.noise.load_state_dict(noise)

        rollout, self._simulators = self._recovery(lambda: self._attempt(task_probs), restart)
        return rollout

    def _attempt(self, task_probs: NDArray[np.float64] | None) -> tuple[TensorDictBase, dict[str, NDArray]]:
        if self._pool is None:
            self._start(task_probs)
        assert self._pool is not None
        self._set_task_probs(task_probs)
        policies = self._acting.in_turn(self._pool.envs_per_group(2 if self._config.runtime.double_buffer else 1))
        with self._timer("collect"), single_threaded():
            rollout = self._pool.collect(policies, self._config.learner.num_steps)
        with self._timer("checkpoint"):
            simulators = self._pool.snapshot()
        return rollout, simulators

    def _start(self, task_probs: NDArray[np.float64] | None) -> None:
        """Start the simulators, in place of those that run: from the end of the last rollout."""
        self.close()
        env = self._config.environment
        own = self._ranks.part(self._config.num_envs)
        pool = self._pool = make_env(
            env.tasks,
            num_workers=self._config.runtime.num_workers,
            num_envs=own.stop - own.start,
            seed=self._config.seed,
            first_slot=own.start,
            goals_seed=env.goals_seed,
            max_episode_steps=self._config.max_episode_steps,
            random_phase=env.random_phase,
            fresh_starts=env.fresh_starts,
        )
        pool.timer, pool.pinned = self._timer, self._acting.device.type == "cuda"
        self._task_probs = None
        self._set_task_probs(task_probs)
        if self._simulators is not None:
            pool.restore(self._simulators)
        pool.reset()  # one that was restored goes on where it was

    def _set_task_probs(self, task_probs: NDArray[np.float64] | None) -> None:
        now = self._task_probs
        if task_probs is now or (task_probs is not None and now is not None and np.array_equal(task_probs, now)):
            return
        assert self._pool is not None
        self._pool.set_task_probs(task_probs)
        self._task_probs = task_probs

    def state_dict(self) -> dict[str, Any]:
        """What the simulators continue from after the last rollout, a row for each; not a copy.

        On the first rank those of all ranks.
        """
        if self._simulators is None:
            return {"simulators": None}
        rows = {name: torch.from_numpy(array) for name, array in self._simulators.items()}
        return {"simulators": self._ranks.rows_at_first(rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`: ends the simulators that run; others start with the next rollout."""
        self.close()
        simulators = state["simulators"]
        own = self._ranks.part(self._config.num_envs)
        self._simulators = None if simulators is None else {name: t[own].numpy() for name, t in simulators.items()}

    def close(self) -> None:
        """End the simulators' processes."""
        if self._pool is not None:
            self._pool.close(raise_if_closed=False)
            self._pool = None
