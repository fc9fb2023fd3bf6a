"""The tasks that exist, sets of them, looking them up by name, and adding your own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError, tell
from mtrl_vec.tasks.catalog import buttons as b
from mtrl_vec.tasks.catalog import carrying as c
from mtrl_vec.tasks.catalog import doors as d
from mtrl_vec.tasks.catalog import handles as h
from mtrl_vec.tasks.catalog import pucks as p
from mtrl_vec.tasks.catalog import tools as t
from mtrl_vec.tasks.draw import benchmark_vectors
from mtrl_vec.tasks.task import Task

MT3 = (p.REACH, p.PUSH, p.PICK_PLACE)
"""The three tasks with a puck, which share one physics model."""
MT10 = (
    *(p.REACH, p.PUSH, p.PICK_PLACE, d.DOOR_OPEN, d.DRAWER_OPEN, d.DRAWER_CLOSE, b.BUTTON_PRESS_TOPDOWN),
    *(t.PEG_INSERT_SIDE, h.WINDOW_OPEN, h.WINDOW_CLOSE),
)
"""``metaworld.MT10``, in its order."""
MT50 = (
    *(t.ASSEMBLY, c.BASKETBALL, c.BIN_PICKING, t.BOX_CLOSE, b.BUTTON_PRESS_TOPDOWN, b.BUTTON_PRESS_TOPDOWN_WALL),
    *(b.BUTTON_PRESS, b.BUTTON_PRESS_WALL, b.COFFEE_BUTTON, c.COFFEE_PULL, c.COFFEE_PUSH, h.DIAL_TURN),
    *(t.DISASSEMBLE, d.DOOR_CLOSE, d.DOOR_LOCK, d.DOOR_OPEN, d.DOOR_UNLOCK, c.HAND_INSERT, d.DRAWER_CLOSE),
    *(d.DRAWER_OPEN, h.FAUCET_OPEN, h.FAUCET_CLOSE, t.HAMMER, h.HANDLE_PRESS_SIDE, h.HANDLE_PRESS),
    *(h.HANDLE_PULL_SIDE, h.HANDLE_PULL, h.LEVER_PULL, p.PICK_PLACE_WALL, c.PICK_OUT_OF_HOLE, p.PICK_PLACE),
    *(c.PLATE_SLIDE, c.PLATE_SLIDE_SIDE, c.PLATE_SLIDE_BACK, c.PLATE_SLIDE_BACK_SIDE, t.PEG_INSERT_SIDE),
    *(t.PEG_UNPLUG_SIDE, c.SOCCER, t.STICK_PUSH, t.STICK_PULL, p.PUSH, p.PUSH_WALL, p.PUSH_BACK, p.REACH),
    *(p.REACH_WALL, c.SHELF_PLACE, c.SWEEP_INTO, c.SWEEP, h.WINDOW_OPEN, h.WINDOW_CLOSE),
)
"""``metaworld.MT50``, in its order."""
TASK_SETS = {"MT3": MT3, "MT10": MT10, "MT50": MT50}
"""Sets of tasks that can be named wherever tasks are."""

_KNOWN = {task.name: task for task in MT50}
_NAME = re.compile(r"(?P<task>[a-z0-9-]+?)(-v(?P<version>\d+))?(-goal-observable)?")


class UnknownTask(InputError):
    """No task or set of this name.

    Attributes:
        name: that was given.
    """

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


def register_task(task: Task) -> None:
    """Make a task of your own known by its name, which can then be given wherever tasks are named.

    Raises:
        InputError: the name stands for something already, or has other characters than a to z, 0 to 9 and "-".
    """
    if _NAME.fullmatch(task.name) is None:
        raise InputError(f"task name {task.name!r} has other characters than a to z, 0 to 9 and '-': rename the task")
    if task.name.upper() in TASK_SETS or (task.name not in _KNOWN and _find(task.name) is not None):
        raise InputError(f"task name {task.name!r} stands for something else already: give yours another name")
    if task.name in _KNOWN and _KNOWN[task.name] is not task:
        raise InputError(f"a task named {task.name!r} exists already: give yours another name")
    _KNOWN[task.name] = task


def resolve_tasks(names: Iterable[str | Task]) -> tuple[Task, ...]:
    """Look tasks up: a set (``MT10``), ``reach``, ``reach-v3``, or the older ``reach-v2-goal-observable``.

    A name that asks for another version gets v3 and a one-line notice on standard error. A `Task` stands for itself.

    Raises:
        InputError: on an unknown or repeated name, or an empty list.
    """
    found: list[Task] = []
    origin: dict[str, str] = {}
    for name in names:
        for task in [name] if isinstance(name, Task) else _look_up(name):
            label = name.name if isinstance(name, Task) else name
            if task.name in origin:
                named = [name for name in (label, origin[task.name]) if name.upper() in TASK_SETS]
                which = f"and is in {named[0]}" if named else "twice"
                raise InputError(f"task {task.name!r} is given {which}: name each task once")
            origin[task.name] = label
            found.append(task)
    if not found:
        raise InputError(f"no task given: name a set ({', '.join(TASK_SETS)}) or tasks, for example reach-v3")
    return tuple(found)


def _look_up(name: str) -> Sequence[Task]:
    if name.upper() in TASK_SETS:
        return TASK_SETS[name.upper()]
    if name in _KNOWN:
        return [_KNOWN[name]]
    task = _find(name)
    if task is None:
        raise UnknownTask(f"unknown task {name!r}{_suggestion(name)}", name)
    version = re.search(r"-v(\d+)", name)
    if version is not None and version[1] != "3":
        tell(f"note: {name} is run as {task.name}")
    return [task]


def _find(name: str) -> Task | None:
    """Meta-World's task of a name with another version, or without one."""
    match = _NAME.fullmatch(name)
    return _KNOWN.get(f"{match['task']}-v3") if match else None


def _suggestion(name: str) -> str:
    known = {**{task.removesuffix("-v3"): task for task in _KNOWN}, **{task: task for task in _KNOWN}}
    known |= {name.lower(): name for name in TASK_SETS}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    if close:
        return f": did you mean {known[close[0]]}?"
    sets = ", ".join(TASK_SETS)
    return f": name a set ({sets}) or tasks of MT50; one of your own has to be registered first, in a program of yours"


def registered_names(tasks: Iterable[str | Task]) -> tuple[str, ...]:
    """Names of tasks, for what keeps names only.

    Raises:
        InputError: see `resolve_tasks`; or a `Task` that its name does not stand for.
    """
    resolved = resolve_tasks(tasks)
    for task in resolved:
        if _KNOWN.get(task.name) is not task:
            raise InputError(f"task {task.name!r} is not registered: call register_task with it first, or rename it")
    return tuple(task.name for task in resolved)


def fixed_vectors(tasks: Sequence[Task], seed: int) -> list[NDArray[np.float64]]:
    """The vectors of the 50 fixed goals per task of a benchmark seed, [50, V] for each task.

    Those of ``metaworld.MT10(seed)`` and ``MT50(seed)`` for exactly the tasks of that benchmark in its order, where
    one random stream runs through all tasks; otherwise those of ``metaworld.MT1(name, seed)`` for each.
    """
    if tuple(tasks) in (MT10, MT50):
        return benchmark_vectors([task.draw for task in tasks], seed)
    return [benchmark_vectors([task.draw], seed)[0] for task in tasks]
