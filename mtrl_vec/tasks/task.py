"""What a task is: data and functions over NumPy arrays.

Shapes: ``n`` rows, one per simulation; ``V`` numbers in a drawn vector. Positions in metres, world frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError
from mtrl_vec.tasks.draw import Draw

Array = NDArray[np.float64]
Point = tuple[float, float, float]

MAX_EPISODE_STEPS = 500
"""Meta-World's time limit (``SawyerXYZEnv.max_path_length``), in environment steps."""
HAND_INIT_POS: Point = (0.0, 0.6, 0.2)
"""Where most tasks' hand starts (``init_config["hand_init_pos"]``)."""
HAND_LOW: Point = (-0.5, 0.40, 0.05)
HAND_HIGH: Point = (0.5, 1.0, 0.5)
"""Bounds of most tasks' mocap body, which the hand follows."""


class Position(NamedTuple):
    """A position in a simulation."""

    kind: str
    """``body``, ``site`` or ``geom``."""
    name: str
    offset: Point = (0.0, 0.0, 0.0)
    """Added to it, in the world frame."""


class Orientation(NamedTuple):
    """A rotation in a simulation, or a constant.

    Meta-World writes some quaternions as ``xyzw``, from a rotation matrix, others as MuJoCo's ``wxyz``.
    """

    kind: str
    """``body``, ``site`` or ``geom``; ``constant`` for a rotation that is not read."""
    name: str = ""
    xyzw: bool = True
    """In this order, from the rotation matrix. False: as MuJoCo has it, which it does for bodies only."""
    constant: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


MAX_POINTS = 5
"""`Task.points` that there is room for."""
NO_ORIENTATION = Orientation("constant")
"""Zeros, as Meta-World fills in where a task does not show a rotation."""
_OBJECT, _OBJECT_GEOM = Position("body", "obj"), Orientation("geom", "objGeom")


@dataclass(slots=True)
class RewardInputs:
    """What rewards are computed from, after the step. Rows of one formula, whichever their tasks."""

    hand: Array
    """[n, 3] as observed, within the observation space."""
    gripper_open: Array
    """[n] finger distance / 0.1 m, in [0, 1]: the observation's fourth entry."""
    obj: Array
    """[n, 3] object, as observed."""
    quat: Array
    """[n, 4] rotation of the object, as observed."""
    second: Array
    """[n, 3] second object, as observed."""
    tcp: Array
    """[n, 3] tool centre: midpoint of the two finger tips."""
    left_pad: Array
    """[n, 3]"""
    right_pad: Array
    """[n, 3]"""
    points: Array
    """[n, 5, 3] positions of `Task.points`."""
    joint: Array
    """[n] angle in radians or position in metres of `Task.joint`."""
    touching: NDArray[np.bool_]
    """[n] both pads press on the object, for tasks with `Task.touch`."""
    grip: NDArray[np.float32]
    """[n] the action's fourth entry, not clipped."""
    goal: Array
    """[n, 3]"""
    init_tcp: Array
    """[n, 3] tool centre at the start of the episode."""
    init_obj: Array
    """[n, 3] object at the start of the episode; see `Start`."""
    init_second: Array
    """[n, 3] see `Start`."""
    first_obj: Array
    """[n, 3] object as first observed after a step of this episode."""
    grasp: Array
    """[n] `Task.grasp`; zeros without it."""
    params: Mapping[str, Array]
    """[n, ...] `Task.params`, or those of its `Grasp` while that is computed. The last field."""

    def rows(self, rows: slice, params: Mapping[str, Array]) -> RewardInputs:
        """Views of some of the rows, with parameters of their own."""
        values: list[Any] = [array[rows] for array in _arrays(self)]
        return RewardInputs(*values, params)  # type: ignore[call-arg]  # by position, which is quicker


_arrays = attrgetter(*(field.name for field in fields(RewardInputs)[:-1]))

RewardFn = Callable[[RewardInputs], tuple[Array, NDArray[np.bool_]]]
"""Reward [n] and success [n]. Tasks with the same function are computed in one call, parameters as columns."""


class Grasp(NamedTuple):
    """The part of a reward that is for holding the object. Many tasks share one formula, and so one call."""

    function: Callable[[RewardInputs], Array]
    """Reward [n] in [0, 1] for the grasp."""
    params: Mapping[str, float]


class Start(NamedTuple):
    """What an episode keeps from its start."""

    goal: Array
    """[3]"""
    obj: Array
    """[3] where the object starts, or what the reward measures it from (the handle, the part to push)."""
    second: Array | None = None
    """[3] the same for a second thing, where the reward has one."""


