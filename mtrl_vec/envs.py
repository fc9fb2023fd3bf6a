"""The simulations as a TorchRL environment, and many of those in parallel worker processes.

Shapes: ``W`` workers, ``E`` environments per worker, ``K`` tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

from mtrl_vec.errors import InputError
from mtrl_vec.sim import ACTION_SIZE, OBSERVATION_SIZE, SawyerSim
from mtrl_vec.tasks import MAX_EPISODE_STEPS, TASKS, resolve_tasks
from mtrl_vec.workers import START_METHOD, SimulatorPool, default_num_workers

ALL_TASKS = tuple(task.name for task in TASKS)


class MetaWorldEnv(EnvBase):
    """A batch of ``E`` Meta-World simulations, stepped and partially reset as one. See `make_env` for many of them.

    Environment ``i`` holds task ``(first_slot + i) % K``, unless `set_shares` says otherwise. A TensorDict of batch
    size ``[E]`` carries

    ================  ===========  ==================================================================
    ``observation``   [E, 39] f32  Meta-World's, goal included
    ``task_one_hot``  [E, K] f32   which of the tasks
    ``task_idx``      [E] i64      the same as an index
    ``action``        [E, 4] f32   hand velocity and gripper effort, clipped to [-1, 1]
    ``reward``        [E, 1] f32   Meta-World's, in [0, 10]
    ``success``       [E, 1] bool  at this very step
    ``terminated``    [E, 1] bool  never: Meta-World's episodes do not end on success
    ``truncated``     [E, 1] bool  time limit, or unstable physics
    ``unstable``      [E, 1] bool  unstable physics: the observation is the last good one, the reward 0
    ================  ===========  ==================================================================

    Args:
        tasks: names, see `mtrl_vec.tasks.resolve_tasks`.
        num_envs: ``E``.
        seed, first_slot, goals_seed, max_episode_steps, random_phase, rest_after_success: see
            `mtrl_vec.sim.SawyerSim`.

    Raises:
        InputError: unknown or repeated task.
    """

    def __init__(
        self,
        tasks: Sequence[str] = ALL_TASKS,
        num_envs: int = 3,
        *,
        seed: int = 0,
        first_slot: int = 0,
        goals_seed: int | None = None,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        random_phase: bool = False,
        rest_after_success: bool = False,
    ) -> None:
        super().__init__(batch_size=[num_envs])
        resolved = resolve_tasks(tasks)
        self.num_tasks = k = len(resolved)
        self.sim = SawyerSim(
            resolved,
            (first_slot + np.arange(num_envs)) % k,
            seed=seed,
            first_slot=first_slot,
            goals_seed=goals_seed,
            max_episode_steps=max_episode_steps,
            random_phase=random_phase,
            rest_after_success=rest_after_success,
        )
        self._restored = False
        batch = self.batch_size
        self.observation_spec = Composite(
            observation=Unbounded((*batch, OBSERVATION_SIZE)),
            task_one_hot=OneHot(k, (*batch, k), dtype=torch.float32),
            task_idx=Categorical(k, batch),
            success=Binary(1, (*batch, 1), dtype=torch.bool),
            unstable=Binary(1, (*batch, 1), dtype=torch.bool),
            shape=batch,
        )
        self.action_spec = Bounded(-1.0, 1.0, (*batch, ACTION_SIZE))
        self.reward_spec = Unbounded((*batch, 1))
        flag = Binary(1, (*batch, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=batch)

    def _output(self, observation: np.ndarray, **flags: torch.Tensor) -> TensorDict:
        task_idx = torch.from_numpy(self.sim.task_idx.copy())
        return TensorDict(
            {
                "observation": torch.from_numpy(observation.astype(np.float32)),
                "task_one_hot": torch.nn.functional.one_hot(task_idx, self.num_tasks).float(),
                "task_idx": task_idx,
                **flags,
            },
            self.batch_size,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if self._restored:
            observation, self._restored = self.sim.observation.copy(), False
        else:
            observation = self.sim.reset(None if mask is None else mask.view(-1).numpy())
        never = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        names = ("success", "unstable", "done", "terminated", "truncated")
        return self._output(observation, **{name: never.clone() for name in names})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        step = self.sim.step(tensordict.get("action").numpy())
        truncated = torch.from_numpy(step.truncated)[:, None]
        return self._output(
            step.observation,
            reward=torch.from_numpy(step.reward.astype(np.float32))[:, None],
            success=torch.from_numpy(step.success)[:, None],
            unstable=torch.from_numpy(step.unstable)[:, None],
            terminated=torch.zeros_like(truncated),
            truncated=truncated,
            done=truncated.clone(),
        )

    def set_shares(self, shares: NDArray[np.float64] | None) -> None:
        """See `mtrl_vec.sim.SawyerSim.set_shares`."""
        self.sim.set_shares(shares)

    def snapshot(self) -> dict[str, NDArray]:
        """See `mtrl_vec.sim.SawyerSim.snapshot`."""
        return self.sim.snapshot()

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        """Go on from a `snapshot`. The next reset starts no new episodes but returns what was observed last."""
        self.sim.restore(snapshot)
        self._restored = True

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.sim.seed(seed)


def make_env(
    tasks: Sequence[str] = ALL_TASKS,
    *,
    num_workers: int | None = None,
    envs_per_worker: int = 96,
    seed: int = 0,
    first_slot: int = 0,
    goals_seed: int | None = None,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    random_phase: bool = True,
    rest_after_success: bool = False,
) -> SimulatorPool:
    """``W`` worker processes of ``E`` simulations each, holding all tasks in equal shares, as one TorchRL environment.

    What environment ``[w, e]`` does depends on its number ``first_slot + w * E + e`` and the seed alone: ``[1, 2 E]``
    and ``[2, E]`` give the same numbers. Scripts that call this need an ``if __name__ == "__main__":`` guard (workers
    are processes that import them). Call ``close()`` at the end.

    Args:
        tasks: names, see `mtrl_vec.tasks.resolve_tasks`.
        num_workers: ``W``; by default what suits the machine (`default_num_workers`).
        envs_per_worker: ``E``, a multiple of the number of tasks.
        seed, first_slot, goals_seed, max_episode_steps, random_phase, rest_after_success: see
            `mtrl_vec.sim.SawyerSim`.

    Returns:
        An environment of batch size ``[W, E]`` with the entries of `MetaWorldEnv`.

    Raises:
        InputError: unknown or repeated task, or a number of environments that the tasks cannot share equally.
    """
    tasks = tuple(task.name for task in resolve_tasks(tasks))
    num_workers = default_num_workers() if num_workers is None else num_workers
    if num_workers < 1:
        raise InputError(f"num_workers is {num_workers}: it must be at least 1")
    if envs_per_worker < 1 or envs_per_worker % len(tasks):
        raise InputError(
            f"envs_per_worker is {envs_per_worker}: it must be a positive multiple of the {len(tasks)} tasks"
        )
    shared = {
        "tasks": tasks,
        "num_envs": envs_per_worker,
        "seed": seed,
        "goals_seed": goals_seed,
        "max_episode_steps": max_episode_steps,
        "random_phase": random_phase,
        "rest_after_success": rest_after_success,
    }
    return SimulatorPool(
        num_workers,
        MetaWorldEnv,
        create_env_kwargs=[shared | {"first_slot": first_slot + w * envs_per_worker} for w in range(num_workers)],
        num_sub_threads=1,
        mp_start_method=START_METHOD,
    )
