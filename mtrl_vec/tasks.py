"""The three Meta-World v3 tasks: where episodes start, what the goal is, and the vectorised reward.

Everything here is NumPy over rows, one row per simulator; nothing knows about MuJoCo or torch. The rewards reproduce
``compute_reward`` of ``metaworld/envs/sawyer_{reach,push,pick_place}_v3.py`` (reward version "v2", the default there),
quirks included.

Shapes: ``n`` rows.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError

Array = NDArray[np.float64]

MAX_EPISODE_STEPS = 500
"""Meta-World's time limit (``SawyerXYZEnv.max_path_length``), in environment steps."""

HAND_INIT_POS = np.array([0.0, 0.6, 0.2])
"""Where the hand starts, in metres, in all three tasks (``init_config["hand_init_pos"]``)."""

MIN_GOAL_DISTANCE = 0.15
"""Object and goal are drawn again while they are closer than this in the xy plane, in metres."""

# Constants of the caging rewards, in metres: the object's radius, how far from it a pad still counts as caging it, and
# how far the tool centre may be from it in the xz plane.
_OBJ_RADIUS = 0.015
_PAD_REACH = 0.05
_XZ_REACH = 0.005


class RewardInputs(NamedTuple):
    """What the rewards are computed from, after the step. Positions in metres, world frame."""

    tcp: Array  # [n, 3] tool centre: midpoint of the two finger tips
    obj: Array  # [n, 3] object
    gripper_open: Array  # [n] finger distance / 0.1 m, in [0, 1]: the observation's fourth entry
    left_pad_y: Array  # [n]
    right_pad_y: Array  # [n]
    grip: NDArray[np.float32]  # [n] the action's fourth entry, not clipped
    init_obj: Array  # [n, 3] object at the start of the episode
    goal: Array  # [n, 3]
    init_tcp: Array  # [3] tool centre at the start of every episode

    def rows(self, index: NDArray[np.intp]) -> RewardInputs:
        """The same inputs for some of the rows."""
        rows = {name: getattr(self, name)[index] for name in self._fields if name != "init_tcp"}
        return self._replace(**rows)


RewardFn = Callable[[RewardInputs], tuple[Array, NDArray[np.bool_]]]


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
    xz_margin = distance(s.init_obj[:, ::2], s.init_tcp[::2]) - _XZ_REACH
    caging_xz = tolerance(distance(s.tcp[:, ::2], s.obj[:, ::2]), 0.0, _XZ_REACH, xz_margin)
    caging = hamacher(caging_y, caging_xz)
    gripping = np.where(caging > 0.97, np.clip(s.grip, 0.0, 1.0), 0.0)
    return (hamacher(caging, gripping) + caging) / 2


def reach_reward(s: RewardInputs) -> tuple[Array, NDArray[np.bool_]]:
    """``SawyerReachEnvV3.compute_reward``: bring the tool centre to the goal. Reward [n] in [0, 10], success [n]."""
    to_goal = distance(s.tcp, s.goal)
    in_place = tolerance(to_goal, 0.0, 0.05, distance(HAND_INIT_POS, s.goal))
    return 10 * in_place, to_goal <= REACH.success_radius


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
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= PUSH.success_radius


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
    return np.where(to_goal < 0.05, 10.0, reward), to_goal <= PICK_PLACE.success_radius


@dataclass(frozen=True)
class Task:
    """One Meta-World task. Positions in metres, world frame.

    A reset draws the object from ``[obj_low, obj_high]`` and the goal from ``[goal_low, goal_high]``, again while the
    two are within ``MIN_GOAL_DISTANCE`` in xy. ``index`` is the row in ``TASKS``; which head of a policy serves the
    task depends on the list of tasks that policy is trained on.
    """

    name: str
    index: int
    goal_low: tuple[float, float, float]
    goal_high: tuple[float, float, float]
    success_radius: float
    reward: RewardFn
    on_table: bool = False
    """Goal and object take their height from the resting object, not from the drawn vector (push)."""
    obj_low: tuple[float, float, float] = (-0.1, 0.6, 0.02)
    obj_high: tuple[float, float, float] = (0.1, 0.7, 0.02)

    def sample(self, rng: np.random.Generator | np.random.RandomState) -> Array:
        """Draw a reset vector, object then goal, [6]: Meta-World's ``rand_vec``."""
        low, high = np.array(self.obj_low + self.goal_low), np.array(self.obj_high + self.goal_high)
        vector = rng.uniform(low, high)
        while np.linalg.norm(vector[:2] - vector[3:5]) < MIN_GOAL_DISTANCE:
            vector = rng.uniform(low, high)
        return vector

    def benchmark_vectors(self, seed: int, count: int = 50) -> Array:
        """The reset vectors of ``metaworld.MT1(name, seed)``, [count, 6].

        Source: ``metaworld._make_tasks``, which resets an environment ``count`` times under NumPy's global generator;
        each of its resets draws twice and keeps the second.
        """
        rng = np.random.RandomState(seed)
        return np.stack([[self.sample(rng), self.sample(rng)][1] for _ in range(count)])


REACH = Task("reach-v3", 0, (-0.1, 0.8, 0.05), (0.1, 0.9, 0.3), 0.05, reach_reward)
PUSH = Task("push-v3", 1, (-0.1, 0.8, 0.01), (0.1, 0.9, 0.02), 0.05, push_reward, on_table=True)
PICK_PLACE = Task("pick-place-v3", 2, (-0.1, 0.8, 0.05), (0.1, 0.9, 0.3), 0.07, pick_place_reward)

TASKS = (REACH, PUSH, PICK_PLACE)

_NAME = re.compile(r"(?P<task>[a-z-]+?)(-v(?P<version>\d+))?(-goal-observable)?")


def resolve_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """Look tasks up by name: ``reach``, ``reach-v3``, or the older ``reach-v2-goal-observable``.

    A name that asks for another version gets v3 and a one-line notice on standard error.

    Raises:
        InputError: on an unknown or repeated name, or an empty list.
    """
    known = {task.name.removesuffix("-v3"): task for task in TASKS}
    found: list[Task] = []
    for name in names:
        match = _NAME.fullmatch(name)
        task = known.get(match["task"]) if match else None
        if match is None or task is None:
            raise InputError(f"unknown task {name!r}: known tasks are {', '.join(t.name for t in TASKS)}")
        if match["version"] not in (None, "3"):
            print(f"note: {name} is run as {task.name}", file=sys.stderr)
        if task in found:
            raise InputError(f"task {task.name!r} is given twice: name each task once")
        found.append(task)
    if not found:
        raise InputError(f"no task given: name at least one of {', '.join(t.name for t in TASKS)}")
    return tuple(found)
