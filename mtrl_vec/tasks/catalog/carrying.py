"""Rows of the tasks that put an object onto, into or out of something; and the mug and the plates."""

from __future__ import annotations

from functools import partial

import numpy as np

from mtrl_vec.tasks.catalog.common import (
    CARRY_AXES,
    HAND_INIT_NEAR,
    PUCK_HIGH,
    PUCK_LOW,
    at_drawn,
    at_drawn_goal,
    model,
    quaternion,
    shifted,
    single,
)
from mtrl_vec.tasks.draw import Draw
from mtrl_vec.tasks.rewards import objects as rewards
from mtrl_vec.tasks.starts import (
    at,
    drawn,
    drawn_goal,
    fixed_goal,
    place_mug,
    place_object,
    slide_plate,
    sweep_off_table,
)
from mtrl_vec.tasks.task import HAND_INIT_POS, Array, FixtureFn, Orientation, Point, Position, Task
from mtrl_vec.tasks.terms import REACHING, SPARSE, caging, side_caging

_COFFEE: dict[str, float | Point] = {
    **{"scale": (2.0, 2.0, 1.0), "up": (0.0, 0.0, 1.0), "unscaled": 1.0},
    **{"hold": 0.04, "lift": rewards.ANY_HEIGHT, "gain": 5.0, "success": 0.07},
}
_BODY_HEIGHT = ("body", "obj")


# -- Onto, into, out of and off something.

_INTO_LOW, _INTO_HIGH = (-0.001, 0.8399, 0.0199), (0.001, 0.8401, 0.0201)
SWEEP_INTO = Task(
    "sweep-into-v3",
    model("table_with_hole"),
    Draw(PUCK_LOW + _INTO_LOW, PUCK_HIGH + _INTO_HIGH, 0.15, keep_from=(0.0, 0.84)),
    _INTO_LOW,
    _INTO_HIGH,
    partial(place_object, height=_BODY_HEIGHT, goal=partial(fixed_goal, goal=(0.0, 0.84, 0.02))),
    rewards.sweep,
    params={"into": 1.0},
    grasp=side_caging(0.02, 0.005, 0.01),
)
SWEEP = Task(
    "sweep-v3",
    model("sweep_v3"),
    Draw(PUCK_LOW, PUCK_HIGH),
    (0.49, 0.6, 0.0),
    (0.51, 0.7, 0.02),
    sweep_off_table,
    rewards.sweep,
    params={"into": 0.0},
    grasp=side_caging(0.02, 0.01, 0.005),
    orientation=quaternion("obj"),
)
_SOCCER_LOW, _SOCCER_HIGH = (-0.1, 0.8, 0.0), (0.1, 0.9, 0.0)
SOCCER = Task(
    "soccer-v3",
    model("soccer"),
    Draw((-0.1, 0.6, 0.03, *_SOCCER_LOW), (0.1, 0.7, 0.03, *_SOCCER_HIGH), 0.15),
    _SOCCER_LOW,
    _SOCCER_HIGH,
    partial(place_object, height=0.03),
    rewards.soccer,
    grasp=side_caging(0.013, 0.01, 0.005),
    obj=Position("body", "soccer_ball"),
    orientation=Orientation("body", "soccer_ball"),
    fixture="goal_whole",
    place_fixture=at_drawn_goal,
)
_INSERT_LOW, _INSERT_HIGH = (-0.04, 0.8, -0.0201), (0.04, 0.88, -0.0199)
HAND_INSERT = Task(
    "hand-insert-v3",
    model("table_with_hole"),
    Draw((-0.1, 0.6, 0.05, *_INSERT_LOW), (0.1, 0.7, 0.05, *_INSERT_HIGH), 0.15),
    _INSERT_LOW,
    _INSERT_HIGH,
    partial(place_object, height=0.05),
    rewards.carry,
    params=CARRY_AXES | {"hold": 0.02, "lift": rewards.ANY_HEIGHT, "gain": 7.0, "success": 0.05},
    grasp=caging(0.015, 0.05, 0.005),
    orientation=quaternion("obj"),
    hand_init=single(HAND_INIT_POS),
    mocap_low=(-0.5, 0.40, -0.15),
)
_BASKET_LOW, _BASKET_HIGH = (-0.1, 0.85, 0.0), (0.1, 0.9 + 1e-7, 0.0)
BASKETBALL = Task(
    "basketball-v3",
    model("basketball"),
    Draw((-0.1, 0.6, 0.0299, *_BASKET_LOW), (0.1, 0.7, 0.0301, *_BASKET_HIGH), 0.15),
    shifted(_BASKET_LOW, (0.0, -0.083, 0.2499)),
    shifted(_BASKET_HIGH, (0.0, -0.083, 0.2501)),
    partial(place_object, height=float(np.float32(0.03)), goal=at("site", "goal")),
    rewards.basketball,
    grasp=caging(0.025, 0.06, 0.005),
    obj=Position("body", "bsktball"),
    orientation=quaternion("bsktball"),
    fixture="basket_goal",
    place_fixture=at_drawn_goal,
    hand_init=single(HAND_INIT_POS),
)
_BIN_LOW, _BIN_HIGH = (0.1199, 0.699, -0.001), (0.1201, 0.701, 0.001)
BIN_PICKING = Task(
    "bin-picking-v3",
    model("bin_picking"),
    Draw((-0.21, 0.65, 0.02, *_BIN_LOW), (-0.03, 0.75, 0.02, *_BIN_HIGH)),
    _BIN_LOW,
    _BIN_HIGH,
    partial(place_object, height=_BODY_HEIGHT, goal=at("body", "bin_goal")),
    rewards.bin_picking,
    grasp=caging(0.015, 0.05, 0.01, effort=0.7),
    orientation=quaternion("obj"),
    mocap_low=(-0.5, 0.40, 0.07),
)
_OUT_LOW, _OUT_HIGH = (-0.1, 0.5, 0.15), (0.1, 0.6, 0.3)
PICK_OUT_OF_HOLE = Task(
    "pick-out-of-hole-v3",
    model("pick_out_of_hole"),
    Draw((0.0, 0.75, 0.02, *_OUT_LOW), (0.0, 0.75, 0.02, *_OUT_HIGH), 0.15),
    _OUT_LOW,
    _OUT_HIGH,
    place_object,
    rewards.pick_out_of_hole,
    grasp=caging(0.015, 0.02, 0.03, effort=0.1),
    orientation=quaternion("obj"),
    mocap_low=(-0.5, 0.40, -0.05),
)
_SHELF_LOW, _SHELF_HIGH = (-0.1, 0.8, 0.299), (0.1, 0.9, 0.301)


