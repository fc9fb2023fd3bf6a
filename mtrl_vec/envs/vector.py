"""The simulations as a Gymnasium vector environment: NumPy in and out, for algorithms that know nothing of TorchRL.

Shapes: ``B`` environments, ``K`` tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray
from tensordict import TensorDict

from mtrl_vec.envs.make import make_env
from mtrl_vec.errors import InputError
from mtrl_vec.tasks.layout import ACTION_SIZE, OBSERVATION_SIZE
from mtrl_vec.tasks.suite import resolve_tasks
from mtrl_vec.tasks.task import MAX_EPISODE_STEPS, Task

Infos = dict[str, Any]


class MetaWorldVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.float32], NDArray]):
    """``B`` Meta-World simulations in worker processes, environment ``i`` with task ``i % K``.

    ``gymnasium.make_vec("mtrl_vec/MT10-v0", num_envs=...)`` makes one. Episodes end at the time limit only, by
    truncation; the next one begins in the same step (`gymnasium.vector.AutoresetMode.SAME_STEP`).
    ``infos["final_obs"]`` and ``infos["final_info"]`` then hold what the episode ended with, as in Gymnasium's own
    vector environments.

    ``infos["task_idx"]`` [B] says which task each environment is at, and ``infos["success"]`` [B] which of them succeed
    in this very step, 1.0 or 0.0.

    Scripts that use it need an ``if __name__ == "__main__":`` guard, as workers import them.

    Args:
        num_envs: ``B``.
        tasks: see `mtrl_vec.tasks.suite.resolve_tasks`.
        num_workers: processes; by default what suits the machine.
        one_hot: append which of the tasks it is to the observation, which is then [39 + K] instead of [39].
        seed: of all random streams, until `reset` is given another.
        goals_seed, max_episode_steps, random_phase, fresh_starts: see `mtrl_vec.sim.SimBatch`. With ``random_phase``
            first episodes are shorter, so that the environments do not all start new ones at once.

    Raises:
        InputError: see `mtrl_vec.make_env`.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        tasks: Sequence[str | Task] = ("MT10",),
        *,
        num_workers: int | None = None,
        one_hot: bool = False,
        seed: int = 0,
        goals_seed: int | None = None,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        random_phase: bool = False,
        fresh_starts: bool = False,
    ) -> None:
        self.num_envs = num_envs
        self.tasks = resolve_tasks([tasks] if isinstance(tasks, str) else tasks)
        """The tasks, in the order of ``task_idx``."""
        self._one_hot = one_hot
        self._task_now: NDArray[np.int64] | None = None
        self._pool = make_env(
            self.tasks,
            num_envs=num_envs,
            num_workers=num_workers,
            seed=seed,
            goals_seed=goals_seed,
            max_episode_steps=max_episode_steps,
            random_phase=random_phase,
            fresh_starts=fresh_starts,
        )
        size = OBSERVATION_SIZE + one_hot * len(self.tasks)
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], Infos]:
        """Start new episodes.

        Args:
            seed: restart all random streams with it.
            options: ``reset_mask`` [B] says which environments, at least one; by default all of them.

        Raises:
            InputError: another option, a mask of another shape, one that is False everywhere, or one that leaves
                environments out which were never reset.
            gymnasium.error.ClosedEnvironmentError: after `close`.
            WorkerDied: a worker exited on its own.
        """
        super().reset(seed=seed)
        self._check_open()
        unknown = (options or {}).keys() - {"reset_mask"}
        if unknown:
            raise InputError(f"there is no option {min(unknown)!r} of reset: the only one is 'reset_mask'")
        mask = (options or {}).get("reset_mask")
        if mask is not None:
            mask = self._checked_mask(mask)
        self._task_now = None  # until all of this is done
        if seed is not None:
            self._pool.set_seed(seed, static_seed=True)
        self._pool.reset(None if mask is None else self._for_pool(mask))
        state = self._pool.look()
        self._task_now = self._task_idx(state)
        return self._observation(state), {"task_idx": self._task_now.copy(), "_task_idx": self._everywhere()}

    def step(
        self, actions: ArrayLike
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Infos]:
        """Advance all environments by one step, 12.5 ms of simulated time, and start new episodes where one is over.

        Args:
            actions: [B, 4], hand velocity in xyz and gripper effort; clipped to [-1, 1].

        Raises:
            InputError: actions of another shape.
            gymnasium.error.ResetNeeded: there was no reset before, or the last reset or step was interrupted.
            gymnasium.error.ClosedEnvironmentError: after `close`.
            WorkerDied: a worker exited on its own.
        """
        self._check_open()
        if self._task_now is None:
            raise ResetNeeded("call reset() before step()")
        action = torch.from_numpy(np.asarray(actions, dtype=np.float32))
        if action.shape != (self.num_envs, ACTION_SIZE):
            raise InputError(
                f"actions have the shape {tuple(action.shape)}: ({self.num_envs}, {ACTION_SIZE}) is needed"
            )
        task_before, self._task_now = self._task_now, None  # where this is interrupted, only a reset helps
        state = self._pool.step_in_place(action)
        self._task_now, after = self._task_idx(state), state["next"]
        truncated, success = after["truncated"][:, 0].numpy().copy(), after["success"][:, 0].numpy().astype(float)
        infos: Infos = {
            "task_idx": self._task_now.copy(),
            "_task_idx": self._everywhere(),
            "success": np.where(truncated, 0.0, success),
            "_success": ~truncated,
        }
        if truncated.any():
            last = self._with_one_hot(after["observation"].numpy(), task_before)
            final = np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(truncated):
                final[i] = last[i]
            ended = {"task_idx": np.where(truncated, task_before, 0), "_task_idx": truncated.copy()}
            ended |= {"success": np.where(truncated, success, 0.0), "_success": truncated.copy()}
            infos |= {"final_obs": final, "_final_obs": truncated.copy()}
            infos |= {"final_info": ended, "_final_info": truncated.copy()}
        reward = after["reward"][:, 0].numpy().astype(np.float64)
        return self._observation(state), reward, np.zeros(self.num_envs, dtype=bool), truncated, infos

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("the environment is closed: make another one")

    def _checked_mask(self, mask: ArrayLike) -> NDArray[np.bool_]:
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != (self.num_envs,):
            raise InputError(f"reset_mask has the shape {mask.shape}: it has to be ({self.num_envs},)")
        if not mask.any():
            raise InputError("reset_mask is False everywhere: choose at least one environment")
        if self._task_now is None and not mask.all():
            raise InputError("reset_mask leaves environments out that were never reset: reset all of them first")
        return mask

    def _observation(self, state: TensorDict) -> NDArray[np.float32]:
        return self._with_one_hot(state["observation"].numpy(), state["task_idx"].numpy())

    def _with_one_hot(self, observation: NDArray[np.float32], task_idx: NDArray[np.int64]) -> NDArray[np.float32]:
        if not self._one_hot:
            return observation.copy()
        return np.concatenate([observation, np.eye(len(self.tasks), dtype=np.float32)[task_idx]], axis=1)

    def _task_idx(self, state: TensorDict) -> NDArray[np.int64]:
        return state["task_idx"].numpy().copy()

    def _everywhere(self) -> NDArray[np.bool_]:
        return np.ones(self.num_envs, dtype=bool)

    def _for_pool(self, mask: NDArray[np.bool_]) -> TensorDict:
        """A mask [B] in the pool's layout, which may have idle rows."""
        everything = torch.zeros(self._pool.batch_size.numel(), dtype=torch.bool)
        everything[slice(None) if self._pool.rows is None else self._pool.rows] = torch.from_numpy(mask)
        shape = self._pool.batch_size
        return TensorDict({"_reset": everything.view(*shape, 1)}, shape)

    def close_extras(self, **_: Any) -> None:
        """End the workers."""
        self._pool.close(raise_if_closed=False)
