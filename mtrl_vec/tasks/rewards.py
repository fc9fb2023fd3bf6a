"""Vectorised rewards of reach, push and pick-place.

They reproduce ``compute_reward`` of ``metaworld/envs/sawyer_{reach,push,pick_place}_v3.py`` (reward version "v2", the
default there), quirks included.

Shapes: ``n`` rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.tasks.task import HAND_INIT_POS, Array, RewardInputs

# Constants of the caging rewards, in metres: the object's radius, how far from it a pad still counts as caging it, and
# how far the tool centre may be from it in the xz plane.
_OBJ_RADIUS = 0.015
_PAD_REACH = 0.05
_XZ_REACH = 0.005


def distance(a: Array, b: Array) -> Array:
    """Euclidean distance between the rows of two arrays, [..., 3] -> [...]."""
    gap = a - b
    return np.sqrt(np.vecdot(gap, gap))  # rounds as the norm of a single vector does, unlike norm(axis=-1)


def tolerance(x: Array, lower: float, upper: float, margin: Array) -> Array:
    """1 inside ``[lower, upper]``, falling off as a long tail outside, to 0.1 at a distance of ``margin``. [n] -> [n].

    ``metaworld.utils.reward_utils.tolerance`` with ``sigmoid="long_tail"``. A zero margin gives 0 outside.
    """
    gap = np.where(x < lower, lower - x, x - upper)
    scaled = np.divide(gap, margin, out=np.full_like(gap, np.inf), where=margin > 0)
    # 9 = 1 / 0.1 - 1: the tail passes through 0.1 where scaled is 1
    return np.where((lower <= x) & (x <= upper), 1.0, 1.0 / (9.0 * scaled**2 + 1.0))


def hamacher(a: Array, b: Array) -> Array:
    """Hamacher product ``ab / (a + b - ab)``, 0 where both are 0. ``metaworld.utils.reward_utils.hamacher_product``."""
    total = a + b - a * b
    return np.divide(a * b, total, out=np.zeros_like(total), where=total > 0)


def _grasp(s: RewardInputs, gaps: Array, margins: Array) -> Array:
    """Reward in [0, 1] for having the object between the pads and the gripper closing on it. [n].

    The shared part of ``SawyerXYZEnv._gripper_caging_reward`` (``high_density=True``) and of pick-place's own version.

    Args:
        gaps: [n, 2] distance in y from the left and the right pad to the object.
        margins: [n, 2] the margins that go with them.
    """
    sides = tolerance(gaps, _OBJ_RADIUS, _PAD_REACH, margins)
    caging_y = hamacher(sides[:, 0], sides[:, 1])
    xz_margin = distance(s.init_obj[:, ::2], s.init_tcp[:, ::2]) - _XZ_REACH
    caging_xz = tolerance(distance(s.tcp[:, ::2], s.obj[:, ::2]), 0.0, _XZ_REACH, xz_margin)
    caging = hamacher(caging_y, caging_xz)
    gripping = np.where(caging > 0.97, np.clip(s.grip, 0.0, 1.0), 0.0)
    return (hamacher(caging, gripping) + caging) / 2


def reach_reward(s: RewardInputs) -> tuple[Array, NDArray[np.bool_]]:
    """``SawyerReachEnvV3.compute_reward``: bring the tool centre to the goal. Reward [n] in [0, 10], success [n]."""
    to_goal = distance(s.tcp, s.goal)
    in_place = tolerance(to_goal, 0.0, 0.05, distance(HAND_INIT_POS, s.goal))
    return 10 * in_place, to_goal <= 0.05


def push_reward(s: RewardInputs) -> tuple[Array, NDArray[np.bool_]]:
    """``SawyerPushEnvV3.compute_reward``: push the puck to a goal on the table. Reward [n] in [0, 10], success [n]."""
    to_goal = distance(s.obj, s.goal)
    in_place = tolerance(to_goal, 0.0, 0.05, distance(s.init_obj, s.goal))
    pads_y = np.stack([s.left_pad_y, s.right_pad_y], axis=-1)
    # The margin follows the pads, measured from where the object *started*.
    margins = np.abs(np.abs(pads_y - s.init_obj[:, 1:2]) - _PAD_REACH)
    grasped = _grasp(s, np.abs(pads_y - s.obj[:, 1:2]), margins)
    reward = 2 * grasped
    held = (distance(s.obj, s.tcp) < 0.02) & (s.gripper_open > 0)
    reward = np.where(held, 2 * reward + 1 + 5 * in_place, reward)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.05


def pick_place_reward(s: RewardInputs) -> tuple[Array, NDArray[np.bool_]]:
    """``SawyerPickPlaceEnvV3.compute_reward``: lift the puck to a goal in the air. Reward [n] in [0, 10], success."""
    to_goal = distance(s.obj, s.goal)
    in_place = tolerance(to_goal, 0.0, 0.05, distance(s.init_obj, s.goal))
    gaps = np.stack([s.left_pad_y - s.obj[:, 1], s.obj[:, 1] - s.right_pad_y], axis=-1)
    # Meta-World means the pads' *initial* positions here, but what it stores are live views of the body positions, so
    # its margin follows the current pads. Being comparable means computing what it computes.
    grasped = _grasp(s, gaps, np.abs(np.abs(gaps) - _PAD_REACH))
    reward = hamacher(grasped, in_place)
    lifted = s.obj[:, 2] - 0.01 > s.init_obj[:, 2]
    held = (distance(s.obj, s.tcp) < 0.02) & (s.gripper_open > 0) & lifted
    reward = np.where(held, reward + 1 + 5 * in_place, reward)
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= 0.07