def _shelf(vector: Array, _model_pos: Array) -> Array:
    return vector[-3:] - np.array([0.0, 0.0, 0.3])


SHELF_PLACE = Task(
    "shelf-place-v3",
    model("shelf_placing"),
    Draw((-0.1, 0.5, 0.019, *_SHELF_LOW), (0.1, 0.6, 0.021, *_SHELF_HIGH), 0.1),
    _SHELF_LOW,
    _SHELF_HIGH,
    partial(place_object, height=_BODY_HEIGHT, goal=at("site", "goal"), forward=True),
    rewards.shelf_place,
    grasp=caging(0.02, 0.05, 0.01, density=SPARSE),
    fixture="shelf",
    place_fixture=_shelf,
    hand_init=single(HAND_INIT_POS),
)

# -- The coffee machine's mug.


def _machine_behind_mug(vector: Array, _model_pos: Array) -> Array:
    return vector[:3] + np.array([0.0, 0.22, 0.0])


def _machine_behind_goal(vector: Array, _model_pos: Array) -> Array:
    return vector[-3:] + np.array([0.0, 0.22, 0.0])


def _coffee(name: str, mug: tuple[Point, Point], goal: tuple[Point, Point], machine: FixtureFn) -> Task:
    (mug_low, mug_high), (low, high) = mug, goal
    return Task(
        name,
        model("coffee"),
        Draw(mug_low + low, mug_high + high, 0.15),
        low,
        high,
        partial(place_mug, mug=drawn(), goal=drawn_goal),
        rewards.carry,
        params=_COFFEE,
        grasp=caging(0.02, 0.05, 0.05, effort=0.7, density=REACHING, reach=0.04),
        orientation=Orientation("geom", "mug"),
        fixture="coffee_machine",
        place_fixture=machine,
        hand_init=HAND_INIT_NEAR,
    )


_BY_MACHINE: tuple[Point, Point] = ((-0.05, 0.7, -0.001), (0.05, 0.75, 0.001))
_BY_ROBOT: tuple[Point, Point] = ((-0.1, 0.55, -0.001), (0.1, 0.65, 0.001))
COFFEE_PULL = _coffee("coffee-pull-v3", _BY_MACHINE, _BY_ROBOT, _machine_behind_mug)
COFFEE_PUSH = _coffee("coffee-push-v3", _BY_ROBOT, _BY_MACHINE, _machine_behind_goal)

# -- Plates.


def _plate(
    name: str,
    file: str,
    obj: Point,
    goal: tuple[Point, Point],
    slide: tuple[float, float],
    moves: bool = False,
    forward: bool = False,
) -> Task:
    low, high = goal
    return Task(
        name,
        model(file),
        Draw(obj + low, obj + high),
        low,
        high,
        partial(slide_plate, slide=slide),
        rewards.plate_slide,
        params={"forward": float(forward)},
        obj=Position("geom", "puck"),
        orientation=Orientation("geom", "puck"),
        fixture="puck_goal" if moves else None,
        place_fixture=(at_drawn_goal if forward else at_drawn) if moves else None,
        hand_init=single(HAND_INIT_POS),
    )


PLATE_SLIDE = _plate(
    *("plate-slide-v3", "plate_slide", (0.0, 0.6, 0.0), ((-0.1, 0.85, 0.0), (0.1, 0.9, 0.0)), (0.0, 0.0)),
    moves=True,
    forward=True,
)
PLATE_SLIDE_SIDE = _plate(
    *("plate-slide-side-v3", "plate_slide_sideway", (0.0, 0.6, 0.0)),
    *(((-0.3, 0.54, 0.0), (-0.25, 0.66, 0.0)), (0.0, 0.0)),
)
PLATE_SLIDE_BACK = _plate(
    *("plate-slide-back-v3", "plate_slide", (0.0, 0.85, 0.0), ((-0.1, 0.6, 0.015), (0.1, 0.6, 0.015)), (0.0, 0.15))
)
PLATE_SLIDE_BACK_SIDE = _plate(
    *("plate-slide-back-side-v3", "plate_slide_sideway", (-0.25, 0.6, 0.0)),
    *(((-0.05, 0.6, 0.015), (0.15, 0.6, 0.015)), (-0.15, 0.0)),
    moves=True,
)
