"""Rows of the tasks with a free puck on the table: reach, push, pick and place; also beside a wall."""

from __future__ import annotations

from functools import partial

from mtrl_vec.tasks.catalog.common import (
    CARRY_AXES,
    PUCK_HIGH,
    PUCK_LOW,
    model,
    single,
)
from mtrl_vec.tasks.draw import Draw
from mtrl_vec.tasks.rewards import objects as rewards
from mtrl_vec.tasks.starts import place_object
from mtrl_vec.tasks.task import HAND_INIT_POS, Position, Task
from mtrl_vec.tasks.terms import SPARSE, caging, side_caging

_BODY_HEIGHT, _GEOM_HEIGHT = ("body", "obj"), ("geom", "objGeom")
_GEOM = Position("geom", "objGeom")


# -- Free pucks. Reach, push and pick-place have models of their own, but for the goal's marker they are one.

_PUCK = model("pick_place_v3")
_AIR_LOW, _AIR_HIGH = (-0.1, 0.8, 0.05), (0.1, 0.9, 0.3)
_TABLE_LOW, _TABLE_HIGH = (-0.1, 0.8, 0.01), (0.1, 0.9, 0.02)

REACH = Task(
    "reach-v3",
    _PUCK,
    Draw(PUCK_LOW + _AIR_LOW, PUCK_HIGH + _AIR_HIGH, 0.15),
    _AIR_LOW,
    _AIR_HIGH,
    place_object,
    rewards.reach,
    params={"hand_init": HAND_INIT_POS},
)
PUSH = Task(
    "push-v3",
    _PUCK,
    Draw(PUCK_LOW + _TABLE_LOW, PUCK_HIGH + _TABLE_HIGH, 0.15),
    _TABLE_LOW,
    _TABLE_HIGH,
    partial(place_object, height=_BODY_HEIGHT, goal_at_height=True),
    rewards.push,
    grasp=caging(0.015, 0.05, 0.005),
)
PICK_PLACE = Task(
    "pick-place-v3",
    _PUCK,
    Draw(PUCK_LOW + _AIR_LOW, PUCK_HIGH + _AIR_HIGH, 0.15),
    _AIR_LOW,
    _AIR_HIGH,
    place_object,
    rewards.carry,
    params=CARRY_AXES | {"hold": 0.02, "lift": 0.01, "gain": 5.0, "success": 0.07},
    grasp=caging(0.015, 0.05, 0.005, signed=True),
)

# -- The same beside a wall, or towards the robot.

_WALL_LOW, _WALL_HIGH = (-0.05, 0.6, 0.015), (0.05, 0.65, 0.015)
_WALL_AIR_LOW, _WALL_AIR_HIGH = (-0.05, 0.85, 0.05), (0.05, 0.9, 0.3)
_WALL_TABLE_LOW, _WALL_TABLE_HIGH = (-0.05, 0.85, 0.01), (0.05, 0.9, 0.02)

REACH_WALL = Task(
    "reach-wall-v3",
    model("reach_wall_v3"),
    Draw(_WALL_LOW + _WALL_AIR_LOW, _WALL_HIGH + _WALL_AIR_HIGH, 0.15),
    _WALL_AIR_LOW,
    _WALL_AIR_HIGH,
    place_object,
    rewards.reach,
    params={"hand_init": HAND_INIT_POS},
)
PUSH_WALL = Task(
    "push-wall-v3",
    model("pick_place_wall_v3"),
    Draw(_WALL_LOW + _WALL_TABLE_LOW, _WALL_HIGH + _WALL_TABLE_HIGH, 0.15),
    _WALL_TABLE_LOW,
    _WALL_TABLE_HIGH,
    partial(place_object, height=_GEOM_HEIGHT, goal_at_height=True),
    rewards.push_wall,
    grasp=caging(0.015, 0.05, 0.005),
    obj=_GEOM,
)
PICK_PLACE_WALL = Task(
    "pick-place-wall-v3",
    model("pick_place_wall_v3"),
    Draw(_WALL_LOW + _WALL_AIR_LOW, _WALL_HIGH + _WALL_AIR_HIGH, 0.15),
    _WALL_AIR_LOW,
    _WALL_AIR_HIGH,
    place_object,
    rewards.pick_place_wall,
    grasp=caging(0.015, 0.05, 0.005, density=SPARSE),
    obj=_GEOM,
)
_BACK_LOW, _BACK_HIGH = (-0.1, 0.6, 0.0199), (0.1, 0.7, 0.0201)
PUSH_BACK = Task(
    "push-back-v3",
    model("push_back_v3"),
    Draw((-0.1, 0.8, 0.02, *_BACK_LOW), (0.1, 0.85, 0.02, *_BACK_HIGH), 0.15),
    _BACK_LOW,
    _BACK_HIGH,
    partial(place_object, height=_GEOM_HEIGHT, goal_at_height=True),
    rewards.push_back,
    grasp=side_caging(0.007, 0.003, 0.01),
    obj=_GEOM,
    hand_init=single(HAND_INIT_POS),
)
