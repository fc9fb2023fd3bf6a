"""How episodes start: what ``reset_model`` of Meta-World's tasks does after the hand has settled.

The order matters to the last bit. Meta-World often reads a position before it is computed anew, so that it is one
physics step old, and every ``mj_forward`` moves the solver's warm start.

Tasks bind the keywords with `functools.partial`, which can be sent to other processes. Positions in metres.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mtrl_vec.tasks.task import Array, Point, Scene, Start

Measure = Callable[[Scene, Array], Array]
"""A position [3] of an episode, from the scene and the drawn vector [V]."""

_ARM = 9
"""Joints of the arm and the fingers, before which only coffee's mug comes."""
_FREE_BODY = slice(_ARM, _ARM + 6)
_SLIDE = slice(_ARM, _ARM + 1)
_NOTHING = slice(0, 0)


def drawn(offset: Point = (0.0, 0.0, 0.0)) -> Measure:
    """The first three numbers of the vector, and an offset."""
    return partial(_drawn, offset=offset)


def _drawn(scene: Scene, vector: Array, *, offset: Point) -> Array:
    return vector[:3] + np.array(offset)


def drawn_goal(scene: Scene, vector: Array) -> Array:
    """The last three numbers of the vector."""
    return vector[-3:].copy()


def at(kind: str, name: str, offset: Point = (0.0, 0.0, 0.0)) -> Measure:
    """The position of a ``body``, ``site`` or ``geom``, and an offset."""
    return partial(_at, kind=kind, name=name, offset=offset)


def _at(scene: Scene, vector: Array, *, kind: str, name: str, offset: Point) -> Array:
    return scene.position(kind, name) + np.array(offset)


def place_object(
    scene: Scene,
    vector: Array,
    *,
    height: float | tuple[str, str] | None = None,
    goal: Measure = drawn_goal,
    goal_at_height: bool = False,
    steps: int = 0,
    forward: bool = False,
) -> Start:
    """Put the object where it was drawn (``_set_obj_xyz``).

    Args:
        height: the object's, or what to read it from before anything moves; as drawn by default.
        goal: the goal's position.
        goal_at_height: put the goal as high as the object.
        steps, forward: what happens before it.
    """
    obj = vector[:3].copy()
    if height is not None:
        obj[2] = height if isinstance(height, float) else scene.position(*height)[2]
    if steps:
        scene.step(steps)
    if forward:
        scene.forward()
    scene.set_state(_ARM, obj, _FREE_BODY)
    target = goal(scene, vector)
    if goal_at_height:
        target[2] = obj[2]
    return Start(target, obj)


def place_free_body(scene: Scene, vector: Array, *, joint: str) -> Start:
    """Put the body of a free joint where it was drawn, for tasks of your own: object and goal as drawn."""
    scene.place(joint, vector[:3])
    return Start(vector[-3:].copy(), vector[:3].copy())


def sweep_off_table(scene: Scene, vector: Array) -> Start:
    """``SawyerSweepEnvV3``: the goal is beside the table, on the object's line."""
    obj = np.array([*vector[:2], 0.02])
    scene.set_state(_ARM, obj, _FREE_BODY)
    return Start(np.array([0.5, vector[1], 0.01]), obj)


def fixed_goal(scene: Scene, vector: Array, *, goal: Point) -> Array:
    """The same goal whatever was drawn."""
    return np.array(goal)


def set_fixture(
    scene: Scene,
    vector: Array,
    *,
    goal: Measure,
    obj: Measure,
    slide: float | None = None,
    still: bool = True,
    forward: bool = False,
    steps: int = 0,
) -> Start:
    """The fixture is in place; set its own joint.

    Args:
        goal, obj: positions, measured after it.
        slide: position of the first joint after the arm's (``_set_obj_xyz`` of most fixtures).
        still: stop it.
        forward, steps: what happens where there is no joint to set.
    """
    if steps:
        scene.step(steps)
    if forward:
        scene.forward()
    if slide is not None:
        scene.set_state(_ARM, slide, _SLIDE if still else _NOTHING)
    return Start(goal(scene, vector), obj(scene, vector))


def slide_window(scene: Scene, vector: Array, *, slide: float, goal: Measure, obj: Measure, second: Measure) -> Start:
    """``SawyerWindow{Open,Close}EnvV3``: sets the joint without computing positions."""
    start = Start(goal(scene, vector), obj(scene, vector), second(scene, vector))
    scene.set_joint("window_slide", slide)
    return start


def turn_dial(scene: Scene, vector: Array) -> Start:
    """``SawyerDialTurnEnvV3``: the dial's positions are old, its angle is not."""
    (knob,) = dial_knob(scene.position("body", "dial")[None], np.array([scene.joint(DIAL_JOINT)]))
    return Start(vector + np.array([0.0, 0.03, 0.03]), knob + np.array([0.05, 0.02, 0.09]))


DIAL_JOINT = "knob_Joint_1"


def dial_knob(dial: Array, angle: Array) -> Array:
    """Where a dial's knob is, 5 cm from its axis: [n, 3], [n] -> [n, 3]."""
    return dial + np.stack([np.sin(angle), -np.cos(angle), np.zeros_like(angle)], axis=1) * 0.05


def place_mug(scene: Scene, vector: Array, *, mug: Measure, goal: Measure) -> Start:
    """``SawyerCoffee*EnvV3``: the mug's joint comes before the arm's, so that it is the *arm* that is stopped."""
    obj = mug(scene, vector)
    scene.set_state(0, obj, _FREE_BODY)
    return Start(goal(scene, vector), obj)


def slide_plate(scene: Scene, vector: Array, *, slide: tuple[float, float]) -> Start:
    """``SawyerPlateSlide*EnvV3``: keeps the plate's velocity."""
    scene.set_state(_ARM, np.array(slide), _NOTHING)
    return Start(vector[3:].copy(), vector[:3].copy())


def hang_hammer(scene: Scene, vector: Array) -> Start:
    """``SawyerHammerEnvV3``."""
    goal = scene.position("site", "goal")
    scene.set_state(_ARM, vector, _FREE_BODY)
    return Start(goal, vector.copy())


def place_peg(scene: Scene, vector: Array) -> Start:
    """``SawyerPegInsertionSideEnvV3``: remembers the peg's head from *before* the peg is placed."""
    head = scene.position("site", "pegHead")
    scene.set_state(_ARM, vector[:3], _FREE_BODY)
    return Start(vector[3:] + np.array([0.03, 0.0, 0.13]), vector[:3].copy(), head)


def plug_peg(scene: Scene, vector: Array) -> Start:
    """``SawyerPegUnplugSideEnvV3``: the peg keeps its spin from settling in the hole."""
    plug = vector + np.array([0.044, 0.0, 0.131])
    scene.set_state(_ARM, np.array([*plug, 1.0, 0.0, 0.0, 0.0]), slice(_ARM, _ARM + 3))
    return Start(plug + np.array([0.15, 0.0, 0.0]), scene.position("site", "pegEnd"))


def lay_stick(scene: Scene, vector: Array, *, container: tuple[float, float], pull: bool) -> Start:
    """``SawyerStick{Push,Pull}EnvV3``: what the grasp is measured from is the stick or, pulling, the container."""
    stick = np.array([*vector[:2], 0.02])
    goal = np.array([*vector[-3:-1], stick[2] if pull else scene.position("site", "insertion")[2]])
    scene.set_state(_ARM, stick, _FREE_BODY)
    scene.set_state(16, np.array(container), slice(16, 18))
    where = scene.position("body", "object")
    return Start(goal, where, stick) if pull else Start(goal, stick, where)
