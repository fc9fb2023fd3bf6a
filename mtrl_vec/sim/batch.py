"""`SimBatch`: many Meta-World simulations stepped as one batch, bit for bit as Meta-World does. NumPy in and out.

A slot is a simulation of one task at a time. It can take any other task at its next reset, also one of another physics
model. Slots of a model take their turns in its `World`, one after the other.

Shapes: ``n`` slots, ``K`` tasks, ``V`` numbers in a drawn vector. All lengths in metres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from mtrl_vec.sim import scoring
from mtrl_vec.sim.models import Models, Plan
from mtrl_vec.sim.readings import Readings
from mtrl_vec.sim.saved_starts import SavedStart, SavedStarts, pools
from mtrl_vec.sim.streams import row_to_stream, slot_streams, stream_to_row
from mtrl_vec.sim.world import STEP_SECONDS, Turn, World
from mtrl_vec.tasks.layout import FRAME_SIZE, OBSERVATION_SIZE
from mtrl_vec.tasks.suite import fixed_vectors
from mtrl_vec.tasks.task import MAX_EPISODE_STEPS, Array, Task

_ACTION_SCALE = np.float32(1 / 100)
_SLOT_ARRAYS = (
    *("task_idx", "state", "elapsed", "observation", "_previous_frame", "_fresh", "_resting"),
    *("_kept", "_fixture", "_touching"),
)
"""Of a `SimBatch`, with a row per slot: with `Readings.raw` and the random streams, everything it continues from."""


class Step(NamedTuple):
    """What one step of the batch returned."""

    observation: Array  # [n, 39]
    reward: Array  # [n]
    success: NDArray[np.bool_]  # [n] at this very step
    truncated: NDArray[np.bool_]  # [n] the time limit, or unstable physics
    unstable: NDArray[np.bool_]  # [n] unstable physics


class SimBatch:
    """``n`` slots, each a simulation of any of the tasks.

    Args:
        tasks: the tasks that slots can take. Tasks with the same model file share one `World`.
        task_idx: [n] the task of each slot, as a position in ``tasks``.
        seed, first_slot: of all random streams; global number of row 0.
        goals_seed: None draws a fresh vector (object and goal) at every reset, but see ``fresh_starts``. A number draws
            uniformly from the 50 fixed ones of Meta-World's benchmark, see `mtrl_vec.tasks.suite.fixed_vectors`.
        max_episode_steps: the time limit, in environment steps.
        random_phase: start every slot's first episode at a random count of elapsed steps, so that resets are spread
            evenly over time instead of hitting all slots at once.
        rest_after_success: once an episode has succeeded, its slot is not simulated until its next reset. For
            evaluations, which only ask whether an episode succeeds.
        fresh_starts: in the ten tasks whose settling depends on the draw, draw anew at every reset and settle then,
            3 to 6 ms each, instead of drawing from 500 vectors whose starts are simulated once per process.

    Raises:
        InputError: a task's model lacks what the task reads.
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
        fresh_starts: bool = False,
    ) -> None:
        self.tasks = tuple(tasks)
        self.task_idx = np.array(task_idx, dtype=np.int64)
        self.num_slots, self.max_episode_steps = len(self.task_idx), max_episode_steps
        self.random_phase, self.rest_after_success, self.fresh_starts = random_phase, rest_after_success, fresh_starts
        self._fixed = None if goals_seed is None else fixed_vectors(tasks, goals_seed)
        self._cumulative_probs: Array | None = None
        self._first_slot = first_slot
        self.seed(seed)
        self._models = Models(self.tasks)
        self.worlds = self._models.worlds
        """One for each model file, and for each body of it that tasks move."""
        self._allocate()

    def _allocate(self) -> None:
        """Make the rows of all slots."""
        n = self.num_slots
        self.state = np.zeros((n, max(world.state_size for world in self.worlds)))
        """[n, S] the integration state of every slot, padded."""
        self.elapsed = np.zeros(n, dtype=np.int64)
        """[n] steps taken in the current episode."""
        self.observation = np.zeros((n, OBSERVATION_SIZE))
        """[n, 39]"""
        self._previous_frame = np.zeros((n, FRAME_SIZE))  # not clipped
        self._resting = np.zeros(n, dtype=bool)
        self._kept = np.zeros((n, scoring.NUM_KEPT))  # of the start of each episode
        self._fixture = np.zeros((n, 3))
        self._touching = np.zeros(n, dtype=bool)
        self._readings = Readings(self.tasks, [scene.world for scene in self._models.scenes], n)
        self._scorer = scoring.Scorer(self.tasks)
        self._turns = [self._turn(slot) for slot in range(n)]
        self._plan: Plan | None = None

    def seed(self, seed: int) -> None:
        """Restart every slot's random stream; its next episode counts as the first one."""
        self._rngs = slot_streams(seed, self._first_slot, self.num_slots)
        self._fresh = np.ones(self.num_slots, dtype=bool)  # never reset so far
        self._starts = SavedStarts()  # of the vectors below
        fresh: list[Array | None] = [None] * len(self.tasks)
        self._vectors = self._fixed or (fresh if self.fresh_starts else pools(self.tasks, seed))  # to draw from

    def snapshot(self) -> dict[str, NDArray]:
        """A copy of everything that the slots continue from, random streams included: arrays of ``n`` rows."""
        arrays = {name.lstrip("_"): getattr(self, name).copy() for name in _SLOT_ARRAYS}
        rng = np.array([stream_to_row(rng) for rng in self._rngs], dtype=np.int64).reshape(self.num_slots, -1)
        return arrays | {"raw": self._readings.raw.copy(), "rng": rng}

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        """Continue from a `snapshot`, to the last bit, also from one of another `SimBatch` with the same settings.

        MuJoCo's part of it is set before each slot's turn as ever, so that nothing has to be computed anew.
        """
        for name in _SLOT_ARRAYS:
            getattr(self, name)[:] = snapshot[name.lstrip("_")]
        self._readings.raw[:] = snapshot["raw"]
        for rng, row in zip(self._rngs, snapshot["rng"], strict=True):
            row_to_stream(row, rng)
        self._turns = [self._turn(slot) for slot in range(self.num_slots)]
        self._plan = None

    def view(self, slot: int) -> tuple[World, Array, Array, Array]:
        """What there is to draw of a slot: its world, its state [S], where the world's fixture is [3], its goal [3]."""
        world = self._models.scenes[self.task_idx[slot]].world
        return world, self.state[slot, : world.state_size], self._fixture[slot], self._kept[slot, scoring.GOAL]

    def set_task_probs(self, task_probs: NDArray[np.float64] | None) -> None:
        """Draw the task of every new episode with these probabilities [K]; None: slots keep their tasks.

        Each slot draws from its own random stream.
        """
        self._cumulative_probs = None if task_probs is None else np.cumsum(task_probs)

    def reset(
        self,
        mask: NDArray[np.bool_] | None = None,
        *,
        task_idx: NDArray[np.int64] | None = None,
        vectors: Sequence[Array] | Array | None = None,
    ) -> Array:
        """Start new episodes.

        Args:
            mask: [n] which slots; all by default.
            task_idx: [n] the task each of them takes; by default see `set_task_probs`.
            vectors: [n] of [V], to use instead of drawing them (Meta-World's ``rand_vec``).

        Returns:
            [n, 39] observations of all slots; those not reset are unchanged.
        """
        slots = np.arange(self.num_slots) if mask is None else np.flatnonzero(mask)
        before = self.task_idx[slots]
        if task_idx is not None:
            self.task_idx[slots] = task_idx[slots]
        elif self._cumulative_probs is not None:
            draws = np.array([self._rngs[slot].random() for slot in slots.tolist()])
            ends = self._cumulative_probs  # relative to the last, which may be a little less than 1
            self.task_idx[slots] = np.searchsorted(ends, draws * ends[-1], side="right")
        for slot in slots[before != self.task_idx[slots]].tolist():
            self._turns[slot] = self._turn(slot)
            self._plan = None
        for slot in slots.tolist():
            self._start_episode(slot, None if vectors is None else vectors[slot])
        if len(slots):
            selection = self._readings.select(slots, self.task_idx[slots], self.state.shape[1])
            _, _, frame = self._readings.read(selection, self.state)
            self._previous_frame[slots] = frame
            # Meta-World stacks the first frame onto itself and, unlike later ones, does not clip it.
            self.observation[slots] = np.concatenate([frame, frame, self._kept[slots, scoring.GOAL]], axis=1)
        return self.observation.copy()

    def _start_episode(self, slot: int, vector: Array | None) -> None:
        k, rng = int(self.task_idx[slot]), self._rngs[slot]
        vectors = self._vectors[k]
        saves = self.tasks[k].settles and vectors is not None and vector is None
        if vector is None:
            vector = self.tasks[k].draw.sample(rng) if vectors is None else vectors[rng.integers(len(vectors))]
        phased = self.random_phase and self._fresh[slot]  # it shortens the first episode; slots stay spread afterwards
        self.elapsed[slot] = rng.integers(self.max_episode_steps) if phased else 0
        self._fresh[slot] = self._resting[slot] = self._touching[slot] = False
        rows = self.state[slot], self._readings.raw[slot], self._kept[slot], self._fixture[slot]
        if self.tasks[k].settles and (saved := self._starts.get(k, vector)) is not None:
            for row, value in zip(rows, saved, strict=True):
                row[:] = value
            return
        self._simulate_start(slot, k, vector)
        if saves:
            self._starts.add(k, vector, SavedStart(*rows))

    def _simulate_start(self, slot: int, k: int, vector: Array) -> None:
        scene, turn, kept = self._models.scenes[k], self._turns[slot], self._kept[slot]
        world = scene.world
        start = scene.begin(vector)
        kept[scoring.GOAL], kept[scoring.INIT_OBJ], kept[scoring.INIT_TCP] = start.goal, start.obj, scene.init_tcp
        kept[scoring.INIT_SECOND] = 0.0 if start.second is None else start.second
        kept[scoring.FIRST_OBJ] = np.nan
        self._fixture[slot] = 0.0 if world.fixture is None else world.fixture
        self.state[slot, world.state_size :] = 0.0
        mujoco.mj_getState(world.model, world.data, turn.state, world.state_signature)
        self._readings.prepare(slot, k)
        for target, source in turn.copies:
            target[:] = source

    def step(self, action: NDArray[np.float32]) -> Step:
        """Advance every slot by one environment step (12.5 ms of simulated time).

        A slot whose physics becomes unstable (MuJoCo resets it, or a number is not finite) is put back to where it was
        and truncated, with its last good observation and zero reward; it needs a reset to continue.

        Args:
            action: [n, 4] float32, hand velocity in xyz and gripper effort; clipped to [-1, 1].
        """
        plan = self._plan = self._plan or self._make_plan()
        before = self.state.copy()
        self._simulate(plan, action)
        # MuJoCo resets a simulation that it finds broken, clock included. Rows of all worlds start with the clock.
        time_error = self.state[:, 0] - before[:, 0] - STEP_SECONDS
        unstable = (np.abs(time_error) > 1e-6) & ~self._resting | ~np.isfinite(self.state).all(axis=1)
        if unstable.any():
            self.state[unstable] = before[unstable]
            self._readings.make_harmless(unstable)

        frame, reward, success = self._observe(plan, action)
        observation = self._stack(plan, frame)
        observation[unstable], frame[unstable] = self.observation[unstable], self._previous_frame[unstable]
        reward[unstable], success[unstable] = 0.0, False
        if self.rest_after_success:
            self._resting |= success
        self.observation, self._previous_frame = observation, frame
        self.elapsed += 1
        truncated = (self.elapsed >= self.max_episode_steps) | unstable
        return Step(observation.copy(), reward, success, truncated, unstable)

    def _simulate(self, plan: Plan, action: NDArray[np.float32]) -> None:
        """Write actions [n, 4] as ``SawyerXYZEnv.set_xyz_action`` would, and let every slot have its turn.

        In float32 up to the sum, like Meta-World; ``ctrl`` takes the raw value and MuJoCo clamps it.
        """
        flat = self.state.reshape(-1)
        delta = np.clip(action[:, :3], -1, 1) * _ACTION_SCALE
        flat[plan.mocap] = np.clip(flat[plan.mocap] + delta, plan.mocap_low, plan.mocap_high)
        flat[plan.ctrl] = np.stack([action[:, 3], -action[:, 3]], axis=1)
        for world, slots, turns in plan.turns:
            world.step(compress(turns, (~self._resting[slots]).tolist()))

    def _observe(self, plan: Plan, action: NDArray[np.float32]) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Frames [n, 18], rewards [n] and successes [n] after a step."""
        slots = plan.order.slots
        read, joint, ordered = self._readings.read(plan.selection, self.state)
        frame, reward, success = np.empty_like(ordered), np.empty(len(slots)), np.empty(len(slots), dtype=bool)
        frame[slots] = ordered
        first = np.isnan(self._kept[:, scoring.FIRST_OBJ.start])
        if first.any():
            self._kept[first, scoring.FIRST_OBJ] = frame[first, 4:7]
        kept, grip = self._kept[slots], action[slots, 3]
        scores = self._scorer.score(plan.order, read, joint, ordered, self._touching[slots], kept, grip)
        reward[slots], success[slots] = scores
        return frame, reward, success

    def _turn(self, slot: int) -> Turn:
        k = self.task_idx[slot]
        world, touch = self._models.scenes[k].world, self._models.touch[k]
        return Turn(
            self.state[slot, : world.state_size],
            None if world.fixture is None else self._fixture[slot],
            self._readings.copies(slot, k),
            self._touching[slot : slot + 1] if touch >= 0 else None,
            touch,
        )

    def _make_plan(self) -> Plan:
        order = self._scorer.order(self.task_idx)
        selection = self._readings.select(order.slots, order.task_idx, self.state.shape[1])
        return self._models.plan(self.task_idx, order, selection, self.state.shape[1], self._turns)

    def _stack(self, plan: Plan, frame: Array) -> Array:
        """This frame, the one before and the goal, clipped to the *goal-observable* observation space. [n, 39]."""
        goal = np.minimum(np.maximum(self._kept[:, scoring.GOAL], plan.goal_low), plan.goal_high)
        observation = np.concatenate([frame, self._previous_frame, goal], axis=1)
        for hand in (observation[:, 0:3], observation[:, FRAME_SIZE : FRAME_SIZE + 3]):
            np.minimum(np.maximum(hand, scoring.OBSERVED_HAND_LOW), scoring.OBSERVED_HAND_HIGH, out=hand)
        return observation
