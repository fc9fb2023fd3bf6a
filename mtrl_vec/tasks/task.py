"""What a task is: data and pure functions over NumPy rows.

Shapes: ``n`` rows, one per simulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Point = tuple[float, float, float]

MAX_EPISODE_STEPS = 500
"""Meta-World's time limit (``SawyerXYZEnv.max_path_length``), in environment steps."""
HAND_INIT_POS = np.array([0.0, 0.6, 0.2])
"""Initial position of the hand in metres (``init_config["hand_init_pos"]``)."""


class RewardInputs(NamedTuple):
    """What rewards are computed from, after the step. Positions in metres, world frame."""

    tcp: Array  # [n, 3] tool centre: midpoint of the two finger tips
    obj: Array  # [n, 3] object
    gripper_open: Array  # [n] finger distance / 0.1 m, in [0, 1]: the observation's fourth entry
    left_pad_y: Array  # [n]
    right_pad_y: Array  # [n]
    grip: NDArray[np.float32]  # [n] the action's fourth entry, not clipped
    init_obj: Array  # [n, 3] object at the start of the episode
    goal: Array  # [n, 3]
    init_tcp: Array  # [n, 3] tool centre at the start of the episode

    def rows(self, index: NDArray[np.intp]) -> RewardInputs:
        """The same inputs for some of the rows."""
        arrays: tuple[NDArray[Any], ...] = self
        return RewardInputs(*(array[index] for array in arrays))


RewardFn = Callable[[RewardInputs], tuple[Array, NDArray[np.bool_]]]
"""Reward [n] and success [n]."""


class Start(NamedTuple):
    """Where an episode starts. Positions in metres, world frame."""

    obj: Array  # [3]
    goal: Array  # [3]


def as_drawn(vector: Array, resting_height: float) -> Start:
    """Object and goal where they were drawn."""
    return Start(vector[:3].copy(), vector[3:].copy())


def on_table(vector: Array, resting_height: float) -> Start:
    """Object and goal at the height of the resting object, not as drawn (``SawyerPushEnvV3.reset_model``)."""
    start = as_drawn(vector, resting_height)
    start.obj[2] = start.goal[2] = resting_height
    return start


@dataclass(frozen=True)
class Draw:
    """How an episode's object and goal are drawn: uniformly from a box, again while they are too close to each other.

    Meta-World's ``rand_vec``: object position [3], then goal position [3], in metres.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    min_distance: float = 0.15
    """Least distance of object and goal in the xy plane, in metres."""

    def sample(self, rng: np.random.Generator | np.random.RandomState) -> Array:
        """Draw a vector, [6]."""
        low, high = np.array(self.low), np.array(self.high)
        vector = rng.uniform(low, high)
        while np.linalg.norm(vector[:2] - vector[3:5]) < self.min_distance:
            vector = rng.uniform(low, high)
        return vector

    def benchmark_vectors(self, seed: int, count: int = 50) -> Array:
        """The vectors of ``metaworld.MT1(name, seed)``, [count, 6].

        Source: ``metaworld._make_tasks``, which resets an environment ``count`` times under NumPy's global generator;
        each of its resets draws twice and keeps the second vector.
        """
        rng = np.random.RandomState(seed)
        return np.stack([[self.sample(rng), self.sample(rng)][1] for _ in range(count)])


@dataclass(frozen=True)
class Task:
    """One task. Which head of a policy serves it depends on the list of tasks that the policy is trained on."""

    name: str
    """Meta-World's name, for example ``push-v3``."""
    model_file: str
    """MJCF file of the physics model, relative to Meta-World's ``assets``."""
    draw: Draw
    """How object and goal of an episode are drawn."""
    goal_low: Point
    goal_high: Point
    """Bounds that the goal is clipped to in observations (``goal_space``)."""
    reward: RewardFn
    """Reward and success after a step."""
    place: Callable[[Array, float], Start] = as_drawn
    """Start of an episode from the drawn vector [6] and the height of the resting object."""
    object_body: str = "obj"
    """Body that a reset places, and whose position is observed."""
    object_geom: str = "objGeom"
    """Geom whose rotation is observed."""
    object_joint: str = "objjoint"
    """Free joint of the object."""
