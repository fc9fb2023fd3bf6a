"""`World`: one compiled physics model, its single ``MjData``, and what the numbers in a row of state mean.

A simulation is not a model and its data but a row of numbers: its integration state. All rows of a world take turns in
one ``MjData``, which therefore stays in the cache however many there are. Saving, restoring and resetting are array
copies. The model is compiled without its visual geometry, which costs kinematics and touches nothing else.

Shapes: ``S`` numbers of state. All lengths in metres.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import mujoco
import numpy as np
from metaworld.asset_path_utils import full_V3_path_for
from numpy.typing import NDArray

from mtrl_vec.tasks.task import HAND_INIT_POS, Array, Task

FRAME_SKIP = 5
"""Physics steps per environment step."""

_MOCAP_LOW, _MOCAP_HIGH = np.array([-0.5, 0.40, 0.05]), np.array([0.5, 1.0, 0.5])
_MOCAP_QUAT = (1.0, 0.0, 1.0, 0.0)
_ACTION_SCALE = np.float32(1 / 100)
# The weld between mocap body and hand, as `SawyerMocapBase.reset_mocap_welds` sets it.
_WELD = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 5.0)
_SETTLING_STEPS = 50

_STATE_PARTS = ("TIME", "QPOS", "QVEL", "WARMSTART", "CTRL", "MOCAP_POS", "MOCAP_QUAT")
"""What the future depends on. The rest of MuJoCo's integration state (applied forces, ...) never changes here."""


def load_model(model_file: str, visual: bool = False) -> mujoco.MjModel:
    """Compile one of Meta-World's models.

    Args:
        model_file: see `mtrl_vec.tasks.task.Task.model_file`.
        visual: keep the visual geometry, for rendering.
    """
    spec = mujoco.MjSpec.from_file(full_V3_path_for(model_file))
    spec.compiler.discardvisual = not visual
    model = spec.compile()
    model.eq_data[model.eq_type == mujoco.mjtEq.mjEQ_WELD] = _WELD
    return model


class ObjectHandle(NamedTuple):
    """Where the object of a task is found in a world."""

    body: int
    xmat: Array  # [3, 3] view of the rotation of its geom in the world's ``MjData``
    qpos: slice  # its position in a row of state
    qvel: slice  # its velocity in a row of state


class Turn(NamedTuple):
    """What a slot's turn in the ``MjData`` reads and writes: views of its rows."""

    state: Array  # [S]
    xpos: Array  # [bodies, 3]
    site_xpos: Array  # [sites, 3]
    xmat: Array  # [3, 3]
    source_xmat: Array  # [3, 3] see `ObjectHandle.xmat`