class Scene(Protocol):
    """A simulation during its reset: settled, with the task's fixture in place. See `mtrl_vec.sim.scene.Scene`."""

    def position(self, kind: str, name: str) -> Array:
        """[3] a position as it was last computed: changes of state do not count before `forward`."""

    def joint(self, name: str) -> float:
        """Position of a joint in the current state."""

    def set_joint(self, name: str, value: float) -> None:
        """Change the position of a hinge or slide, and nothing else."""

    def set_state(self, at: int, qpos: Array | float, still: slice = slice(0, 0)) -> None:
        """Write ``qpos`` from index ``at`` on, stop the degrees of freedom ``still``, and compute positions."""

    def place(self, joint: str, position: Array) -> None:
        """Put the body of a free joint at a position [3], at rest, and compute positions."""

    def forward(self) -> None:
        """Compute positions from the state."""

    def step(self, count: int) -> None:
        """Advance by physics steps."""


StartFn = Callable[[Scene, Array], Start]
"""Places what a drawn vector [V] says, after the hand has settled."""
FixtureFn = Callable[[Array, Array], Array]
"""Position [3] of the moved body from a drawn vector [V] and its position in the model [3]."""


@dataclass(frozen=True, eq=False)
class Task:
    """One task. Which head of a policy serves it depends on the list of tasks that the policy is trained on."""

    name: str
    """Meta-World's name, for example ``push-v3``; or your own."""
    model_file: str
    """MJCF file of the physics model: an absolute path, or one relative to Meta-World's ``assets``."""
    draw: Draw
    """How the vector that tells one episode from another is drawn."""
    goal_low: Point
    goal_high: Point
    """Bounds that the goal is clipped to in observations (``goal_space``)."""
    start: StartFn
    """How an episode starts from a drawn vector."""
    reward: RewardFn
    """Reward and success after a step."""
    params: Mapping[str, float | Point] = field(default_factory=dict)
    """Numbers that `reward` reads, where tasks share a formula."""
    grasp: Grasp | None = None
    """Reward for holding the object, which `reward` reads as ``grasp``."""
    obj: Position = _OBJECT
    """The object that is observed."""
    orientation: Orientation = _OBJECT_GEOM
    """Its observed rotation."""
    obj_from_joint: Callable[[Array, Array], Array] | None = None
    """Where the object is, from its position [n, 3] and `joint` [n], if it is not where it is read."""
    second: Position | None = None
    """A second observed object."""
    second_quat: str | None = None
    """Body whose rotation (``wxyz``) is observed as the second object's; zeros without it."""
    points: tuple[Position, ...] = ()
    """Up to five further positions that the reward reads."""
    joint: str | None = None
    """Hinge or slide whose position the reward reads."""
    touch: str | None = None
    """Geom of an object; the reward reads whether both pads press on it."""
    fixture: str | None = None
    """Body of the model that an episode moves, if any."""
    place_fixture: FixtureFn | None = None
    """Where it goes."""
    hand_init: Point = HAND_INIT_POS
    """Where the hand starts."""
    mocap_low: Point = HAND_LOW
    mocap_high: Point = HAND_HIGH
    """Bounds of the mocap body, which the hand follows."""
    settles: bool = False
    """The hand or the object touches the fixture while the hand settles, so that no settled state serves all draws."""

    def __post_init__(self) -> None:
        """Raises InputError on fields that do not go together."""
        problem = ""
        parts: list[Position | Orientation] = [*self.positions, self.orientation]
        for part in parts:
            kinds = ("body", "site", "geom", *(["constant"] if isinstance(part, Orientation) else []))
            if part.kind not in kinds:
                problem = f"reads a {part.kind!r}: it must be one of {', '.join(kinds)}"
        if self.orientation.kind in ("site", "geom") and not self.orientation.xyzw:
            problem = f"reads {self.orientation.name} with xyzw=False, which only bodies have: leave it out"
        if (self.fixture is None) != (self.place_fixture is None):
            problem = f"has fixture {self.fixture} and place_fixture {self.place_fixture}: give both or neither"
        if len(self.points) > MAX_POINTS:
            problem = f"has {len(self.points)} points: there is room for {MAX_POINTS}"
        if problem:
            raise InputError(f"task {self.name} {problem}")

    @property
    def positions(self) -> tuple[Position, ...]:
        """All positions that are read."""
        return (self.obj, *([] if self.second is None else [self.second]), *self.points)
