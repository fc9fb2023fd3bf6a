"""In which order collecting and learning take place: alternating, or overlapping.

Shapes: ``B`` environments of this rank, ``T`` steps, ``K`` tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase

from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.train.rollouts import Rollouts

Metrics = dict[str, float]
Learn = Callable[[TensorDictBase], Metrics]
"""Learns from a rollout [B, T]."""


class Alternating:
    """Collect a rollout, then learn from it.

    Args:
        rollouts: where they come from.
        learn: what to do with them.
    """

    def __init__(self, rollouts: Rollouts, learn: Learn) -> None:
        self._rollouts, self._learn = rollouts, learn

    def __call__(self, task_probs: NDArray[np.float64] | None, last: bool) -> tuple[TensorDictBase, Metrics]:
        """The rollout [B, T] of one iteration, and the metrics of learning from it.

        Args:
            task_probs: see `Rollouts.collect`.
            last: no iteration follows.
        """
        rollout = self._rollouts.collect(task_probs)
        return rollout, self._learn(rollout)

    def close(self) -> None:
        """End threads and simulators."""
        self._rollouts.close()

    def state_dict(self) -> dict[str, Any]:
        """What is between collecting and learning: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""


class Overlapping(Alternating):
    """Learn from a rollout while the next one is collected, by a policy that is one iteration behind.

    The learner's thread is mostly in torch, which lets the collecting one run. The first two iterations alternate all
    the same: torch does not compile and capture in one thread while another one computes.

    Args:
        rollouts, learn: see `Alternating`.
        acting: has to lag behind the policy that learns.
        ranks: which all go on in the same way.
    """

    ALTERNATE_FIRST = 2

    def __init__(self, rollouts: Rollouts, learn: Learn, acting: ActingPolicy, ranks: Ranks = ALONE) -> None:
        super().__init__(rollouts, learn)
        self._acting, self._ranks = acting, ranks
        self._ahead: TensorDictBase | None = None  # the next rollout
        self._iterations = 0  # in this process
        self._thread: ThreadPoolExecutor | None = None

    def __call__(self, task_probs: NDArray[np.float64] | None, last: bool) -> tuple[TensorDictBase, Metrics]:
        """See `Alternating`."""
        rollout = self._ahead
        if rollout is None:
            rollout = self._rollouts.collect(task_probs)
            self._acting.catch_up()  # so that the policy before is the one that collected it, also in a longer run
        if self._iterations < self.ALTERNATE_FIRST:
            self._ahead = None if last else self._rollouts.collect(task_probs)
            metrics = self._learn(rollout)
        else:
            learning = self._learner_thread().submit(self._learn, rollout)
            try:
                self._ahead = None if last else self._rollouts.collect(task_probs)
            finally:
                wait([learning])  # also after an error: it must not go on learning in the background
            metrics = learning.result()
        self._iterations += 1
        self._acting.catch_up()
        return rollout, metrics

    def _learner_thread(self) -> ThreadPoolExecutor:
        if self._thread is None:
            arguments = torch.get_num_threads(), self._acting.device
            self._thread = ThreadPoolExecutor(1, "learner", _set_up_thread, arguments)
        return self._thread

    def close(self) -> None:
        """See `Alternating`."""
        super().close()
        if self._thread is not None:
            self._thread.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """The next rollout; not a copy. On the first rank that of all ranks."""
        if self._ahead is None:
            return {"ahead": None}
        ahead = self._ranks.rows_at_first(self._ahead.flatten_keys(".").to_dict())
        return {"ahead": ahead, "shape": list(ahead["observation"].shape[:2])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        if state["ahead"] is None:
            self._ahead = None
            return
        ahead = TensorDict(state["ahead"], state["shape"]).unflatten_keys(".")
        self._ahead = ahead[self._ranks.part(len(ahead))]


def _set_up_thread(num_threads: int, device: torch.device) -> None:
    """A new thread has as many torch threads as any other has set last, and the first GPU."""
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
