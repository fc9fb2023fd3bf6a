"""What rows of the catalog share."""

from __future__ import annotations

import numpy as np

from mtrl_vec.tasks.task import Array, Orientation, Point


def model(name: str) -> str:
    """Model file of a task, relative to Meta-World's ``assets``."""
    return f"sawyer_xyz/sawyer_{name}.xml"


def single(point: Point) -> Point:
    """A point whose coordinates Meta-World stores in float32: 0.6 is then another number."""
    x, y, z = (float(np.float32(value)) for value in point)
    return x, y, z


def shifted(point: Point, offset: Point) -> Point:
    """The sum, rounded as NumPy rounds it."""
    x, y, z = (a + b for a, b in zip(point, offset, strict=True))
    return x, y, z


def quaternion(body: str) -> Orientation:
    """The rotation of a body, as MuJoCo has it."""
    return Orientation("body", body, xyzw=False)


def at_drawn(vector: Array, _model_pos: Array) -> Array:
    """The moved body goes where the first three numbers say."""
    return vector[:3]


def at_drawn_goal(vector: Array, _model_pos: Array) -> Array:
    """It goes where the last three say."""
    return vector[-3:]


HAND_INIT_NEAR: Point = (0.0, 0.4, 0.2)
"""Where the hand starts in 14 tasks, nearer to the robot."""

LOW_HAND: Point = (-0.5, 0.40, -0.15)
"""Lower bounds of the mocap body where it may go below the table's surface."""

PUCK_LOW: Point = (-0.1, 0.6, 0.02)
PUCK_HIGH: Point = (0.1, 0.7, 0.02)
"""Where most pucks start."""
CARRY_AXES: dict[str, float | Point] = {"scale": (1.0, 1.0, 1.0), "up": (0.0, 0.0, 1.0), "unscaled": 0.0}
"""Params of `mtrl_vec.tasks.rewards.objects.carry` where all axes count alike."""
