"""Rewards for reaching, and for pushing or carrying an object to a goal.

Shapes: ``n`` rows. All lengths in metres.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.tasks.task import Array, RewardInputs
from mtrl_vec.tasks.terms import distance, hamacher, length, log_floor, point, rounded_as_summed, tolerance

Result = tuple[Array, NDArray[np.bool_]]

ANY_HEIGHT = -10.0
"""As `carry`'s ``lift``: the object need not be lifted."""


def reach(s: RewardInputs) -> Result:
    """Bring the tool centre to the goal. ``SawyerReachEnvV3``, ``SawyerReachWallEnvV3``.

    Params: ``hand_init`` where the hand starts.
    """
    to_goal = distance(s.tcp, s.goal)
    in_place = tolerance(to_goal, 0.05, distance(s.params["hand_init"], s.goal))
    return 10 * in_place, to_goal <= 0.05


def push(s: RewardInputs) -> Result:
    """Push the puck to a goal on the table. ``SawyerPushEnvV3``."""
    to_goal, in_place = _placement(s, s.goal)
    reward, held = 2 * s.grasp, _holds(s, 0.02)
    reward = rounded_as_summed(np.where(held, 2 * reward + 1 + 5 * in_place, reward), s, held)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.05


def push_wall(s: RewardInputs) -> Result:
    """Push the puck round a wall. ``SawyerPushWallEnvV3``."""
    n = len(s.obj)
    midpoint = np.stack([np.full(n, -0.05), np.full(n, 0.77), s.obj[:, 2]], axis=1)
    by_wall = point(3.0, 1.0, 1.0)
    part_1 = tolerance(
        length((s.obj - midpoint) * by_wall),
        0.05,
        length((s.init_obj - midpoint) * by_wall),
    )
    reward = _past_wall(s, 2 * s.grasp, part_1, _holds(s, 0.02))
    to_goal = distance(s.obj, s.goal)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.07


def pick_place_wall(s: RewardInputs) -> Result:
    """Lift the puck over a wall. ``SawyerPickPlaceWallEnvV3``."""
    n = len(s.obj)
    midpoint = np.stack([s.goal[:, 0], np.full(n, 0.77), np.full(n, 0.25)], axis=1)
    over_wall = point(1.0, 1.0, 3.0)
    part_1 = tolerance(
        length((s.obj - midpoint) * over_wall),
        0.05,
        length((s.init_obj - midpoint) * over_wall),
    )
    held = _holds(s, 0.02) & (s.obj[:, 2] - 0.015 > s.init_obj[:, 2])
    reward = _past_wall(s, hamacher(s.grasp, part_1), part_1, held)
    to_goal = distance(s.obj, s.goal)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.07


def _past_wall(s: RewardInputs, reward: Array, part_1: Array, held: NDArray[np.bool_]) -> Array:
    """Towards a midpoint before the wall, then from it to the goal."""
    _, part_2 = _placement(s, s.goal)
    behind = np.where(s.obj[:, 1] > 0.75, 5 + 3 * part_2, 1 + 4 * part_1)
    return rounded_as_summed(np.where(held, reward + behind, reward), s, held)


def carry(s: RewardInputs) -> Result:
    """Grasp something and take it to the goal.

    ``SawyerPickPlaceEnvV3``, ``SawyerHandInsertEnvV3``, ``SawyerCoffeePullEnvV3``, ``SawyerCoffeePushEnvV3``,
    ``SawyerHandlePullEnvV3``, ``SawyerHandlePullSideEnvV3``.

    Params: ``scale`` of the axes in which the distance to the goal is measured; ``hold`` distance from the tool centre
    at which the object is held; ``lift`` height over its start that this takes, measured along ``up``; ``gain`` of the
    placement while it is held; ``success`` distance.
    """
    p = s.params
    scale = p["scale"]
    to_goal = length((s.obj - s.goal) * scale)
    in_place = tolerance(to_goal, 0.05, length((s.init_obj - s.goal) * scale))
    lifted = np.vecdot(s.obj, p["up"]) - p["lift"] > s.init_obj[:, 2]
    reward = hamacher(s.grasp, in_place)
    reward = np.where(_holds(s, p["hold"]) & lifted, reward + (1 + p["gain"] * in_place), reward)
    # coffee-* measure success without the scale
    measured = np.where(p["unscaled"] > 0, distance(s.obj, s.goal), to_goal)
    return np.where(to_goal < 0.05, 10.0, reward), measured <= p["success"]


