"""The state of a whole run: copied after each iteration, written from time to time, and restored."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError, first_line
from mtrl_vec.machine import versions
from mtrl_vec.policy.checkpoint import checkpoint_name, checkpoints, save_checkpoint
from mtrl_vec.processes import deferred_interrupts
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.timing import Timer
from mtrl_vec.train.progress import Progress
from mtrl_vec.train.run_dir import leftovers

KEPT = 3
"""Checkpoints of a run's whole state that are kept, the newest ones."""


class Stateful(Protocol):
    """A part of a run that continues from where it was."""

    def state_dict(self) -> Any:
        """Everything that it continues from."""

    def load_state_dict(self, state: Any) -> Any:
        """Continue from a `state_dict`."""


class Checkpoints:
    """Checkpoints of a run.

    Args:
        folder: of the run.
        config: its settings.
        parts: what has a state, by name; all of it and nothing else is in a checkpoint, beside `header`.
        progress: of the run, one of the parts.
        timer: its seconds are part of the state.
        ranks: the state of all of them is gathered on the first one, which writes it.

    Attributes:
        saved_frames: of the last checkpoint that was written.
        problem: why the last checkpoint could not be written, if so.
        notify: is told of such problems.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        parts: Mapping[str, Stateful],
        progress: Progress,
        timer: Timer,
        ranks: Ranks = ALONE,
    ) -> None:
        self._folder, self._config, self._parts, self._ranks = folder, config, parts, ranks
        self._progress, self._timer = progress, timer
        self._last: dict[str, Any] | None = None
        self._saved_at = time.perf_counter()
        self.saved_frames = 0
        self.problem = ""
        self.notify: Callable[[str], None] = lambda message: None

    @property
    def frames(self) -> int:
        """Environment steps of the last whole iteration, which is what `save` saves."""
        return 0 if self._last is None else self._last["frames"]

    def restore(self, content: Mapping[str, Any]) -> None:
        """Put all parts where a checkpoint says. Raises InputError where it does not fit them."""
        try:
            for name, part in self._parts.items():
                part.load_state_dict(content[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = first_line(error)
            raise InputError(
                f"the run in {self._folder} is from another version ({reason}): start a new one"
            ) from error
        self._timer.seconds |= content["seconds"]
        self._last, self.saved_frames = dict(content), content["frames"]

    def take(self) -> None:
        """Copy the state of the run: a whole iteration is over."""
        with self._timer("checkpoint"):
            states = {name: part.state_dict() for name, part in self._parts.items()}  # of all ranks
            if self._ranks.first:
                states = copy.deepcopy(states)
            self._last = header(self._config, self._progress) | states | {"seconds": dict(self._timer.seconds)}

    def save_if_due(self) -> None:
        """Write what was taken last, if the last checkpoint is old enough."""
        if time.perf_counter() - self._saved_at >= self._config.runtime.checkpoint_seconds:
            self.save()
            self._saved_at = time.perf_counter()

    def save(self) -> None:
        """Write what was taken last, if that is new; and remove the oldest checkpoints."""
        if self._last is None or self.frames <= self.saved_frames:
            return
        if not self._ranks.first:
            self.saved_frames = self.frames
            return
        path = self._folder / checkpoint_name(self.frames)
        try:
            # torchrun ends all ranks as soon as one is lost, and then this is what there is to continue from.
            with self._timer("checkpoint"), deferred_interrupts():
                save_checkpoint(path, self._last)
        except OSError as error:
            self.problem = f"cannot write {path} ({error.strerror})"
            self.notify(f"{self.problem}: the checkpoints before it are still there")
            return
        self.saved_frames, self.problem = self.frames, ""
        for old in (*checkpoints(self._folder)[KEPT:], *leftovers(self._folder)):
            with contextlib.suppress(OSError):
                old.unlink()


def header(config: TrainConfig, progress: Progress) -> dict[str, Any]:
    """What every checkpoint says about itself: settings, versions of packages, and how long it was trained."""
    return {"config": config.to_dict(), "versions": versions(), "frames": progress.frames}
