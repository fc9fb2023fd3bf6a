"""The errors that a person has to act on. Their messages are one line: what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class InputError(Exception):
    """A setting, a file or a name that does not work.

    Not a ``ValueError``: the command line's parser takes those for its own and wraps their message in a box.
    """


class RunFailed(RuntimeError):
    """A run that cannot go on. What it had learned by then is saved."""


class WorkerDied(RunFailed):
    """A simulation worker ended on its own. The message names it."""


class Diverged(RunFailed):
    """The learner's numbers are no longer finite. The message names them.

    Args:
        message: what happened.
        minibatch: ``policy_state`` and ``minibatch`` that it happens with, see `mtrl_vec.diagnosis`.
    """

    def __init__(self, message: str, minibatch: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.minibatch = minibatch
