"""`SawyerSim`: many Meta-World simulations stepped as one batch, bit for bit as Meta-World does. NumPy in and out.

Three things make it fast, none of which changes a bit of a trajectory:

* The three tasks share one physics model, so a simulation is not a model and its data but 56 numbers: its integration
  state, a row of ``SawyerSim.state``. All rows take turns in a single ``MjData``, which therefore stays in the cache
  however many there are. Saving, restoring and resetting are array copies.
* The model is compiled without its visual geometry, which costs kinematics and touches nothing else.
* A reset restores the state in which Meta-World's 250 settling steps always end, instead of simulating them.

Shapes: ``n`` slots. All lengths in metres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import mujoco
import numpy as np
from metaworld.asset_path_utils import full_V3_path_for
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from mtrl_vec.tasks import HAND_INIT_POS, MAX_EPISODE_STEPS, Array, RewardInputs, Task, distance

OBSERVATION_SIZE = 39
ACTION_SIZE = 4
FRAME_SKIP = 5  # physics steps per environment step

_MOCAP_LOW, _MOCAP_HIGH = np.array([-0.5, 0.40, 0.05]), np.array([0.5, 1.0, 0.5])
_MOCAP_QUAT = (1.0, 0.0, 1.0, 0.0)
_ACTION_SCALE = np.float32(1 / 100)
_HAND_LOW, _HAND_HIGH = np.array([-0.525, 0.348, -0.0525]), np.array([0.525, 1.025, 0.7])
# The weld between mocap body and hand, as `SawyerMocapBase.reset_mocap_welds` sets it.
_WELD = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 5.0)

_LOW_64_BITS = 2**64 - 1

_SLOT_ARRAYS = (
    *("task_idx", "state", "elapsed", "observation", "_previous", "_fresh", "_resting", "_init_obj", "_goal"),
    *("_xpos", "_site_xpos", "_obj_xmat"),
)
"""Of a `SawyerSim`, with a row per slot: with the random streams, all that it goes on from."""

_STATE_PARTS = ("TIME", "QPOS", "QVEL", "WARMSTART", "CTRL", "MOCAP_POS", "MOCAP_QUAT")
"""What the future depends on. The rest of MuJoCo's integration state (applied forces, ...) never changes here."""


def load_model(visual: bool = False) -> mujoco.MjModel:
    """Meta-World's own v3 model, which is the same for reach, push and pick-place but for the goal's marker.

    Args:
        visual: keep the visual geometry, for rendering.
    """
    spec = mujoco.MjSpec.from_file(full_V3_path_for("sawyer_xyz/sawyer_pick_place_v3.xml"))
    spec.compiler.discardvisual = not visual
    model = spec.compile()
    model.eq_data[model.eq_type == mujoco.mjtEq.mjEQ_WELD] = _WELD
    return model


class Step(NamedTuple):
    """What one step of the batch returned."""

    observation: Array  # [n, 39]
    reward: Array  # [n]
    success: NDArray[np.bool_]  # [n] at this very step
    truncated: NDArray[np.bool_]  # [n] the time limit, or unstable physics
    unstable: NDArray[np.bool_]  # [n] unstable physics