class World:
    """A compiled model and its ``MjData``.

    Args:
        model_file: see `load_model`.
    """

    def __init__(self, model_file: str) -> None:
        # Unstable physics is counted by the batch; MuJoCo would also append a line to a file in the current folder.
        mujoco.set_mju_user_warning(_ignore_warning)
        self.model = model = load_model(model_file)
        self.data = mujoco.MjData(model)
        self.state_signature = sum(_state_bit(part) for part in _STATE_PARTS)
        """What a row of state holds, for ``mujoco.mj_setState`` and ``mj_getState``."""
        sizes = [mujoco.mj_stateSize(model, _state_bit(part)) for part in _STATE_PARTS]
        ends = np.cumsum(sizes).tolist()
        self._parts = {p: slice(end - size, end) for p, size, end in zip(_STATE_PARTS, sizes, ends, strict=True)}
        self.state_size = sum(sizes)
        """S."""
        self.time = self._parts["TIME"]
        self.step_seconds = FRAME_SKIP * model.opt.timestep
        """Simulated time of an environment step."""
        self.bodies = [model.body(name).id for name in ("hand", "rightclaw", "leftclaw", "leftpad", "rightpad")]
        self.tips = [model.site(name).id for name in ("rightEndEffector", "leftEndEffector")]
        self.settled, self.init_tcp = self._settle()

    def _settle(self) -> tuple[Array, Array]:
        """Simulate Meta-World's hand reset once: the state in which it always ends [S], and its tool centre [3]."""
        model, data = self.model, self.data
        for _ in range(_SETTLING_STEPS):  # SawyerXYZEnv._reset_hand
            data.mocap_pos[0] = HAND_INIT_POS
            data.mocap_quat[0] = _MOCAP_QUAT
            data.ctrl[:] = (-1, 1)
            mujoco.mj_step(model, data, nstep=FRAME_SKIP)
        settled = np.empty(self.state_size)
        mujoco.mj_getState(model, data, settled, self.state_signature)
        self._settled_xpos = data.xpos.copy()  # as the last physics step left them, as Meta-World reads them
        return settled, data.site_xpos[self.tips].mean(axis=0)

    def resting_height(self, task: Task) -> float:
        """Height of a task's object at rest, before an episode places it."""
        return float(self._settled_xpos[self.model.body(task.object_body).id, 2])

    def object_handle(self, task: Task) -> ObjectHandle:
        """Where the object of a task is found."""
        joint = self.model.joint(task.object_joint)
        qpos, qvel = (
            self._parts[part].start + address[0] for part, address in (("QPOS", joint.qposadr), ("QVEL", joint.dofadr))
        )
        xmat = self.data.geom_xmat[self.model.geom(task.object_geom).id].reshape(3, 3)
        body = self.model.body(task.object_body).id
        return ObjectHandle(body, xmat, slice(qpos, qpos + 3), slice(qvel, qvel + 6))

    def control(self, states: Array, rows: NDArray[np.intp] | slice, action: NDArray[np.float32]) -> None:
        """Write actions [m, 4] into rows of states [n, S or more], as ``SawyerXYZEnv.set_xyz_action`` would.

        In float32 up to the sum, like Meta-World; ``ctrl`` takes the raw value and MuJoCo clamps it.
        """
        mocap = self._parts["MOCAP_POS"]
        delta = np.clip(action[:, :3], -1, 1) * _ACTION_SCALE
        states[rows, mocap] = np.clip(states[rows, mocap] + delta, _MOCAP_LOW, _MOCAP_HIGH)
        states[rows, self._parts["CTRL"]] = np.stack([action[:, 3], -action[:, 3]], axis=1)

    def step(self, turns: Iterable[Turn]) -> None:
        """Advance slots by one environment step each: what the rest of this package exists to keep fed."""
        # Everything the loop touches is local: at 100 us a slot, attribute look-ups are worth avoiding.
        model, data, signature = self.model, self.data, self.state_signature
        set_state, get_state = mujoco.mj_setState, mujoco.mj_getState
        mj_step, mj_forward = mujoco.mj_step, mujoco.mj_forward
        xpos, site_xpos = data.xpos, data.site_xpos
        for row, bodies, sites, xmat, source_xmat in turns:
            set_state(model, data, row, signature)
            mj_step(model, data, FRAME_SKIP)
            # Meta-World does this too, and it is not idle: it moves the solver's warm start.
            mj_forward(model, data)
            get_state(model, data, row, signature)
            bodies[:] = xpos
            sites[:] = site_xpos
            xmat[:] = source_xmat

    def forward(self, turn: Turn) -> None:
        """Compute positions from a slot's state, after it was changed by hand."""
        model, data, signature = self.model, self.data, self.state_signature
        mujoco.mj_setState(model, data, turn.state, signature)
        mujoco.mj_forward(model, data)
        mujoco.mj_getState(model, data, turn.state, signature)
        turn.xpos[:], turn.site_xpos[:], turn.xmat[:] = data.xpos, data.site_xpos, turn.source_xmat


def _state_bit(part: str) -> int:
    return int(getattr(mujoco.mjtState, f"mjSTATE_{part}"))


def _ignore_warning(_message: str) -> None:
    pass
