"""Exploration: how much of it a task needs, and the noise of the actions.

Shapes: ``B`` environments, ``A`` action size, ``K`` tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrl_vec.ranks import ALONE, Ranks

ENOUGH_SUCCESS = 0.5
"""Success rate from which on a task explores no more than its policy wants to."""


def exploration(
    success: NDArray[np.float64], frames: NDArray[np.int64], delay: int, unknown: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How much each task has to explore, [K]: 1 at a success rate of 0, falling linearly to 0 at `ENOUGH_SUCCESS`.

    Reward alone may lead to a place that is not success, and where less noise always pays: a hand at a drawer's handle,
    which would have to lose some reward in order to pull. But many tasks are learned sooner without, which is
    what ``delay`` is for.

    Args:
        success: success rates, [K]; NaN where there is none yet.
        frames: environment steps of each task so far, [K].
        delay: environment steps of a task at which its exploration begins; it is full at twice as many.
        unknown: what to take for one minus the success rate where there is none, [K].
    """
    failing = np.where(np.isnan(success), unknown, np.clip(1 - success / ENOUGH_SUCCESS, 0.0, 1.0))
    return failing * np.clip(frames / delay - 1, 0.0, 1.0) if delay else failing


class ActionNoise:
    """Standard normal noise, a sequence for each environment and action dimension: AR(1) with a coefficient per task.

    ``n_t = rho n_(t-1) + sqrt(1 - rho^2) w_t``, where w is white. Each value by itself is standard normal, whatever
    ``rho``, so that log-probabilities are those of white noise; what PPO then neglects is that the values of successive
    steps are not independent. A push that lasts for several steps opens a door; white noise takes back in the next step
    what it did in the last. (Hollenstein et al. 2024, "Colored Noise in PPO", for noise of other spectra.)

    Args:
        num_tasks, action_size: ``K`` and ``A``.
        generator: of the white noise, on the device that it is wanted on.
        ranks: with ``B`` environments each. All draw for all, so that their generators stay in step and the noise of an
            environment does not depend on the number of ranks.

    Attributes:
        correlation: [K], the coefficients ``rho`` in [0, 1).
    """

    def __init__(self, num_tasks: int, action_size: int, generator: torch.Generator, ranks: Ranks = ALONE) -> None:
        self.generator, self._action_size, self._ranks = generator, action_size, ranks
        self.correlation = torch.zeros(num_tasks, device=generator.device)
        self._before: Tensor | None = None
        self._last: Tensor | None = None

    def __call__(self, task_idx: Tensor) -> Tensor:
        """Noise [..., A] of the next step of all environments, whose tasks are [...]."""
        self.draw(task_idx.numel())
        return self.of(slice(None), task_idx)

    def draw(self, num_envs: int) -> None:
        """Begin the next step of all ``num_envs`` environments of this rank; then call `of` exactly once for each."""
        all_rows = self._ranks.size * num_envs
        white = torch.randn(all_rows, self._action_size, device=self.generator.device, generator=self.generator)
        self._before, self._last = self._last, white[self._ranks.part(all_rows)]

    def of(self, rows: slice, task_idx: Tensor) -> Tensor:
        """Noise [..., A] of the step that was drawn last, of some environments, whose tasks are [...]."""
        assert self._last is not None, "nothing has been drawn"
        if self._before is not None:  # else the white noise is as stationary as any
            rho = self.correlation.index_select(0, task_idx.flatten())[:, None]
            self._last[rows] = rho * self._before[rows] + (1 - rho**2).sqrt() * self._last[rows]
        return self._last[rows].view(*task_idx.shape, self._action_size)

    def set_correlation(self, correlation: NDArray[np.float64]) -> None:
        """Take other coefficients from the next step on, [K]."""
        self.correlation.copy_(torch.from_numpy(correlation))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the noise continues from, but for the coefficients; not a copy."""
        return {"generator": self.generator.get_state(), "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._last = None if state["last"] is None else state["last"].to(self.correlation.device)
        if state["generator"].numel() == self.generator.get_state().numel():  # else it is from another kind of device
            self.generator.set_state(state["generator"])
