"""`SimBatch`: many Meta-World simulations stepped as one batch, bit for bit as Meta-World does. NumPy in and out.

A slot is a simulation of one task at a time. It can take any other task at its next reset. A reset restores the state
in which Meta-World's 250 settling steps always end, instead of simulating them.

Shapes: ``n`` slots, ``K`` tasks. All lengths in metres.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from mtrl_vec.sim.streams import row_to_stream, slot_streams, stream_to_row
from mtrl_vec.sim.world import Turn, World
from mtrl_vec.tasks.layout import FRAME_SIZE, METAWORLD
from mtrl_vec.tasks.rewards import distance
from mtrl_vec.tasks.task import MAX_EPISODE_STEPS, Array, RewardInputs, Task

_HAND_LOW, _HAND_HIGH = np.array([-0.525, 0.348, -0.0525]), np.array([0.525, 1.025, 0.7])

_SLOT_ARRAYS = (
    *("task_idx", "state", "elapsed", "observation", "_previous_frame", "_fresh", "_resting", "_init_obj", "_goal"),
    *("_xpos", "_site_xpos", "_obj_xmat"),
)
"""Of a `SimBatch`, with a row per slot: together with the random streams, everything it continues from."""


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
        seed: of all random streams.
        first_slot: global number of row 0.
        goals_seed: None draws a fresh object and goal at every reset. A number draws uniformly from the 50 fixed ones
            of ``metaworld.MT1(task, seed=goals_seed)``.
        max_episode_steps: the time limit, in environment steps.
        random_phase: start every slot's first episode at a random count of elapsed steps, so that resets are spread
            evenly over time instead of hitting all slots at once.
        rest_after_success: once an episode has succeeded, its slot is not simulated until its next reset. For
            evaluations, which only ask whether an episode succeeds.
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
        self.num_slots = len(self.task_idx)
        self.max_episode_steps = max_episode_steps
        self.random_phase = random_phase
        self.rest_after_success = rest_after_success
        self._goals = None if goals_seed is None else [task.draw.benchmark_vectors(goals_seed) for task in tasks]
        self._cumulative_probs: Array | None = None
        self._first_slot = first_slot
        self.seed(seed)

        self._build_worlds()
        self._allocate()

    def _build_worlds(self) -> None:
        """Compile the models of the tasks, and note where everything is found in them."""
        tasks = self.tasks
        files = list(dict.fromkeys(task.model_file for task in tasks))
        self.worlds = [World(file) for file in files]
        assert len({world.step_seconds for world in self.worlds}) == 1  # one clock error tells all unstable slots
        self._world_idx = np.array([files.index(task.model_file) for task in tasks])  # [K]
        own = [self.worlds[w] for w in self._world_idx]  # of each task
        self._objects = [world.object_handle(task) for world, task in zip(own, tasks, strict=True)]
        self._resting_heights = [world.resting_height(task) for world, task in zip(own, tasks, strict=True)]
        # What is read of each task's simulations: hand, claws and pads, then the object [K, 6]; the finger tips [K, 2].
        bodies = [[*world.bodies, handle.body] for world, handle in zip(own, self._objects, strict=True)]
        self._bodies, self._tips = np.array(bodies), np.array([world.tips for world in own])
        self._init_tcp = np.array([world.init_tcp for world in own])  # [K, 3]
        self._goal_low, self._goal_high = np.array([t.goal_low for t in tasks]), np.array([t.goal_high for t in tasks])

    def _allocate(self) -> None:
        """Make the rows of all slots."""
        n = self.num_slots
        self.state = np.zeros((n, max(world.state_size for world in self.worlds)))
        """[n, S] the integration state of every slot; rows of smaller worlds are padded."""
        self.elapsed = np.zeros(n, dtype=np.int64)
        """[n] steps taken in the current episode."""
        self.observation = np.zeros((n, METAWORLD.size))
        """[n, 39] the latest observations."""
        self._previous_frame = np.zeros((n, FRAME_SIZE))  # not clipped
        self._fresh = np.ones(n, dtype=bool)  # never reset so far
        self._resting = np.zeros(n, dtype=bool)
        self._init_obj = np.zeros((n, 3))
        self._goal = np.zeros((n, 3))
        self._xpos = np.zeros((n, max(world.model.nbody for world in self.worlds), 3))
        self._site_xpos = np.zeros((n, max(world.model.nsite for world in self.worlds), 3))
        self._obj_xmat = np.zeros((n, 3, 3))
        self._turns: list[list[Turn]] | None = None  # of the slots of each world
        self._slots = [np.empty(0, dtype=np.intp)] * len(self.worlds)  # of each world
        for world, slots in self._by_world(np.arange(n)):
            self.state[slots, : world.state_size] = world.settled

    def seed(self, seed: int) -> None:
        """Restart every slot's random stream."""
        self._rngs = slot_streams(seed, self._first_slot, self.num_slots)

    def snapshot(self) -> dict[str, NDArray]:
        """A copy of everything that the slots continue from, random streams included: arrays of ``n`` rows."""
        arrays = {name.lstrip("_"): getattr(self, name).copy() for name in _SLOT_ARRAYS}
        rows = [stream_to_row(rng) for rng in self._rngs]
        return arrays | {"rng": np.array(rows, dtype=np.int64).reshape(self.num_slots, -1)}

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        """Continue from a `snapshot`, to the last bit, also from one of another `SimBatch` with the same settings.

        MuJoCo's part of it is set before each slot's turn as ever, so that nothing has to be computed anew.
        """
        for name in _SLOT_ARRAYS:
            getattr(self, name)[:] = snapshot[name.lstrip("_")]
        for rng, row in zip(self._rngs, snapshot["rng"], strict=True):
            row_to_stream(row, rng)
        self._turns = None

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
        vectors: Array | None = None,
    ) -> Array:
        """Start new episodes.

        Args:
            mask: [n] which slots; all by default.
            task_idx: [n] the task each of them takes; by default see `set_task_probs`.
            vectors: [n, 6] object and goal positions to use instead of drawing them (Meta-World's ``rand_vec``).

        Returns:
            [n, 39] observations of all slots; those not reset are unchanged.
        """
        slots = np.arange(self.num_slots) if mask is None else np.flatnonzero(mask)
        before = self.task_idx[slots]
        if task_idx is not None:
            self.task_idx[slots] = task_idx[slots]
        elif self._cumulative_probs is not None:
            draws = np.array([self._rngs[slot].random() for slot in slots.tolist()])
            # Relative to the last, which may be a little less than 1.
            ends = self._cumulative_probs
            self.task_idx[slots] = np.searchsorted(ends, draws * ends[-1], side="right")
        if not np.array_equal(before, self.task_idx[slots]):
            self._turns = None
        for slot in slots.tolist():
            self._start_episode(slot, None if vectors is None else vectors[slot])
        if len(slots):
            frame = self._frame(slots)
            self._previous_frame[slots] = frame
            # Meta-World stacks the first frame onto itself and, unlike later ones, does not clip it.
            self.observation[slots] = np.concatenate([frame, frame, self._goal[slots]], axis=1)
        return self.observation.copy()

    def _start_episode(self, slot: int, vector: Array | None) -> None:
        k, rng, state = self.task_idx[slot], self._rngs[slot], self.state[slot]
        task, world, handle = self.tasks[k], self.worlds[self._world_idx[k]], self._objects[k]
        if vector is None:
            goals = self._goals
            vector = task.draw.sample(rng) if goals is None else goals[k][rng.integers(len(goals[k]))]
        self._init_obj[slot], self._goal[slot] = task.place(vector, self._resting_heights[k])
        phased = self.random_phase and self._fresh[slot]  # it shortens the first episode; slots stay spread afterwards
        self.elapsed[slot] = rng.integers(self.max_episode_steps) if phased else 0
        self._fresh[slot] = self._resting[slot] = False
        state[: world.state_size] = world.settled
        state[handle.qpos], state[handle.qvel] = self._init_obj[slot], 0.0
        world.forward(self._turn(slot))

    def step(self, action: NDArray[np.float32]) -> Step:
        """Advance every slot by one environment step (12.5 ms of simulated time).

        A slot whose physics becomes unstable (MuJoCo resets it, or a number is not finite) is put back to where it was
        and truncated, with its last good observation and zero reward; it needs a reset to continue.

        Args:
            action: [n, 4] float32, hand velocity in xyz and gripper effort; clipped to [-1, 1].
        """
        before = self.state.copy()
        self._simulate(action)
        # MuJoCo resets a simulation that it finds broken, clock included. All worlds keep their clock first.
        clock = self.worlds[0].time
        time_error = self.state[:, clock] - before[:, clock] - self.worlds[0].step_seconds
        unstable = (np.abs(time_error[:, 0]) > 1e-6) & ~self._resting | ~np.isfinite(self.state).all(axis=1)

        if unstable.any():
            self.state[unstable] = before[unstable]
            self._obj_xmat[unstable] = np.eye(3)  # something to convert: these rows are not used
        frame = self._frame(np.arange(self.num_slots))
        observation = self._stack(frame)
        observation[unstable], frame[unstable] = self.observation[unstable], self._previous_frame[unstable]
        reward, success = self._reward(observation, action)
        reward[unstable], success[unstable] = 0.0, False
        if self.rest_after_success:
            self._resting |= success
        self.observation, self._previous_frame = observation, frame
        self.elapsed += 1
        truncated = (self.elapsed >= self.max_episode_steps) | unstable
        return Step(observation.copy(), reward, success, truncated, unstable)

    def _simulate(self, action: NDArray[np.float32]) -> None:
        if self._turns is None:
            self._slots = [np.empty(0, dtype=np.intp)] * len(self.worlds)
            self._turns = [[] for _ in self.worlds]
            for world, slots in self._by_world(np.arange(self.num_slots)):
                w = self.worlds.index(world)
                self._slots[w], self._turns[w] = slots, [self._turn(slot) for slot in slots.tolist()]
        for world, slots, turns in zip(self.worlds, self._slots, self._turns, strict=True):
            world.control(self.state, slots, action[slots])
            world.step(compress(turns, (~self._resting[slots]).tolist()))

    def _by_world(self, slots: NDArray[np.intp]) -> Iterator[tuple[World, NDArray[np.intp]]]:
        """Slots grouped by the world that their tasks live in."""
        worlds = self._world_idx[self.task_idx[slots]]
        for w in np.unique(worlds):
            yield self.worlds[w], slots[worlds == w]

    def _turn(self, slot: int) -> Turn:
        k = self.task_idx[slot]
        world = self.worlds[self._world_idx[k]]
        bodies, sites = self._xpos[slot, : world.model.nbody], self._site_xpos[slot, : world.model.nsite]
        state = self.state[slot, : world.state_size]
        return Turn(state, bodies, sites, self._obj_xmat[slot], self._objects[k].xmat)

    def _frame(self, slots: NDArray[np.intp]) -> Array:
        """One frame of the observation: hand, finger distance, object, padding. [len(slots), 18].

        Source: ``SawyerXYZEnv._get_curr_obs_combined_no_goal``.
        """
        hand, right, left, _, _, obj = self._bodies[self.task_idx[slots]].T
        frame = np.zeros((len(slots), FRAME_SIZE))
        frame[:, :3] = self._xpos[slots, hand]
        frame[:, 3] = np.clip(distance(self._xpos[slots, right], self._xpos[slots, left]) / 0.1, 0.0, 1.0)
        frame[:, 4:7] = self._xpos[slots, obj]
        frame[:, 7:11] = Rotation.from_matrix(self._obj_xmat[slots]).as_quat()
        return frame

    def _stack(self, frame: Array) -> Array:
        """This frame, the one before and the goal, clipped to the *goal-observable* observation space. [n, 39]."""
        goal = np.clip(self._goal, self._goal_low[self.task_idx], self._goal_high[self.task_idx])
        observation = np.concatenate([frame, self._previous_frame, goal], axis=1)
        for hand in (observation[:, 0:3], observation[:, FRAME_SIZE : FRAME_SIZE + 3]):
            np.clip(hand, _HAND_LOW, _HAND_HIGH, out=hand)
        return observation

    def _reward(self, observation: Array, action: NDArray[np.float32]) -> tuple[Array, NDArray[np.bool_]]:
        slots = np.arange(self.num_slots)
        _, _, _, left_pad, right_pad, _ = self._bodies[self.task_idx].T
        right_tip, left_tip = self._tips[self.task_idx].T
        inputs = RewardInputs(
            tcp=(self._site_xpos[slots, right_tip] + self._site_xpos[slots, left_tip]) / 2,
            obj=observation[:, METAWORLD.object],
            gripper_open=observation[:, 3],
            left_pad_y=self._xpos[slots, left_pad, 1],
            right_pad_y=self._xpos[slots, right_pad, 1],
            grip=action[:, 3],
            init_obj=self._init_obj,
            goal=self._goal,
            init_tcp=self._init_tcp[self.task_idx],
        )
        reward, success = np.zeros(self.num_slots), np.zeros(self.num_slots, dtype=bool)
        for k, task in enumerate(self.tasks):
            rows = np.flatnonzero(self.task_idx == k)
            if len(rows):
                reward[rows], success[rows] = task.reward(inputs.rows(rows))
        return reward, success
