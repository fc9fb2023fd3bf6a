"""Rewards for what is fixed to something: buttons, doors, drawers, faucets, handles, windows, a lever and a dial.

Shapes: ``n`` rows. All lengths in metres, angles in radians.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.tasks.task import Array, RewardInputs
from mtrl_vec.tasks.terms import (
    band_tolerance,
    closing,
    distance,
    gaussian_tolerance,
    hamacher,
    in_single_precision,
    length,
    log_floor,
    point,
    tolerance,
)

Result = tuple[Array, NDArray[np.bool_]]


def press_button(s: RewardInputs) -> Result:
    """Press a button. ``SawyerButtonPress{,Topdown,TopdownWall}EnvV3``, ``SawyerCoffeeButtonEnvV3``.

    Params: ``axis`` along which it is pressed, as a unit vector; ``near`` distance at which it counts as reached;
    ``closed`` 1 if the reward is for a closed gripper; ``reach_gain`` and ``press_gain``; ``at`` distance from which
    pressing counts; ``travel`` of the button, or 0 to measure it from where the button starts; ``success`` distance.
    """
    p = s.params
    to_obj = distance(s.obj, s.tcp)
    left, travel = _button_travel(s, p["axis"])
    travel = np.where(p["travel"] > 0, p["travel"], travel)
    near = tolerance(to_obj, p["near"], distance(s.obj, s.init_tcp))
    gripper = np.where(p["closed"] > 0, 1 - s.gripper_open, s.gripper_open)
    reward = p["reach_gain"] * hamacher(gripper, near)
    pressed = tolerance(left, 0.005, travel)
    return np.where(to_obj <= p["at"], reward + p["press_gain"] * pressed, reward), left <= p["success"]


def press_button_wall(s: RewardInputs) -> Result:
    """Press a button behind a wall. ``SawyerButtonPressWallEnvV3``."""
    to_obj = distance(s.obj, s.tcp)
    left, travel = _button_travel(s, point(0.0, 1.0, 0.0))
    near = tolerance(to_obj, 0.01, distance(s.obj, s.init_tcp))
    pressed = tolerance(left, 0.005, travel)
    far = 2 * hamacher((1 - s.gripper_open) / 2, near)
    return np.where(to_obj > 0.07, far, 2 + 2 * (1 + s.gripper_open) + 4 * pressed**2), left <= 0.03


def _button_travel(s: RewardInputs, axis: Array) -> tuple[Array, Array]:
    """Distance that is left, and the whole way from where the button started."""
    return np.abs(np.vecdot(s.goal, axis) - np.vecdot(s.obj, axis)), np.abs(
        np.vecdot(s.goal, axis) - np.vecdot(s.init_obj, axis)
    )


def door_open(s: RewardInputs) -> Result:
    """Open a door by its handle. ``SawyerDoorEnvV3``. ``joint`` is the door's angle."""
    handle = s.obj + point(-0.05, 0.0, 0.0)
    floor = log_floor(distance(s.hand[:, :2], handle[:, :2]), 0.12, 0.04, 0.4)
    above = tolerance(floor - s.hand[:, 2], 0.01, floor / 2)
    in_place = tolerance(distance(s.hand - handle, point(0.05, 0.03, -0.01)), 0.06, 0.5)
    ready = hamacher(above, in_place)
    grip = (np.clip(s.grip, -1.0, 1.0) + 1.0) / 2.0
    angle = band_tolerance(np.pi / 2 + np.pi / 6 + s.joint, 0.0, 0.5, np.pi / 3)
    opened = 0.2 * (s.joint < -np.pi / 90) + 0.8 * angle
    success = np.abs(s.obj[:, 0] - s.goal[:, 0]) <= 0.08
    return np.where(success, 10.0, 2 * hamacher(ready, grip) + 8 * opened), success


def door_close(s: RewardInputs) -> Result:
    """Close a door. ``SawyerDoorCloseEnvV3``. Params: ``hand_init`` where the hand starts."""
    to_goal = distance(s.obj, s.goal)
    in_place = gaussian_tolerance(to_goal, 0.05, distance(s.init_obj, s.goal))
    margin = distance(s.params["hand_init"], s.obj) + 0.1
    hand = gaussian_tolerance(distance(s.tcp, s.goal), 0.25 * 0.05, margin)
    return np.where(to_goal < 0.05, 10.0, 3 * hand + 6 * in_place), to_goal <= 0.08


def door_lock(s: RewardInputs) -> Result:
    """Lock a door by turning its lock. ``SawyerDoorLockEnvV3``.

    Its margin is meant to be the *initial* distance from the left pad, whose position is a live view.
    """
    to_obj = length((s.obj - s.left_pad) * point(0.25, 1.0, 0.5))
    left = np.abs(s.goal[:, 2] - s.obj[:, 2])
    near = tolerance(to_obj, 0.01, to_obj)
    return 2 * hamacher(s.gripper_open, near) + 8 * tolerance(left, 0.005, 0.1), left <= 0.02


def door_unlock(s: RewardInputs) -> Result:
    """Unlock a door. ``SawyerDoorUnlockEnvV3``.

    Its margin is measured from the lock's *current* position, again a live view: the first of ``points``.
    """
    scale, shoulder = point(0.25, 1.0, 0.5), point(0.0, 0.055, 0.07)
    margin = length((s.init_tcp + shoulder - s.points[:, 0]) * scale)
    ready = tolerance(length((s.hand + shoulder - s.obj) * scale), 0.02, margin)
    left = np.abs(s.goal[:, 0] - s.obj[:, 0])
    return 2 * ready + 8 * tolerance(left, 0.005, 0.1), left <= 0.02


