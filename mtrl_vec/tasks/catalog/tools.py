"""Rows of the tasks with tools and parts: nuts on a peg, a hammer, pegs in holes, a lid, sticks."""

from __future__ import annotations

from functools import partial

import numpy as np

from mtrl_vec.tasks.catalog.common import (
    HAND_INIT_NEAR,
    at_drawn,
    at_drawn_goal,
    model,
    quaternion,
    shifted,
    single,
)
from mtrl_vec.tasks.draw import Draw
from mtrl_vec.tasks.rewards import tools as rewards
from mtrl_vec.tasks.starts import drawn, hang_hammer, lay_stick, place_object, place_peg, plug_peg
from mtrl_vec.tasks.task import HAND_INIT_POS, Array, Orientation, Point, Position, Task
from mtrl_vec.tasks.terms import REACHING, caging, caging_at


def _peg_under_goal(vector: Array, _model_pos: Array) -> Array:
    return vector[-3:] - np.array([0.0, 0.0, 0.05])


def _peg_in_nut(vector: Array, _model_pos: Array) -> Array:
    return vector[:3] + np.array([0.0, 0.0, 0.03])


_NUT_GOAL_LOW, _NUT_GOAL_HIGH = (-0.1, 0.75, 0.1), (0.1, 0.85, 0.1)
ASSEMBLY = Task(
    "assembly-v3",
    model("assembly_peg"),
    Draw((0.0, 0.6, 0.02, *_NUT_GOAL_LOW), (0.0, 0.6, 0.02, *_NUT_GOAL_HIGH), 0.1),
    _NUT_GOAL_LOW,
    _NUT_GOAL_HIGH,
    place_object,
    rewards.assembly,
    grasp=caging_at(caging(0.015, 0.02, 0.01, density=REACHING, reach=0.01), handle_reach=0.01),
    obj=Position("site", "RoundNut-8"),
    orientation=quaternion("RoundNut"),
    points=(Position("site", "RoundNut"),),
    fixture="peg",
    place_fixture=_peg_under_goal,
    hand_init=single(HAND_INIT_POS),
)
_OFF_LOW, _OFF_HIGH = (-0.1, 0.6, 0.1699), (0.1, 0.75, 0.1701)
DISASSEMBLE = Task(
    "disassemble-v3",
    model("assembly_peg"),
    Draw((0.0, 0.6, 0.025, *_OFF_LOW), (0.1, 0.75, 0.02501, *_OFF_HIGH), 0.1),
    shifted(_OFF_LOW, (0.0, 0.0, 0.005)),
    shifted(_OFF_HIGH, (0.0, 0.0, 0.005)),
    partial(place_object, goal=drawn((0.0, 0.0, 0.15)), forward=True),
    rewards.disassemble,
    grasp=caging_at(caging(0.015, 0.02, 0.01), handle_reach=0.01),
    obj=Position("site", "RoundNut-8"),
    orientation=quaternion("RoundNut"),
    points=(Position("site", "RoundNut"),),
    fixture="peg",
    place_fixture=_peg_in_nut,
    hand_init=single(HAND_INIT_NEAR),
    settles=True,
)
HAMMER = Task(
    "hammer-v3",
    model("hammer"),
    Draw((-0.1, 0.4, 0.0), (0.1, 0.5, 0.0)),
    (0.2399, 0.7399, 0.109),
    (0.2401, 0.7401, 0.111),
    hang_hammer,
    rewards.hammer,
    grasp=caging_at(caging(0.015, 0.02, 0.01), handle_reach=0.07),
    obj=Position("body", "hammer"),
    orientation=quaternion("hammer"),
    second=Position("body", "nail_link"),
    second_quat="nail_link",
    joint="NailSlideJoint",
    hand_init=HAND_INIT_NEAR,
)

