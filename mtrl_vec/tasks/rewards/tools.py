"""Rewards for tools and parts: nuts on a peg, a hammer, sticks, pegs in holes, a lid.

Shapes: ``n`` rows. All lengths in metres.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.tasks.task import Array, RewardInputs
from mtrl_vec.tasks.terms import distance, hamacher, length, log_floor, point, rectangular_prism, tolerance, upright

Result = tuple[Array, NDArray[np.bool_]]

_WRENCH = (0.707, 0.0, 0.0, 0.707)  # rotation in which the wrench and the lid are wanted


def assembly(s: RewardInputs) -> Result:
    """Put a nut onto a peg. ``SawyerNutAssemblyEnvV3``. The first of ``points`` is the nut's centre."""
    nut = s.points[:, 0]
    to_peg = s.goal - nut
    radius = length(to_peg[:, :2])
    success = (radius < 0.02) & (to_peg[:, 2] > 0.0)
    free = np.where(success, 0.02, 0.01)
    # Lift it as high as a logarithm of the distance says, and only then over the peg.
    height = log_floor(radius, free, 0.02, 0.2)
    error = np.concatenate([to_peg[:, :2], (height - nut[:, 2])[:, None]], axis=1) * point(1.0, 1.0, 3.0)
    lifted = (nut[:, 2] > 0.02) | (radius < free)
    in_place = 0.1 * lifted + 0.9 * tolerance(length(error), 0.02, 0.4)
    reward = (2 * s.grasp + 6 * in_place) * upright(s, _WRENCH, 0.4)
    return np.where(success, 10.0, reward), success


def disassemble(s: RewardInputs) -> Result:
    """Lift a nut off a peg. ``SawyerNutDisassembleEnvV3``. The first of ``points`` is the nut's centre."""
    nut = s.points[:, 0]
    above = s.goal + point(0.0, 0.0, 0.1)
    in_place = 0.1 * (nut[:, 2] > 0.02) + 0.9 * tolerance(distance(above, nut), 0.02, 0.2)
    reward = (2 * s.grasp + 6 * in_place) * upright(s, _WRENCH, 0.4)
    success = s.obj[:, 2] > s.goal[:, 2]
    return np.where(success, 10.0, reward), success


def hammer(s: RewardInputs) -> Result:
    """Drive a nail in. ``SawyerHammerEnvV3``. ``joint`` is how far it is in."""
    head = s.obj + point(0.16, 0.06, 0.0)
    in_place = 0.1 * (head[:, 2] > 0.02) + 0.9 * tolerance(distance(s.goal, head), 0.02, 0.2)
    reward = (2 * s.grasp + 6 * in_place) * upright(s, (1.0, 0.0, 0.0, 0.0), 0.4)
    success = s.joint > 0.09
    return np.where(success & (reward > 5.0), 10.0, reward), success


def peg_insert(s: RewardInputs) -> Result:
    """Put a peg into a hole from the side. ``SawyerPegInsertionSideEnvV3``.

    ``points`` are the peg's head, and two opposite corners of each of two boxes that it must not hit. ``init_second``
    is where its head started.
    """
    head, scale = s.points[:, 0], point(1.0, 2.0, 2.0)
    to_goal = length((head - s.goal) * scale)
    in_place = tolerance(to_goal, 0.07, length((s.init_second - s.goal) * scale))
    outside = rectangular_prism(head[:, None], s.points[:, 1::2], s.points[:, 2::2])
    in_place = hamacher(in_place, hamacher(outside[:, 1], outside[:, 0]))
    held = (distance(s.obj, s.tcp) < 0.08) & (s.gripper_open > 0) & (s.obj[:, 2] - 0.01 > s.init_obj[:, 2])
    reward = hamacher(np.where(held, 1.0, s.grasp), in_place)
    reward = np.where(held, reward + (1 + 5 * in_place), reward)
    return np.where(to_goal <= 0.07, 10.0, reward), to_goal <= 0.07


