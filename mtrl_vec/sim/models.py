"""`Models`: the worlds of a list of tasks, and what a step needs to know of the tasks that slots have.

Shapes: ``n`` slots, ``K`` tasks. All lengths in metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError
from mtrl_vec.sim.readings import Selection
from mtrl_vec.sim.scene import Scene
from mtrl_vec.sim.scoring import Order
from mtrl_vec.sim.world import FRAME_SKIP, STEP_SECONDS, Turn, World
from mtrl_vec.tasks.task import Array, Task


class Plan(NamedTuple):
    """What a step needs to know of the tasks that slots have; made anew after one has changed."""

    order: Order
    selection: Selection
    mocap: NDArray[np.intp]
    """[n, 3] into the flat states."""
    ctrl: NDArray[np.intp]
    """[n, 2]"""
    mocap_low: Array
    """[n, 3]"""
    mocap_high: Array
    goal_low: Array
    goal_high: Array
    turns: list[tuple[World, NDArray[np.intp], list[Turn]]]
    """Of each world with slots: these slots, and their turns."""


class Models:
    """Compiles the models of tasks.

    Args:
        tasks: [K]

    Raises:
        InputError: see `World` and `Scene`.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.worlds: list[World] = []
        self._world_idx = np.zeros(len(tasks), dtype=np.intp)  # [K]
        for file, fixture, members in _group_by_model(tasks):
            kept = {position.name for task in members for position in task.positions if position.kind == "geom"}
            kept |= {task.orientation.name for task in members if task.orientation.kind == "geom"}
            kept |= {task.touch for task in members if task.touch is not None}
            self._world_idx[[tasks.index(task) for task in members]] = len(self.worlds)
            self.worlds.append(World(file, fixture, kept))
        for world in self.worlds:
            if world.step_seconds != STEP_SECONDS:
                problem = f"has a timestep of {world.model.opt.timestep} s: it must be {STEP_SECONDS / FRAME_SKIP}"
                raise InputError(f"model {world.model_file} {problem}")
        own = [self.worlds[w] for w in self._world_idx]  # of each task
        self.scenes = [Scene(world, task) for world, task in zip(own, tasks, strict=True)]
        """[K]"""
        self.touch = [-1 if t.touch is None else w.id("geom", t.touch) for w, t in zip(own, tasks, strict=True)]
        """[K] the geom of `Task.touch`, or -1."""
        for world, geom in zip(own, self.touch, strict=True):
            if geom >= 0:
                world.find_pads()
        self._mocap = np.array([[w.parts["MOCAP_POS"].start + i for i in range(3)] for w in own])  # [K, 3]
        self._ctrl = np.array([[w.parts["CTRL"].start + i for i in range(2)] for w in own])  # [K, 2]
        bounds = zip(*((t.mocap_low, t.mocap_high, t.goal_low, t.goal_high) for t in tasks), strict=True)
        self._bounds = np.array(list(bounds))  # [4, K, 3]

    def plan(
        self, task_idx: NDArray[np.int64], order: Order, selection: Selection, state_size: int, turns: Sequence[Turn]
    ) -> Plan:
        """Plan the steps of slots with these tasks [n], whose rows of state have ``state_size`` numbers."""
        row = np.arange(len(task_idx))[:, None] * state_size
        # Slots of one model follow each other, so that it stays in the cache: worth a quarter with 33 models.
        world_idx = self._world_idx[task_idx]
        by_world = np.argsort(world_idx, kind="stable")
        ends = np.cumsum(np.bincount(world_idx, minlength=len(self.worlds)))
        of_worlds = zip(self.worlds, np.split(by_world, ends[:-1]), strict=True)
        mocap_low, mocap_high, goal_low, goal_high = self._bounds[:, task_idx]
        return Plan(
            order,
            selection,
            row + self._mocap[task_idx],
            row + self._ctrl[task_idx],
            mocap_low,
            mocap_high,
            goal_low,
            goal_high,
            [(world, slots, [turns[slot] for slot in slots.tolist()]) for world, slots in of_worlds if len(slots)],
        )


def _group_by_model(tasks: Sequence[Task]) -> list[tuple[str, str | None, list[Task]]]:
    """Tasks that can share a world: of one model file, of which they move one body at most."""
    groups: list[tuple[str, str | None, list[Task]]] = []
    for task in sorted(tasks, key=lambda task: task.fixture is None):  # those that move nothing fit in anywhere
        for i, (file, fixture, members) in enumerate(groups):
            if file == task.model_file and task.fixture in (None, fixture):
                groups[i] = file, fixture, [*members, task]
                break
        else:
            groups.append((task.model_file, task.fixture, [task]))
    return groups