class SawyerSim:
    """``n`` slots, each a simulation of any of the tasks.

    MuJoCo's warnings are switched off for the whole process: they are counted in `Step.unstable` instead.

    A slot's random stream is seeded by ``(seed, first_slot + row)``: what a slot sees does not depend on how slots are
    spread over processes.

    Args:
        tasks: the tasks that slots may hold.
        task_idx: [n] index into ``tasks`` that each slot starts with.
        seed: of all random streams.
        first_slot: global number of row 0.
        goals_seed: None draws a fresh object and goal at every reset. A number draws uniformly from the 50 fixed ones
            of ``metaworld.MT1(task, seed=goals_seed)``.
        max_episode_steps: the time limit, in environment steps.
        random_phase: start every slot's first episode at a random count of elapsed steps, so that resets are spread
            evenly over time instead of hitting all slots at once.
        rest_after_success: once an episode has succeeded, its slot is not simulated any more until its next reset; it
            stays where it is. For evaluations, which only ask whether.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        task_idx: NDArray[np.int64] | Sequence[int],
        *,
        seed: int = 0,
        first_slot: int = 0,
        goals_seed: int | None = None,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        random_phase: bool = False,
        rest_after_success: bool = False,
    ) -> None:
        self.tasks = tuple(tasks)
        self.task_idx = np.array(task_idx, dtype=np.int64)
        self.num_slots = n = len(self.task_idx)
        self.max_episode_steps = max_episode_steps
        self.random_phase = random_phase
        self.rest_after_success = rest_after_success
        self._goals = None if goals_seed is None else [task.benchmark_vectors(goals_seed) for task in tasks]
        self._share_ends: Array | None = None
        self._first_slot = first_slot
        self.seed(seed)

        # Physics that blows up is counted in `Step.unstable`; MuJoCo would also append it to a file in the current
        # folder.
        mujoco.set_mju_user_warning(_ignore_warning)
        self._model = load_model()
        self._data = mujoco.MjData(self._model)
        self.state_signature = sum(int(getattr(mujoco.mjtState, f"mjSTATE_{part}")) for part in _STATE_PARTS)
        """What a row of ``state`` holds, for ``mujoco.mj_setState`` and ``mj_getState``."""
        self._settled = self._settle()

        self.state = np.tile(self._settled, (n, 1))
        """[n, 56] the integration state of every slot."""
        self.elapsed = np.zeros(n, dtype=np.int64)
        """[n] steps taken in the current episode."""
        self.observation = np.zeros((n, OBSERVATION_SIZE))
        """[n, 39] the latest observations."""
        self._previous = np.zeros((n, 18))  # the frame before, not clipped
        self._fresh = np.ones(n, dtype=bool)  # never reset so far
        self._resting = np.zeros(n, dtype=bool)
        self._init_obj = np.zeros((n, 3))
        self._goal = np.zeros((n, 3))
        self._xpos = np.zeros((n, self._model.nbody, 3))
        self._site_xpos = np.zeros((n, self._model.nsite, 3))
        self._obj_xmat = np.zeros((n, 3, 3))
        low, high = np.array([t.goal_low for t in tasks]), np.array([t.goal_high for t in tasks])
        self._goal_low, self._goal_high = low, high

    def seed(self, seed: int) -> None:
        """Restart every slot's random stream."""
        self._rngs = [np.random.default_rng((seed, self._first_slot + i)) for i in range(len(self.task_idx))]

    def snapshot(self) -> dict[str, NDArray]:
        """A copy of all that the slots go on from, random streams included: arrays of ``n`` rows."""
        arrays = {name.lstrip("_"): getattr(self, name).copy() for name in _SLOT_ARRAYS}
        return arrays | {"rng": np.stack([_rng_to_row(rng) for rng in self._rngs])}

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        """Go on from a `snapshot`, to the last bit, also one that another `SawyerSim` of the same settings has taken.

        MuJoCo's part of it is set before each slot's turn as ever, so that nothing has to be computed anew.
        """
        for name in _SLOT_ARRAYS:
            getattr(self, name)[:] = snapshot[name.lstrip("_")]
        for rng, row in zip(self._rngs, snapshot["rng"], strict=True):
            _row_to_rng(row, rng)

    def _settle(self) -> Array:
        """Simulate Meta-World's hand reset once, and note where it ends and where everything is named in the model."""
        model, data = self._model, self._data
        sizes = [mujoco.mj_stateSize(model, int(getattr(mujoco.mjtState, f"mjSTATE_{part}"))) for part in _STATE_PARTS]
        ends = np.cumsum(sizes)
        slices = {part: slice(end - size, end) for part, size, end in zip(_STATE_PARTS, sizes, ends, strict=True)}
        self._time, self._ctrl, self._mocap = slices["TIME"], slices["CTRL"], slices["MOCAP_POS"]
        joint = model.joint("objjoint")
        qpos, qvel = slices["QPOS"].start + joint.qposadr[0], slices["QVEL"].start + joint.dofadr[0]
        self._obj_qpos, self._obj_qvel = slice(qpos, qpos + 3), slice(qvel, qvel + 6)
        body, site = (lambda name: model.body(name).id), (lambda name: model.site(name).id)
        self._hand, self._obj = body("hand"), body("obj")
        self._claws = body("rightclaw"), body("leftclaw")
        self._pads = body("leftpad"), body("rightpad")
        self._tips = site("rightEndEffector"), site("leftEndEffector")
        self._obj_geom = model.geom("objGeom").id

        for _ in range(50):  # SawyerXYZEnv._reset_hand
            data.mocap_pos[0] = HAND_INIT_POS
            data.mocap_quat[0] = _MOCAP_QUAT
            data.ctrl[:] = (-1, 1)
            mujoco.mj_step(model, data, nstep=FRAME_SKIP)
        # Positions as the last physics step left them, as Meta-World reads them.
        self._init_tcp = data.site_xpos[list(self._tips)].mean(axis=0)
        self._resting_height = float(data.xpos[self._obj, 2])
        settled = np.empty(sum(sizes))
        mujoco.mj_getState(model, data, settled, self.state_signature)
        return settled

    def set_shares(self, shares: NDArray[np.float64] | None) -> None:
        """Draw the task of every new episode from shares [K], by its slot's random stream; None: slots keep theirs."""
        self._share_ends = None if shares is None else np.cumsum(shares)

    def reset(
        self,
        mask: NDArray[np.bool_] | None = None,
        *,
        task_idx: NDArray[np.int64] | None = None,
        vectors: Array | None = None,
    ) -> Array:
        """Start new episodes.

        Args:
            mask: [n] which slots; all by default.
            task_idx: [n] the task each of them takes from now on; by default see `set_shares`.
            vectors: [n, 6] object and goal positions to use instead of drawing them (Meta-World's ``rand_vec``).

        Returns:
            [n, 39] observations of all slots, those not reset unchanged.
        """
        slots = np.arange(self.num_slots) if mask is None else np.flatnonzero(mask)
        if task_idx is not None:
            self.task_idx[slots] = task_idx[slots]
        elif self._share_ends is not None:
            draws = np.array([self._rngs[slot].random() for slot in slots.tolist()])
            # Relative to the last, which may be a little less than 1.
            self.task_idx[slots] = np.searchsorted(self._share_ends, draws * self._share_ends[-1], side="right")
        for slot in slots.tolist():
            self._start_episode(slot, None if vectors is None else vectors[slot])
        if len(slots):
            frame = self._frame(slots)
            self._previous[slots] = frame
            # Meta-World stacks the first frame onto itself and, unlike later ones, does not clip it.
            self.observation[slots] = np.concatenate([frame, frame, self._goal[slots]], axis=1)
        return self.observation.copy()

    def _start_episode(self, slot: int, vector: Array | None) -> None:
        task, rng, state = self.tasks[self.task_idx[slot]], self._rngs[slot], self.state[slot]
        if vector is None:
            goals = self._goals
            vector = task.sample(rng) if goals is None else goals[self.task_idx[slot]][rng.integers(len(goals[0]))]
        obj, goal = vector[:3].copy(), vector[3:].copy()
        if task.on_table:
            obj[2] = goal[2] = self._resting_height
        self._init_obj[slot], self._goal[slot] = obj, goal
        # A phase only shortens the very first episode; afterwards the slots stay spread.
        phased = self.random_phase and self._fresh[slot]
        self.elapsed[slot] = rng.integers(self.max_episode_steps) if phased else 0
        self._fresh[slot] = self._resting[slot] = False
        state[:] = self._settled
        state[self._obj_qpos], state[self._obj_qvel] = obj, 0.0
        model, data = self._model, self._data
        mujoco.mj_setState(model, data, state, self.state_signature)
        mujoco.mj_forward(model, data)
        mujoco.mj_getState(model, data, state, self.state_signature)
        self._xpos[slot], self._site_xpos[slot] = data.xpos, data.site_xpos
        self._obj_xmat[slot] = data.geom_xmat[self._obj_geom].reshape(3, 3)

    def step(self, action: NDArray[np.float32]) -> Step:
        """Advance every slot by one environment step (12.5 ms of simulated time).

        A slot whose physics becomes unstable (MuJoCo resets it, or a number is not finite) is put back to where it was
        and truncated, with its last good observation and zero reward; it runs on only after a reset.

        Args:
            action: [n, 4] float32, hand velocity in xyz and gripper effort; clipped to [-1, 1].
        """
        before = self.state.copy()
        self._simulate(action)
        # MuJoCo resets a simulation that it finds broken, clock included.
        time_error = self.state[:, self._time] - before[:, self._time] - FRAME_SKIP * self._model.opt.timestep
        unstable = (np.abs(time_error[:, 0]) > 1e-6) & ~self._resting | ~np.isfinite(self.state).all(axis=1)

        if unstable.any():
            self.state[unstable] = before[unstable]
            self._obj_xmat[unstable] = np.eye(3)  # something to convert: these rows are not used
        frame = self._frame()
        observation = self._stack(frame)
        observation[unstable], frame[unstable] = self.observation[unstable], self._previous[unstable]
        reward, success = self._reward(observation, action)
        reward[unstable], success[unstable] = 0.0, False
        if self.rest_after_success:
            self._resting |= success
        self.observation, self._previous = observation, frame
        self.elapsed += 1
        truncated = (self.elapsed >= self.max_episode_steps) | unstable
        return Step(observation.copy(), reward, success, truncated, unstable)

    def _simulate(self, action: NDArray[np.float32]) -> None:
        """The physics of all slots: what the rest of this package exists to keep fed."""
        state = self.state
        # In float32 up to the sum, like Meta-World; `ctrl` takes the raw value and MuJoCo clamps it.
        delta = np.clip(action[:, :3], -1, 1) * _ACTION_SCALE
        state[:, self._mocap] = np.clip(state[:, self._mocap] + delta, _MOCAP_LOW, _MOCAP_HIGH)
        state[:, self._ctrl] = np.stack([action[:, 3], -action[:, 3]], axis=1)

        # Everything the loop touches is local: at 100 us a slot, attribute look-ups are worth avoiding.
        model, data, signature = self._model, self._data, self.state_signature
        set_state, get_state, mj_step, mj_forward = (
            mujoco.mj_setState,
            mujoco.mj_getState,
            mujoco.mj_step,
            mujoco.mj_forward,
        )
        xpos, site_xpos, obj_xmat = data.xpos, data.site_xpos, data.geom_xmat[self._obj_geom].reshape(3, 3)
        slots = zip(state, self._xpos, self._site_xpos, self._obj_xmat, strict=True)
        for row, bodies, sites, xmat in compress(slots, (~self._resting).tolist()):
            set_state(model, data, row, signature)
            mj_step(model, data, FRAME_SKIP)
            # Meta-World does this too, and it is not idle: it moves the solver's warm start.
            mj_forward(model, data)
            get_state(model, data, row, signature)
            bodies[:] = xpos
            sites[:] = site_xpos
            xmat[:] = obj_xmat

    def _frame(self, slots: NDArray[np.intp] | slice = slice(None)) -> Array:
        """One frame of the observation: hand, finger distance, object, padding. [n, 18].

        Source: ``SawyerXYZEnv._get_curr_obs_combined_no_goal``.
        """
        xpos = self._xpos[slots]
        frame = np.zeros((len(xpos), 18))
        frame[:, :3] = xpos[:, self._hand]
        right, left = self._claws
        frame[:, 3] = np.clip(distance(xpos[:, right], xpos[:, left]) / 0.1, 0.0, 1.0)
        frame[:, 4:7] = xpos[:, self._obj]
        frame[:, 7:11] = Rotation.from_matrix(self._obj_xmat[slots]).as_quat()
        return frame

    def _stack(self, frame: Array) -> Array:
        """This frame, the one before and the goal, clipped to the *goal-observable* observation space. [n, 39]."""
        goal = np.clip(self._goal, self._goal_low[self.task_idx], self._goal_high[self.task_idx])
        observation = np.concatenate([frame, self._previous, goal], axis=1)
        for hand in (observation[:, 0:3], observation[:, 18:21]):
            np.clip(hand, _HAND_LOW, _HAND_HIGH, out=hand)
        return observation

    def _reward(self, observation: Array, action: NDArray[np.float32]) -> tuple[Array, NDArray[np.bool_]]:
        left_pad, right_pad = self._pads
        inputs = RewardInputs(
            tcp=(self._site_xpos[:, self._tips[0]] + self._site_xpos[:, self._tips[1]]) / 2,
            obj=observation[:, 4:7],
            gripper_open=observation[:, 3],
            left_pad_y=self._xpos[:, left_pad, 1],
            right_pad_y=self._xpos[:, right_pad, 1],
            grip=action[:, 3],
            init_obj=self._init_obj,
            goal=self._goal,
            init_tcp=self._init_tcp,
        )
        reward, success = np.zeros(self.num_slots), np.zeros(self.num_slots, dtype=bool)
        for index, task in enumerate(self.tasks):
            rows = np.flatnonzero(self.task_idx == index)
            if len(rows):
                reward[rows], success[rows] = task.reward(inputs.rows(rows))
        return reward, success


def _rng_to_row(rng: np.random.Generator) -> NDArray[np.int64]:
    """The state of NumPy's PCG64 as 64-bit numbers: two of 128 bits each, and half of the last draw."""
    state = rng.bit_generator.state
    words = [word for number in state["state"].values() for word in (number >> 64, number & _LOW_64_BITS)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], dtype=np.uint64).view(np.int64)


def _row_to_rng(row: NDArray[np.int64], rng: np.random.Generator) -> None:
    state_high, state_low, inc_high, inc_low, has_uint32, uinteger = row.view(np.uint64).tolist()
    numbers = {"state": state_high << 64 | state_low, "inc": inc_high << 64 | inc_low}
    state = {"bit_generator": "PCG64", "state": numbers, "has_uint32": has_uint32, "uinteger": uinteger}
    rng.bit_generator.state = state


def _ignore_warning(_message: str) -> None:
    pass
