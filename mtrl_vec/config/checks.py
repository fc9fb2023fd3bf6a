"""Checking settings: each failure is one line that names the setting, its value and what it must be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from mtrl_vec.errors import InputError

MAX_SEED = 2**32 - 1
"""NumPy's and Meta-World's seeds have 32 bits."""


def require(condition: bool, name: str, value: object, problem: str) -> None:
    """Raises InputError unless a condition holds."""
    if not condition:
        raise InputError(f"{name} is {value}: it {problem}")


def check_fields(
    section: Any, positive: Iterable[str] = (), not_negative: Iterable[str] = (), fraction: Iterable[str] = ()
) -> None:
    """Check the fields of a frozen dataclass: floats are finite, literals are among their choices, and as listed.

    Args:
        section: the dataclass.
        positive, not_negative, fraction: names of fields that have to be > 0, >= 0, in [0, 1]; None and ``auto`` pass.

    Raises:
        InputError: one of them is not.
    """
    hints = get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        require(not isinstance(value, float) or math.isfinite(value), field.name, value, "must be finite")
        choices = get_args(hints[field.name])
        if choices and all(isinstance(choice, str) for choice in choices):
            require(value in choices, field.name, value, f"must be one of {', '.join(choices)}")
    rules = (
        (positive, lambda v: v > 0, "must be positive"),
        (not_negative, lambda v: v >= 0, "must not be negative"),
        (fraction, lambda v: 0 <= v <= 1, "must be between 0 and 1"),
    )
    for names, holds, problem in rules:
        for name in names:
            value = getattr(section, name)
            require(value in (None, "auto") or holds(value), name, value, problem)


def check_seed(name: str, value: int | None) -> None:
    """Raises InputError where a seed does not have 32 bits."""
    require(value is None or 0 <= value <= MAX_SEED, name, value, f"must be between 0 and {MAX_SEED}")