def basketball(s: RewardInputs) -> Result:
    """Put the ball into the basket from above. ``SawyerBasketballEnvV3``."""
    above = s.goal.copy()
    above[:, 2] = 0.3
    scale = point(1.0, 1.0, 2.0)
    to_goal = length((s.obj - above) * scale)
    in_place = tolerance(to_goal, 0.08, length((s.init_obj - above) * scale))
    held = _holds(s, 0.035) & _lifted(s, 0.01)
    reward = hamacher(np.where(held, 1.0, s.grasp), in_place)
    reward = np.where(held, reward + (1 + 5 * in_place), reward)
    return np.where(to_goal < 0.08, 10.0, reward), to_goal <= 0.08


def bin_picking(s: RewardInputs) -> Result:
    """Take the puck from one bin to the other. ``SawyerBinPickingEnvV3``.

    Its margin is the distance at the *first step*, so that it needs ``first_obj``.
    """
    to_goal = distance(s.obj, s.goal)
    in_place = tolerance(to_goal, 0.05, distance(s.first_obj, s.goal))
    # Funnels over both bins, from which the hand should not move sideways.
    floors = [log_floor(distance(s.hand[:, :2], bin_[:, :2]), 0.03, 0.02, 0.2) for bin_ in (s.init_obj, s.goal)]
    above = _above(s.hand[:, 2], np.minimum(*floors), 0.05)
    held = (distance(s.obj, s.hand) < 0.04) & _lifted(s, 0.02) & ~(s.gripper_open < 0.43)
    reward = hamacher(s.grasp, in_place)
    reward = np.where(held, reward + (1 + 5 * hamacher(above, in_place)), reward)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.05


def pick_out_of_hole(s: RewardInputs) -> Result:
    """Lift the puck out of a hole. ``SawyerPickOutOfHoleEnvV3``."""
    to_goal = distance(s.obj, s.goal)
    in_place = tolerance(to_goal, 0.02, distance(s.init_obj, s.goal))
    floor = log_floor(distance(s.tcp[:, :2], s.init_obj[:, :2]), 0.03, 0.015, 0.15)
    above = _above(s.tcp[:, 2], floor, 0.02)
    held = (distance(s.obj, s.tcp) < 0.04) & _lifted(s, 0.02) & ~(s.gripper_open < 0.33)
    reward = hamacher(s.grasp, in_place)
    reward = np.where(held, reward + (1 + 5 * hamacher(in_place, above)), reward)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.07


def _above(height: Array, floor: Array, margin: float) -> Array:
    """1 above the floor, less the deeper below it."""
    return tolerance(floor - height, 0.01, margin)


def push_back(s: RewardInputs) -> Result:
    """Pull the puck towards the robot. ``SawyerPushBackEnvV3``."""
    to_goal, in_place = _placement(s, s.goal)
    nearer = distance(s.init_obj, s.goal) - to_goal > 0.01
    held = _holds(s, 0.01) & (s.gripper_open < 0.55) & nearer
    reward = hamacher(s.grasp, in_place)
    reward = np.where(held, reward + (1 + 5 * in_place), reward)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.07


