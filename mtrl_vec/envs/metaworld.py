"""A batch of simulations as a TorchRL environment.

Shapes: ``E`` rows, ``K`` tasks.
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

from mtrl_vec.envs.rollout import RolloutWriter
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.layout import ACTION_SIZE, OBSERVATION_SIZE
from mtrl_vec.tasks.suite import resolve_tasks
from mtrl_vec.tasks.task import Task

DEFAULT_TASKS = ("MT3",)


class MetaWorldEnv(EnvBase):
    """A batch of ``E`` Meta-World simulations, stepped and partially reset as one. See `mtrl_vec.make_env` for many.

    Environment ``i`` holds task ``(first_slot + i) % K``, unless `set_task_probs` says otherwise. A TensorDict of batch
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
        tasks: names of tasks or sets, or tasks of your own, see `mtrl_vec.tasks.suite.resolve_tasks`.
        num_envs: environments in the batch.
        num_rows: ``E``, at least ``num_envs`` and by default the same. Rows beyond ``num_envs`` are idle.
        sim_options: see `mtrl_vec.sim.SimBatch`.

    Raises:
        InputError: unknown or repeated task, or a task whose model lacks what it reads.
    """

    def __init__(
        self,
        tasks: Sequence[str | Task] = DEFAULT_TASKS,
        num_envs: int = 3,
        *,
        num_rows: int | None = None,
        **sim_options: Any,
    ) -> None:
        num_rows = num_envs if num_rows is None else num_rows
        super().__init__(batch_size=[num_rows])
        resolved = resolve_tasks(tasks)
        self.num_tasks = k = len(resolved)
        first_slot = sim_options.get("first_slot", 0)
        self.sim = SimBatch(resolved, (first_slot + np.arange(num_envs)) % k, **sim_options)
        self.rollouts = RolloutWriter(self.sim)
        self._idle = num_rows - num_envs
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

    def _output(self, observation: np.ndarray, **others: torch.Tensor) -> TensorDict:
        """What the environments tell, with zeros in idle rows."""
        task_idx = torch.from_numpy(self.sim.task_idx.copy())
        values = {"observation": torch.from_numpy(observation.astype(np.float32)), "task_idx": task_idx, **others}
        if self._idle:
            values = {name: torch.cat([v, v.new_zeros(self._idle, *v.shape[1:])]) for name, v in values.items()}
        one_hot = torch.nn.functional.one_hot(values["task_idx"], self.num_tasks).float()
        return TensorDict(values | {"task_one_hot": one_hot}, self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if self._restored:
            observation, self._restored = self.sim.observation.copy(), False
        else:
            observation = self.sim.reset(None if mask is None else mask.view(-1)[: self.sim.num_slots].numpy())
        never = torch.zeros(self.sim.num_slots, 1, dtype=torch.bool)
        names = ("success", "unstable", "done", "terminated", "truncated")
        return self._output(observation, **{name: never.clone() for name in names})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        step = self.sim.step(tensordict.get("action")[: self.sim.num_slots].numpy())
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

    def set_task_probs(self, task_probs: NDArray[np.float64] | None) -> None:
        """See `mtrl_vec.sim.SimBatch.set_task_probs`."""
        self.sim.set_task_probs(task_probs)

    def snapshot(self) -> dict[str, NDArray]:
        """See `mtrl_vec.sim.SimBatch.snapshot`."""
        return self.sim.snapshot()

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        """Continue from a `snapshot`. The next reset starts no new episodes but returns the last observations."""
        self.sim.restore(snapshot)
        self._restored = True

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.sim.seed(seed)
