"""How far a run is: the one place where its iterations are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Counts of a run.

    Attributes:
        frames_per_batch: environment steps per iteration.
        num_iterations: of the whole run.
        iteration: whole iterations so far: a rollout of all environments, and learning from it.
        elapsed: seconds of training so far, without the time between an interruption and its resumption.
        skipped_updates: optimiser steps skipped so far.
        restarts: times so far that dead simulators were replaced.
    """

    frames_per_batch: int
    num_iterations: int
    iteration: int = 0
    elapsed: float = 0.0
    skipped_updates: int = 0
    restarts: int = 0

    _STATE = ("iteration", "elapsed", "skipped_updates", "restarts")

    @property
    def frames(self) -> int:
        """Environment steps of whole iterations, over all tasks."""
        return self.iteration * self.frames_per_batch

    @property
    def total_frames(self) -> int:
        """Environment steps of the whole run."""
        return self.num_iterations * self.frames_per_batch

    @property
    def fraction(self) -> float:
        """Fraction of the run that is over."""
        return self.iteration / self.num_iterations

    @property
    def done(self) -> bool:
        """Whether all iterations are over."""
        return self.iteration >= self.num_iterations

    def passed_multiple(self, frames: int) -> bool:
        """Whether the last iteration reached or passed a multiple of a number of frames."""
        return self.frames // frames > (self.frames - self.frames_per_batch) // frames

    def state_dict(self) -> dict[str, Any]:
        """What is counted."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        for name in self._STATE:
            setattr(self, name, state[name])
