"""Rows of the tasks with a button."""

from __future__ import annotations

from functools import partial

import numpy as np

from mtrl_vec.tasks.catalog.common import HAND_INIT_NEAR, at_drawn, model, quaternion, shifted, single
from mtrl_vec.tasks.draw import Draw
from mtrl_vec.tasks.rewards import fixtures as rewards
from mtrl_vec.tasks.starts import at, drawn, place_mug, set_fixture
from mtrl_vec.tasks.task import (
    HAND_HIGH,
    HAND_LOW,
    Array,
    Orientation,
    Point,
    Position,
    RewardFn,
    Task,
)


def _button(
    name: str,
    box: tuple[Point, Point],
    reward: RewardFn,
    params: dict[str, float | Point],
    *,
    topdown: bool = False,
) -> Task:
    return Task(
        f"{name}-v3",
        model(name.replace("-", "_")),
        Draw(*box),
        HAND_LOW,
        HAND_HIGH,
        partial(
            set_fixture,
            goal=at("site", "hole"),
            obj=at("site", "buttonStart"),
            slide=None if topdown else 0.0,
            forward=topdown,
        ),
        reward,
        params=params,
        obj=Position("body", "button", (0.0, 0.0, 0.193) if topdown else (0.0, -0.193, 0.0)),
        orientation=quaternion("button"),
        fixture="box",
        place_fixture=at_drawn,
        hand_init=single(HAND_INIT_NEAR),
    )


_DOWN: dict[str, float | Point] = {
    **{"axis": (0.0, 0.0, 1.0), "near": 0.01, "travel": 0.0},
    **{"reach_gain": 5.0, "press_gain": 5.0, "at": 0.03, "success": 0.024},
}
_FORWARD: dict[str, float | Point] = {
    **{"axis": (0.0, 1.0, 0.0), "near": 0.05, "closed": 0.0},
    **{"reach_gain": 2.0, "press_gain": 8.0, "at": 0.05, "success": 0.02},
}
_TOPDOWN_BOX = (-0.1, 0.8, 0.115), (0.1, 0.9, 0.115)
BUTTON_PRESS_TOPDOWN = _button(
    "button-press-topdown", _TOPDOWN_BOX, rewards.press_button, _DOWN | {"closed": 1.0}, topdown=True
)
BUTTON_PRESS_TOPDOWN_WALL = _button(
    "button-press-topdown-wall", _TOPDOWN_BOX, rewards.press_button, _DOWN | {"closed": 0.0}, topdown=True
)
BUTTON_PRESS = _button(
    "button-press", ((-0.1, 0.85, 0.115), (0.1, 0.9, 0.115)), rewards.press_button, _FORWARD | {"travel": 0.0}
)
BUTTON_PRESS_WALL = _button(
    "button-press-wall", ((-0.05, 0.85, 0.1149), (0.05, 0.9, 0.1151)), rewards.press_button_wall, {}
)


def _above_machine(_scene: object, vector: Array) -> Array:
    return (vector + np.array([0.0, -0.22, 0.3])) + np.array([0.0, 0.03, 0.0])


_MACHINE_LOW, _MACHINE_HIGH = (-0.1, 0.8, -0.001), (0.1, 0.9, 0.001)
COFFEE_BUTTON = Task(
    "coffee-button-v3",
    model("coffee"),
    Draw(_MACHINE_LOW, _MACHINE_HIGH),
    shifted(_MACHINE_LOW, (-0.001, -0.22 + 0.03, 0.299)),
    shifted(_MACHINE_HIGH, (0.001, -0.22 + 0.03, 0.301)),
    partial(place_mug, mug=drawn((0.0, -0.22, 0.0)), goal=_above_machine),
    rewards.press_button,
    params=_FORWARD | {"travel": 0.03},
    obj=Position("site", "buttonStart"),
    orientation=Orientation("constant", constant=(1.0, 0.0, 0.0, 0.0)),
    fixture="coffee_machine",
    place_fixture=at_drawn,
    hand_init=HAND_INIT_NEAR,
)