def peg_unplug(s: RewardInputs) -> Result:
    """Pull a peg out of a hole. ``SawyerPegUnplugSideEnvV3``."""
    to_goal = distance(s.obj, s.goal)
    in_place = tolerance(to_goal, 0.05, distance(s.init_obj, s.goal))
    pulled = (s.gripper_open > 0.5) & (s.obj[:, 0] - s.init_obj[:, 0] > 0.015)
    held = pulled & (distance(s.obj, s.tcp) < 0.035)
    reward = np.where(held, 1 + 2 * s.grasp + 5 * in_place, 2 * s.grasp)
    return np.where(to_goal <= 0.05, 10.0, reward), to_goal <= 0.07


def box_close(s: RewardInputs) -> Result:
    """Put a lid onto a box. ``SawyerBoxCloseEnvV3``."""
    lid = s.obj + point(0.0, 0.0, 0.02)
    floor = log_floor(distance(s.hand[:, :2], lid[:, :2]), 0.02, 0.04, 0.4)
    above = tolerance(floor - s.hand[:, 2], 0.01, floor / 2)
    ready = hamacher(above, tolerance(distance(s.hand, lid), 0.02, 0.5))
    grip = (np.clip(s.grip, -1.0, 1.0) + 1.0) / 2.0
    error = length((s.goal - lid) * point(1.0, 1.0, 3.0))
    lifted = 0.2 * (lid[:, 2] > 0.04) + 0.8 * tolerance(error, 0.05, 0.25)
    success = distance(s.obj, s.goal) < 0.08
    reward = np.where(success, 10.0, 2 * hamacher(grip, ready) + 8 * lifted)
    return reward * upright(s, _WRENCH, 0.2), success


def stick_push(s: RewardInputs) -> Result:
    """Push a container with a stick. ``SawyerStickPushEnvV3``. ``init_second`` is where the container started.

    The only success that needs contacts: both pads must press on the stick.
    """
    stick = s.obj + point(0.015, 0.0, 0.0)
    in_place = tolerance(distance(stick, s.goal), 0.12, distance(s.init_obj, s.goal) - 0.12)
    to_goal = distance(s.second, s.goal)
    container = tolerance(to_goal, 0.12, distance(s.init_second, s.goal) - 0.12)
    lifted_from = s.init_obj[:, 2]
    held = (distance(stick, s.tcp) < 0.02) & (s.gripper_open > 0) & (stick[:, 2] - 0.01 > lifted_from)
    moving = np.where(to_goal <= 0.12, 10.0, 2 + 5 * in_place + 3 * container)
    success = s.touching & (s.gripper_open > 0) & (s.obj[:, 2] - 0.01 > lifted_from) & (to_goal <= 0.12)
    return np.where(held, moving, s.grasp), success


def stick_pull(s: RewardInputs) -> Result:
    """Pull a container with a stick through its handle. ``SawyerStickPullEnvV3``.

    ``init_obj`` is where the container started, from which the grasp's margins are measured; ``init_second`` where the
    stick did. The first of ``points`` is the stick's end.
    """
    stick, handle, end = s.obj, s.second, s.points[:, 0]
    start = s.init_second
    scale, grip_point = point(1.0, 1.0, 2.0), point(0.05, 0.0, 0.0)
    container, container_start = handle + grip_point, s.init_obj + grip_point
    to_container = length((stick - container) * scale)
    in_place = tolerance(to_container, 0.05, length((start - container_start) * scale))
    pulled = tolerance(distance(stick, s.goal), 0.05, distance(start, s.goal))
    container_in_place = tolerance(distance(container, s.goal), 0.05, distance(s.init_obj, s.goal))
    held = (distance(stick, s.tcp) < 0.02) & (s.gripper_open > 0) & (stick[:, 2] - 0.01 > start[:, 2])
    reward = hamacher(np.where(held, 1.0, s.grasp), in_place)
    gap = np.abs(end - handle)
    inserted = (end[:, 0] >= handle[:, 0]) & (gap[:, 1] <= 0.040) & (gap[:, 2] <= 0.060)
    near = distance(handle, s.goal) <= 0.12
    pulling = np.where(near, 10.0, 1 + reward + 5 + 2 * pulled + container_in_place)
    reward = np.where(held, np.where(inserted, pulling, 1 + reward + 5 * in_place), reward)
    return reward, near & inserted
