"""`World`: one compiled physics model, its single ``MjData``, and what the numbers in a row of state mean.

A simulation is not a model and its data but a row of numbers: its integration state. All rows of a world take turns in
one ``MjData``, which therefore stays in the cache however many there are. Saving, restoring and resetting are array
copies. The model is compiled without its visual geometry, which costs kinematics and touches nothing else.

Shapes: ``S`` numbers of state. All lengths in metres.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError
from mtrl_vec.sim.compilation import load_model
from mtrl_vec.tasks.task import Array, Point

FRAME_SKIP = 5
"""Physics steps per environment step."""
STEP_SECONDS = FRAME_SKIP * 0.0025
"""Simulated time of an environment step, with the timestep that all of Meta-World's models have."""

TIPS = ("rightEndEffector", "leftEndEffector")
"""Sites of the finger tips, between which the tool centre is."""

_MOCAP_QUAT = (1.0, 0.0, 1.0, 0.0)
_SETTLING_STEPS = 50

_STATE_PARTS = ("TIME", "QPOS", "QVEL", "WARMSTART", "CTRL", "MOCAP_POS", "MOCAP_QUAT")
"""What the future depends on. The rest of MuJoCo's integration state (applied forces, ...) never changes here."""


class Turn(NamedTuple):
    """What a slot's turn in the ``MjData`` reads and writes: views of its rows."""

    state: Array
    """[S]"""
    fixture: Array | None
    """[3] position of the world's fixture, if it has one."""
    copies: tuple[tuple[Array, Array], ...]
    """What to copy after the step: target and source."""
    touching: NDArray[np.bool_] | None
    """[1] whether both pads press on ``touch``, if the task asks for it."""
    touch: int
    """A geom."""


class World:
    """A compiled model and its ``MjData``.

    Args:
        model_file, keep_geoms: see `load_model`.
        fixture: body whose position differs between the simulations of this world, if any.

    Raises:
        InputError: see `load_model`; or the model lacks what Meta-World's arm has.
    """

    def __init__(self, model_file: str, fixture: str | None = None, keep_geoms: Collection[str] = ()) -> None:
        # Unstable physics is counted by the batch; MuJoCo would also append a line to a file in the current folder.
        mujoco.set_mju_user_warning(_ignore_warning)
        self.model_file, self.fixture_name = model_file, fixture
        self.model = model = load_model(model_file, keep_geoms=keep_geoms)
        self._check_arm()
        self.data = mujoco.MjData(model)
        self.state_signature = sum(_state_bit(part) for part in _STATE_PARTS)
        """What a row of state holds, for ``mujoco.mj_setState`` and ``mj_getState``."""
        sizes = [mujoco.mj_stateSize(model, _state_bit(part)) for part in _STATE_PARTS]
        ends = np.cumsum(sizes).tolist()
        self.parts = {p: slice(end - size, end) for p, size, end in zip(_STATE_PARTS, sizes, ends, strict=True)}
        """Where each part of the state is in a row."""
        self.state_size = sum(sizes)
        """S."""
        self.step_seconds = FRAME_SKIP * model.opt.timestep
        """Simulated time of an environment step; has to be `STEP_SECONDS`."""
        self._pads: list[int] = []
        self.fixture = None if fixture is None else model.body_pos[self.id("body", fixture)]
        """[3] view of the fixture's position in the model."""
        self.fixture_in_model = np.zeros(3) if self.fixture is None else self.fixture.copy()
        """[3] where the model file puts it."""
        self._settled: dict[Point, Array] = {}

    def id(self, kind: str, name: str) -> int:
        """Index of a ``body``, ``site``, ``geom`` or ``joint``.

        Raises:
            InputError: the model has none of this name.
        """
        index = mujoco.mj_name2id(self.model, getattr(mujoco.mjtObj, f"mjOBJ_{kind.upper()}"), name)
        if index < 0:
            raise InputError(f"model {self.model_file} has no {kind} named {name!r}, which the task reads")
        return int(index)

    def _check_arm(self) -> None:
        sizes = (self.model.nu, self.model.nmocap, self.model.na)
        if sizes != (2, 1, 0):
            raise InputError(
                f"model {self.model_file} has {sizes[0]} actuators and {sizes[1]} mocap bodies: actions drive "
                "Meta-World's arm, with two fingers and one mocap body that the hand is welded to"
            )

    def settled(self, hand_init: Point) -> Array:
        """State one physics step before the end of Meta-World's hand reset, with the fixture as in the model file [S].

        One step before, since its tasks read positions that are as old as that: the last step has to be done again.
        """
        if hand_init not in self._settled:
            if self.fixture is not None:
                self.fixture[:] = self.fixture_in_model
            self.settle(hand_init, leave_out=1)
            self._settled[hand_init] = self.state()
        return self._settled[hand_init]

    def settle(self, hand_init: Point, leave_out: int = 0) -> None:
        """Simulate the hand reset in ``data`` (``SawyerXYZEnv._reset_hand``), but for its last physics steps."""
        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)
        for i in range(_SETTLING_STEPS):
            data.mocap_pos[0] = hand_init
            data.mocap_quat[0] = _MOCAP_QUAT
            data.ctrl[:] = (-1, 1)
            mujoco.mj_step(model, data, nstep=FRAME_SKIP - (leave_out if i == _SETTLING_STEPS - 1 else 0))

    def state(self) -> Array:
        """The state in ``data``, [S]."""
        row = np.empty(self.state_size)
        mujoco.mj_getState(self.model, self.data, row, self.state_signature)
        return row

    def step(self, turns: Iterable[Turn]) -> None:
        """Advance slots by one environment step each: what the rest of this package exists to keep fed."""
        # Everything the loop touches is local: at 100 us a slot, attribute look-ups are worth avoiding.
        model, data, signature, place = self.model, self.data, self.state_signature, self.fixture
        set_state, get_state = mujoco.mj_setState, mujoco.mj_getState
        mj_step, mj_forward = mujoco.mj_step, mujoco.mj_forward
        for row, fixture, copies, touching, touch in turns:
            if fixture is not None:
                place[:] = fixture  # type: ignore[index]
            set_state(model, data, row, signature)
            mj_step(model, data, FRAME_SKIP)
            # Meta-World does this too, and it is not idle: it moves the solver's warm start.
            mj_forward(model, data)
            get_state(model, data, row, signature)
            for target, source in copies:
                target[:] = source
            if touching is not None:
                touching[0] = self._pads_press_on(touch)

    def find_pads(self) -> None:
        """Prepare for turns with a ``touch``. Raises InputError where the gripper has no pads."""
        self._pads = [self.id("geom", name) for name in ("leftpad_geom", "rightpad_geom")]

    def _pads_press_on(self, geom: int) -> bool:
        """Whether both pads press on a geom (``SawyerXYZEnv.touching_object``)."""
        pairs = self.data.contact.geom
        has = (pairs == geom).any(axis=1)
        if not has.any():
            return False
        forces = self.data.efc_force
        addresses = self.data.contact.efc_address
        for pad in self._pads:
            with_pad = has & (pairs == pad).any(axis=1)
            if not forces[addresses[with_pad]].sum() > 0:
                return False
        return True


def _state_bit(part: str) -> int:
    return int(getattr(mujoco.mjtState, f"mjSTATE_{part}"))


def _ignore_warning(_message: str) -> None:
    pass