_PEG_LOW, _PEG_HIGH = (0.0, 0.5, 0.02), (0.2, 0.7, 0.02)
_HOLE_LOW, _HOLE_HIGH = (-0.35, 0.4, -0.001), (-0.25, 0.7, 0.001)
PEG_INSERT_SIDE = Task(
    "peg-insert-side-v3",
    model("peg_insertion_side"),
    Draw(_PEG_LOW + _HOLE_LOW, _PEG_HIGH + _HOLE_HIGH, 0.1),
    shifted(_HOLE_LOW, (0.03, 0.0, 0.13)),
    shifted(_HOLE_HIGH, (0.03, 0.0, 0.13)),
    place_peg,
    rewards.peg_insert,
    grasp=caging(0.0075, 0.03, 0.005),
    obj=Position("site", "pegGrasp"),
    orientation=Orientation("site", "pegGrasp"),
    points=tuple(
        Position("site", name)
        for name in (
            "pegHead",
            "bottom_right_corner_collision_box_1",
            "top_left_corner_collision_box_1",
            "bottom_right_corner_collision_box_2",
            "top_left_corner_collision_box_2",
        )
    ),
    fixture="box",
    place_fixture=at_drawn_goal,
)
_PLUG_LOW, _PLUG_HIGH = (-0.25, 0.6, -0.001), (-0.15, 0.8, 0.001)
PEG_UNPLUG_SIDE = Task(
    "peg-unplug-side-v3",
    model("peg_unplug_side"),
    Draw(_PLUG_LOW, _PLUG_HIGH),
    shifted(_PLUG_LOW, (0.194, 0.0, 0.131)),
    shifted(_PLUG_HIGH, (0.194, 0.0, 0.131)),
    plug_peg,
    rewards.peg_unplug,
    grasp=caging(0.025, 0.05, 0.005, effort=0.8),
    obj=Position("site", "pegEnd"),
    orientation=quaternion("plug1"),
    fixture="box",
    place_fixture=at_drawn,
    settles=True,
)


def _box_at_goal(vector: Array, model_pos: Array) -> Array:
    return np.array([*vector[-3:-1], model_pos[2]])


_LID_LOW, _LID_HIGH = (-0.1, 0.7, 0.133), (0.1, 0.8, 0.133)
BOX_CLOSE = Task(
    "box-close-v3",
    model("box"),
    Draw((-0.05, 0.5, 0.02, *_LID_LOW), (0.05, 0.55, 0.02, *_LID_HIGH), 0.25),
    _LID_LOW,
    _LID_HIGH,
    partial(place_object, height=float(np.float32(0.02)), steps=5),
    rewards.box_close,
    obj=Position("body", "top_link"),
    orientation=quaternion("top_link"),
    fixture="boxbody",
    place_fixture=_box_at_goal,
    hand_init=single(HAND_INIT_POS),
    settles=True,
)

_STICK_PUSH_LOW: Point = (0.399, 0.55, 0.1319)
_STICK_PUSH_HIGH: Point = (0.401, 0.6, 0.1321)
STICK_PUSH = Task(
    "stick-push-v3",
    model("stick_obj"),
    Draw((-0.08, 0.58, 0.0, *_STICK_PUSH_LOW), (-0.03, 0.62, 0.001, *_STICK_PUSH_HIGH), 0.1),
    _STICK_PUSH_LOW,
    _STICK_PUSH_HIGH,
    partial(lay_stick, container=(0.0, 0.0), pull=False),
    rewards.stick_push,
    grasp=caging_at(caging(0.04, 0.05, 0.01), offset_x=0.015),
    obj=Position("body", "stick"),
    orientation=Orientation("body", "stick"),
    second=Position("site", "insertion", (0.0, 0.09, 0.0)),
    touch="objGeom",
)
_STICK_PULL_LOW: Point = (0.35, 0.45, 0.0199)
_STICK_PULL_HIGH: Point = (0.45, 0.55, 0.0201)
STICK_PULL = Task(
    "stick-pull-v3",
    model("stick_obj"),
    Draw((-0.1, 0.55, 0.0, *_STICK_PULL_LOW), (0.0, 0.65, 0.001, *_STICK_PULL_HIGH), 0.1),
    _STICK_PULL_LOW,
    _STICK_PULL_HIGH,
    partial(lay_stick, container=(0.0, 0.09), pull=True),
    rewards.stick_pull,
    grasp=caging(0.014, 0.05, 0.01),
    obj=Position("body", "stick"),
    orientation=Orientation("body", "stick"),
    second=Position("site", "insertion"),
    points=(Position("site", "stick_end"),),
    mocap_low=(-0.5, 0.35, 0.05),
)