def drawer_open(s: RewardInputs) -> Result:
    """Open a drawer. ``SawyerDrawerOpenEnvV3``."""
    left = distance(s.obj, s.goal)
    opening = tolerance(left, 0.02, 0.2)
    scale = point(3.0, 3.0, 1.0)
    start = s.goal + point(0.0, 0.2, 0.0)
    margin = length((start - s.init_tcp) * scale)
    caged = tolerance(length((s.obj - s.hand) * scale), 0.01, margin)
    return 5 * (caged + opening), left <= 0.03


def drawer_close(s: RewardInputs) -> Result:
    """Close a drawer. ``SawyerDrawerCloseEnvV3``."""
    to_goal = distance(s.obj, s.goal)
    in_place = tolerance(to_goal, 0.05, np.abs(distance(s.init_obj, s.goal) - 0.05))
    margin = np.abs(distance(s.init_obj, s.init_tcp) - 0.005)
    reached = gaussian_tolerance(distance(s.obj, s.tcp), 0.005, margin)
    single = _single_product(reached, closing(s))
    reached = np.where(in_single_precision(s.grip), single, hamacher(reached, closing(s)))
    success = to_goal <= 0.05 + 0.015
    return 10 * np.where(success, 1.0, hamacher(reached, in_place)), success


def faucet(s: RewardInputs) -> Result:
    """Turn a faucet by its handle. ``SawyerFaucetOpenEnvV3``, ``SawyerFaucetCloseEnvV3``.

    Params: ``tip`` of the handle, from the object.
    """
    tip = s.obj + s.params["tip"]
    to_goal = distance(tip, s.goal)
    in_place = tolerance(to_goal, 0.07, np.abs(distance(s.init_obj, s.goal) - 0.07))
    margin = np.abs(distance(s.init_obj, s.init_tcp) - 0.01)
    reached = gaussian_tolerance(distance(tip, s.tcp), 0.01, margin)
    return np.where(to_goal <= 0.07, 10.0, 2 * (2 * reached + 3 * in_place)), to_goal <= 0.07


def window(s: RewardInputs) -> Result:
    """Slide a window. ``SawyerWindowOpenEnvV3``, ``SawyerWindowCloseEnvV3``.

    ``init_second`` is where the way to the goal is measured from. Params: ``gaussian`` 1 for that tail.
    """
    left = np.abs(s.obj[:, 0] - s.goal[:, 0])
    in_place = tolerance(left, 0.05, np.abs(np.abs(s.init_second[:, 0] - s.goal[:, 0]) - 0.05))
    to_obj, margin = distance(s.obj, s.tcp), np.abs(distance(s.init_obj, s.init_tcp) - 0.02)
    tails = gaussian_tolerance(to_obj, 0.02, margin), tolerance(to_obj, 0.02, margin)
    reached = np.where(s.params["gaussian"] > 0, *tails)
    return 10 * hamacher(reached, in_place), left <= 0.05


def handle_press(s: RewardInputs) -> Result:
    """Press a handle down. ``SawyerHandlePressEnvV3``, ``SawyerHandlePressSideEnvV3``."""
    left = np.abs(s.obj[:, 2] - s.goal[:, 2])
    in_place = tolerance(left, 0.02, np.abs(np.abs(s.init_obj[:, 2] - s.goal[:, 2]) - 0.02))
    margin = np.abs(distance(s.init_obj, s.init_tcp) - 0.02)
    reached = tolerance(distance(s.obj, s.tcp), 0.02, margin)
    return 10 * np.where(left <= 0.02, 1.0, hamacher(reached, in_place)), left <= 0.02


def lever_pull(s: RewardInputs) -> Result:
    """Pull a lever up. ``SawyerLeverPullEnvV3``. ``joint`` is its angle."""
    scale, shoulder = point(4.0, 1.0, 4.0), point(0.0, 0.055, 0.07)
    margin = length((s.init_tcp + shoulder - s.init_obj) * scale)
    ready = tolerance(length((s.hand + shoulder - s.obj) * scale), 0.02, margin)
    in_place = tolerance(distance(s.obj, s.goal), 0.04, distance(s.init_obj, s.goal))
    return 10 * hamacher(ready, in_place), np.abs(-s.joint - np.pi / 2) <= np.pi / 24


def dial_turn(s: RewardInputs) -> Result:
    """Turn a dial. ``SawyerDialTurnEnvV3``. ``init_obj`` is where it is to be pushed."""
    to_goal = distance(s.obj, s.goal)
    in_place = tolerance(to_goal, 0.07, np.abs(distance(s.init_obj, s.goal) - 0.07))
    pushed = s.obj + point(0.05, 0.02, 0.09)
    margin = np.abs(distance(s.init_obj, s.init_tcp) - 0.005)
    reached = gaussian_tolerance(distance(pushed, s.tcp), 0.005, margin)
    single = _single_product(_single_product(reached, closing(s)), in_place)
    reward = np.where(in_single_precision(s.grip), 10 * single, 10 * hamacher(hamacher(reached, closing(s)), in_place))
    return reward, to_goal <= 0.07


def _single_product(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> Any:
    return hamacher(a.astype(np.float32), b.astype(np.float32))
