"""The tasks that exist, and looking them up by name."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from mtrl_vec.errors import InputError
from mtrl_vec.tasks.rewards import pick_place_reward, push_reward, reach_reward
from mtrl_vec.tasks.task import Draw, Task, on_table

_MODEL = "sawyer_xyz/sawyer_pick_place_v3.xml"
"""The models of the three tasks are identical but for the goal's marker, so one serves all."""
_OBJ_LOW, _OBJ_HIGH = (-0.1, 0.6, 0.02), (0.1, 0.7, 0.02)
_AIR_LOW, _AIR_HIGH = (-0.1, 0.8, 0.05), (0.1, 0.9, 0.3)
_TABLE_LOW, _TABLE_HIGH = (-0.1, 0.8, 0.01), (0.1, 0.9, 0.02)
_IN_THE_AIR = Draw(_OBJ_LOW + _AIR_LOW, _OBJ_HIGH + _AIR_HIGH)
_ON_THE_TABLE = Draw(_OBJ_LOW + _TABLE_LOW, _OBJ_HIGH + _TABLE_HIGH)

TASKS = (
    Task("reach-v3", _MODEL, _IN_THE_AIR, _AIR_LOW, _AIR_HIGH, reach_reward),
    Task("push-v3", _MODEL, _ON_THE_TABLE, _TABLE_LOW, _TABLE_HIGH, push_reward, place=on_table),
    Task("pick-place-v3", _MODEL, _IN_THE_AIR, _AIR_LOW, _AIR_HIGH, pick_place_reward),
)
"""All tasks, in the default order."""

_NAME = re.compile(r"(?P<task>[a-z-]+?)(-v(?P<version>\d+))?(-goal-observable)?")


def resolve_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """Look tasks up by name: ``reach``, ``reach-v3``, or the older ``reach-v2-goal-observable``.

    A name that asks for another version gets v3 and a one-line notice on standard error.

    Raises:
        InputError: on an unknown or repeated name, or an empty list.
    """
    known = {task.name.removesuffix("-v3"): task for task in TASKS}
    found: list[Task] = []
    for name in names:
        match = _NAME.fullmatch(name)
        task = known.get(match["task"]) if match else None
        if match is None or task is None:
            raise InputError(f"unknown task {name!r}: known tasks are {', '.join(t.name for t in TASKS)}")
        if match["version"] not in (None, "3"):
            print(f"note: {name} is run as {task.name}", file=sys.stderr)
        if task in found:
            raise InputError(f"task {task.name!r} is given twice: name each task once")
        found.append(task)
    if not found:
        raise InputError(f"no task given: name at least one of {', '.join(t.name for t in TASKS)}")
    return tuple(found)
