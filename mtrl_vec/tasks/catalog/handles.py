"""Rows of the tasks with a faucet, a window, a handle, a lever or a dial."""

from __future__ import annotations

from functools import partial

from mtrl_vec.tasks.catalog.common import HAND_INIT_NEAR, LOW_HAND, at_drawn, model, quaternion, single
from mtrl_vec.tasks.draw import Draw
from mtrl_vec.tasks.rewards import fixtures as rewards
from mtrl_vec.tasks.rewards import objects
from mtrl_vec.tasks.starts import DIAL_JOINT, Measure, at, dial_knob, drawn, set_fixture, slide_window, turn_dial
from mtrl_vec.tasks.task import (
    HAND_HIGH,
    HAND_INIT_POS,
    HAND_LOW,
    NO_ORIENTATION,
    Point,
    Position,
    Task,
)
from mtrl_vec.tasks.terms import caging

# -- Faucets and windows.


def _faucet(name: str, site: str, half_width: float, side: float, tip: Point, forward: bool) -> Task:
    return Task(
        name,
        model("faucet"),
        Draw((-half_width, 0.8, 0.0), (half_width, 0.85, 0.0)),
        LOW_HAND,
        HAND_HIGH,
        partial(set_fixture, goal=drawn((side, 0.0, 0.125)), obj=drawn(), forward=forward),
        rewards.faucet,
        params={"tip": tip},
        obj=Position("site", site, (0.0, 0.0, -0.01)),
        orientation=quaternion("faucetBase"),
        fixture="faucetBase",
        place_fixture=at_drawn,
        hand_init=HAND_INIT_NEAR,
        mocap_low=LOW_HAND,
    )


FAUCET_OPEN = _faucet("faucet-open-v3", "handleStartOpen", 0.05, 0.175, (-0.04, 0.0, 0.03), forward=False)
FAUCET_CLOSE = _faucet("faucet-close-v3", "handleStartClose", 0.1, -0.175, (0.0, 0.0, 0.0), forward=True)


def _window(
    name: str, site: str, box: tuple[Point, Point], *, slide: float, goal: Point, handle: Point, gaussian: bool
) -> Task:
    grip = at("site", site, handle)
    second: Measure = grip if gaussian else drawn()
    return Task(
        name,
        model("window_horizontal"),
        Draw(*box),
        HAND_LOW,
        HAND_HIGH,
        partial(slide_window, slide=slide, goal=drawn(goal), obj=grip, second=second),
        rewards.window,
        params={"gaussian": float(gaussian)},
        obj=Position("site", site),
        orientation=NO_ORIENTATION,
        fixture="window",
        place_fixture=at_drawn,
        hand_init=single(HAND_INIT_NEAR),
    )


WINDOW_OPEN = _window(
    "window-open-v3",
    "handleOpenStart",
    ((-0.1, 0.7, 0.16), (0.1, 0.9, 0.16)),
    slide=0.0,
    goal=(0.2, 0.0, 0.0),
    handle=(0.0, 0.0, 0.0),
    gaussian=False,
)
WINDOW_CLOSE = _window(
    "window-close-v3",
    "handleCloseStart",
    ((0.0, 0.75, 0.2), (0.0, 0.9, 0.2)),
    slide=0.2,
    goal=(0.0, 0.0, 0.0),
    handle=(0.2, 0.0, 0.0),
    gaussian=True,
)

# -- Handles, a lever and a dial.

_PULL_SIDE: dict[str, float | Point] = {"scale": (1.0, 1.0, 1.0), "up": (0.0, 0.0, 1.0), "success": 0.08}
_PULL: dict[str, float | Point] = {
    "scale": (0.0, 0.0, 1.0),
    "up": (0.0, 1.0, 0.0),  # Meta-World compares the handle's y with the height that it started at
    "success": 0.05,
}
_PULLED: dict[str, float | Point] = {"unscaled": 0.0, "hold": 0.035, "lift": 0.01, "gain": 5.0}


def _handle(
    name: str,
    file: str,
    box: tuple[Point, Point],
    goal: tuple[Point, Point],
    site: str,
    *,
    pull: bool,
    init: Measure | None = None,
    **rest: object,
) -> Task:
    return Task(
        name,
        model(file),
        Draw(*box),
        *goal,
        partial(
            set_fixture,
            slide=-0.1 if pull else -0.001,
            goal=at("site", "goalPull" if pull else "goalPress"),
            obj=init or at("site", site),
        ),
        objects.carry if pull else rewards.handle_press,
        obj=Position("site", site),
        orientation=NO_ORIENTATION,
        fixture="box",
        place_fixture=at_drawn,
        settles=True,
        **rest,  # type: ignore[arg-type]
    )


_SIDE, _FRONT = "handle_press_sideways", "handle_press"
_HAND_BOX = HAND_LOW, HAND_HIGH
_FRONT_BOX = (-0.1, 0.8, -0.001), (0.1, 0.9, 0.001)
HANDLE_PRESS_SIDE = _handle(
    *("handle-press-side-v3", _SIDE, ((-0.35, 0.65, -0.001), (-0.25, 0.75, 0.001)), _HAND_BOX, "handleStart"),
    pull=False,
)
HANDLE_PRESS = _handle(
    *("handle-press-v3", _FRONT, _FRONT_BOX, ((-0.1, 0.55, 0.04), (0.1, 0.70, 0.08)), "handleStart"),
    pull=False,
)
HANDLE_PULL_SIDE = _handle(
    *("handle-pull-side-v3", _SIDE, ((-0.35, 0.65, 0.0), (-0.25, 0.75, 0.0)), _HAND_BOX, "handleCenter"),
    pull=True,
    params=_PULLED | _PULL_SIDE,
    grasp=caging(0.032, 0.06, 0.01),
)
HANDLE_PULL = _handle(
    *("handle-pull-v3", _FRONT, _FRONT_BOX, ((-0.1, 0.55, 0.04), (0.1, 0.70, 0.18)), "handleRight"),
    pull=True,
    init=drawn(),  # not the handle, unlike in its sideways sister
    params=_PULLED | _PULL,
    grasp=caging(0.022, 0.05, 0.01),
)
LEVER_PULL = Task(
    "lever-pull-v3",
    model("lever_pull"),
    Draw((-0.1, 0.7, 0.0), (0.1, 0.8, 0.0)),
    LOW_HAND,
    HAND_HIGH,
    partial(set_fixture, goal=drawn((0.12, 0.0, 0.25 + 0.2)), obj=drawn((0.12, -0.2, 0.25))),
    rewards.lever_pull,
    obj=Position("site", "leverStart"),
    joint="LeverAxis",
    fixture="lever",
    place_fixture=at_drawn,
    hand_init=single(HAND_INIT_NEAR),
    mocap_low=LOW_HAND,
    settles=True,
)


DIAL_TURN = Task(
    "dial-turn-v3",
    model("dial"),
    Draw((-0.1, 0.7, 0.0), (0.1, 0.8, 0.0)),
    (-0.1, 0.73, 0.0299),
    (0.1, 0.83, 0.0301),
    turn_dial,
    rewards.dial_turn,
    obj=Position("body", "dial"),
    obj_from_joint=dial_knob,
    orientation=quaternion("dial"),
    joint=DIAL_JOINT,
    fixture="dial",
    place_fixture=at_drawn,
    hand_init=single(HAND_INIT_POS),
)