def sweep(s: RewardInputs) -> Result:
    """Sweep the puck off the table or into a hole. ``SawyerSweepEnvV3``, ``SawyerSweepIntoGoalEnvV3``.

    Params: ``into`` 1 if the goal is as high as the object is.
    """
    goal = s.goal.copy()
    goal[:, 2] = np.where(s.params["into"] > 0, s.obj[:, 2], goal[:, 2])
    to_goal, in_place = _placement(s, goal)
    reward = 2 * s.grasp + 6 * hamacher(s.grasp, in_place)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.05


def soccer(s: RewardInputs) -> Result:
    """Push the ball into the goal. ``SawyerSoccerEnvV3``."""
    scale = point(3.0, 1.0, 1.0)
    to_goal = length((s.obj - s.goal) * scale)
    in_place = tolerance(to_goal, 0.07, length((s.obj - s.init_obj) * scale))
    line = s.goal[:, 1] - 0.1
    beside = (s.obj[:, 1] > line) & (np.abs(s.obj[:, 0] - s.goal[:, 0]) > 0.1)
    loss = 2 * ((s.obj[:, 1] - line) / (1 - line))
    in_place = np.where(beside, np.clip(in_place - loss, 0.0, 1.0), in_place)
    reward = 3 * s.grasp + 6.5 * in_place
    return np.where(to_goal < 0.07, 10.0, reward), distance(s.obj, s.goal) <= 0.07


def shelf_place(s: RewardInputs) -> Result:
    """Put the puck onto a shelf. ``SawyerShelfPlaceEnvV3``."""
    to_goal, in_place = _placement(s, s.goal)
    reward = hamacher(s.grasp, in_place)
    x, y, z = s.obj.T
    goal_x, goal_y, _ = s.goal.T
    front = goal_y - 3 * 0.05
    below = (z > 0.0) & (z < 0.24) & (goal_x - 0.15 < x) & (x < goal_x + 0.15)
    loss = hamacher((y - front) / (3 * 0.05), (0.24 - z) / 0.24)
    near = below & (front < y) & (y < goal_y)
    in_place = np.where(near, np.clip(in_place - loss, 0.0, 1.0), in_place)
    in_place = np.where(below & (y > goal_y), 0.0, in_place)
    held = _holds(s, 0.025) & _lifted(s, 0.01)
    reward = np.where(held, reward + (1 + 5 * in_place), reward)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.07


def plate_slide(s: RewardInputs) -> Result:
    """Slide the plate to its goal. ``SawyerPlateSlide{,Side,Back,BackSide}EnvV3``.

    Params: ``forward`` 1 for plate-slide, whose reward is a product; the others want the hand low and near first.
    """
    forward = s.params["forward"] > 0
    less = np.where(forward, 0.0, 0.05)
    to_goal, to_obj = distance(s.obj, s.goal), distance(s.tcp, s.obj)
    in_place = tolerance(to_goal, 0.05, distance(s.init_obj, s.goal) - less)
    reached = tolerance(to_obj, 0.05, distance(s.init_tcp, s.init_obj) - less)
    low = (s.tcp[:, 2] <= 0.03) & (to_obj < 0.07)
    reward = np.where(forward, 8 * hamacher(reached, in_place), np.where(low, 2 + 7 * in_place, 1.5 * reached))
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.07


def _placement(s: RewardInputs, goal: Array) -> tuple[Array, Array]:
    """Distance of the object to a goal, and how near it is as a tolerance from where it started."""
    to_goal = distance(s.obj, goal)
    return to_goal, tolerance(to_goal, 0.05, distance(s.init_obj, goal))


def _holds(s: RewardInputs, reach: Array | float) -> NDArray[np.bool_]:
    """The object is at the tool centre and the fingers are apart, which is Meta-World's "grasped"."""
    return (distance(s.obj, s.tcp) < reach) & (s.gripper_open > 0)


def _lifted(s: RewardInputs, height: float) -> NDArray[np.bool_]:
    return s.obj[:, 2] - height > s.init_obj[:, 2]
