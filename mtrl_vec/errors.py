"""Errors that a user has to act on, and how lines like theirs are shown.

Each message is one line: what is wrong, and how to fix it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class InputError(Exception):
    """A setting, file or name that does not work.

    Not a ``ValueError``: the command-line parser catches those and wraps their message in a box.
    """

    shown_elsewhere = False
    """Another rank shows it, see `mtrl_vec.ranks.Ranks.shared`."""


class RunFailed(RuntimeError):
    """A run that cannot continue. What it had learned so far has been saved."""

    shown_elsewhere = False
    """See `InputError`."""


class WorkerDied(RunFailed):
    """A worker process exited on its own. The message names it."""


class Diverged(RunFailed):
    """Loss or gradients are no longer finite. The message names the tensor and task.

    Args:
        message: what happened.
        minibatch: ``policy_state`` and ``minibatch`` that reproduce it, see `mtrl_vec.learn.diagnosis`.
    """

    def __init__(self, message: str, minibatch: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.minibatch = minibatch


def tell(line: str) -> None:
    """Write a line to standard error in one call.

    With two, for the text and its end, an interruption or the output of another rank could come between them.
    """
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def first_line(error: BaseException) -> str:
    """First line of an error's message, shortened, to quote in a message of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
