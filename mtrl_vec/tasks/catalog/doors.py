"""Rows of the tasks with a door, its lock, or a drawer."""

from __future__ import annotations

from functools import partial

from mtrl_vec.tasks.catalog.common import LOW_HAND, at_drawn, model, quaternion, single
from mtrl_vec.tasks.draw import Draw
from mtrl_vec.tasks.rewards import fixtures as rewards
from mtrl_vec.tasks.starts import at, drawn, set_fixture
from mtrl_vec.tasks.task import (
    HAND_HIGH,
    HAND_INIT_POS,
    HAND_LOW,
    NO_ORIENTATION,
    Orientation,
    Point,
    Position,
    RewardFn,
    StartFn,
    Task,
)

# -- Doors and their locks.


def _door(
    name: str, *, hand_init: Point, goal: tuple[Point, Point], offset: Point, angle: float, **rest: object
) -> Task:
    return Task(
        name,
        model("door_pull"),
        Draw((0.0, 0.85, 0.15), (0.1, 0.95, 0.15)),
        *goal,
        partial(set_fixture, goal=drawn(offset), obj=drawn(), slide=angle),
        obj=Position("geom", "handle"),
        orientation=Orientation("geom", "handle"),
        fixture="door",
        place_fixture=at_drawn,
        hand_init=hand_init,
        **rest,  # type: ignore[arg-type]
    )


DOOR_OPEN = _door(
    "door-open-v3",
    hand_init=HAND_INIT_POS,
    goal=((-0.3, 0.4, 0.1499), (-0.2, 0.5, 0.1501)),
    offset=(-0.3, -0.45, 0.0),
    angle=0.0,
    reward=rewards.door_open,
    joint="doorjoint",
)
_DOOR_HAND = single((-0.5, 0.6, 0.2))
DOOR_CLOSE = _door(
    "door-close-v3",
    hand_init=_DOOR_HAND,
    goal=((0.2, 0.65, 0.1499), (0.3, 0.75, 0.1501)),
    offset=(0.2, -0.2, 0.0),
    angle=-1.5708,
    reward=rewards.door_close,
    params={"hand_init": _DOOR_HAND},
)
_LOCK = ("body", "lock_link")


def _lock(name: str, goal: tuple[Point, Point], start: StartFn, reward: RewardFn, site: str, *points: Position) -> Task:
    return Task(
        name,
        model("door_lock"),
        Draw((-0.1, 0.8, 0.15), (0.1, 0.85, 0.15)),
        *goal,
        start,
        reward,
        points=points,
        obj=Position("site", site),
        orientation=quaternion("door_link"),
        fixture="door",
        place_fixture=at_drawn,
        hand_init=single(HAND_INIT_POS),
        mocap_low=LOW_HAND,
        settles=True,
    )


DOOR_LOCK = _lock(
    "door-lock-v3",
    (LOW_HAND, HAND_HIGH),
    partial(set_fixture, steps=5, goal=at(*_LOCK, (0.0, -0.04, -0.1)), obj=at(*_LOCK)),
    rewards.door_lock,
    "lockStartLock",
)
DOOR_UNLOCK = _lock(
    "door-unlock-v3",
    ((0.0, 0.64, 0.2100), (0.2, 0.7, 0.2111)),
    partial(set_fixture, slide=1.5708, goal=at(*_LOCK, (0.1, -0.04, 0.0)), obj=at(*_LOCK)),
    rewards.door_unlock,
    "lockStartUnlock",
    Position(*_LOCK),
)

# -- Drawers.

_DRAWER = Draw((-0.1, 0.9, 0.0), (0.1, 0.9, 0.0))
DRAWER_OPEN = Task(
    "drawer-open-v3",
    model("drawer"),
    _DRAWER,
    HAND_LOW,
    HAND_HIGH,
    partial(set_fixture, goal=drawn((0.0, -0.16 - 0.2, 0.09)), obj=drawn()),
    rewards.drawer_open,
    obj=Position("body", "drawer_link", (0.0, -0.16, 0.0)),
    orientation=quaternion("drawer_link"),
    fixture="drawer",
    place_fixture=at_drawn,
    hand_init=single(HAND_INIT_POS),
)
_DRAWER_HANDLE: Point = (0.0, -0.16, 0.05)
DRAWER_CLOSE = Task(
    "drawer-close-v3",
    model("drawer"),
    _DRAWER,
    HAND_LOW,
    HAND_HIGH,
    partial(
        set_fixture,
        slide=-0.15,
        still=False,
        goal=drawn((0.0, -0.16, 0.09)),
        obj=at("body", "drawer_link", _DRAWER_HANDLE),
    ),
    rewards.drawer_close,
    obj=Position("body", "drawer_link", _DRAWER_HANDLE),
    orientation=NO_ORIENTATION,
    fixture="drawer",
    place_fixture=at_drawn,
    hand_init=single(HAND_INIT_POS),
)
