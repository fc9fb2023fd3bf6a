"""`Readings`: what observations and rewards are computed from, out of what each slot's turn left behind.

A turn copies the positions of all bodies and sites of its model into the slot's row of raw numbers. One gather then
picks what each slot's task reads, for all tasks and models at once.

Shapes: ``n`` slots or rows, ``K`` tasks, ``R`` raw numbers of a slot, ``M`` numbers read. All lengths in metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError
from mtrl_vec.sim.rotation import quaternions
from mtrl_vec.sim.world import TIPS, World
from mtrl_vec.tasks.layout import FRAME_SIZE
from mtrl_vec.tasks.task import MAX_POINTS, Array, Position, Task
from mtrl_vec.tasks.terms import distance

Indices = NDArray[np.intp]

# What is read, in this order: positions [3] each, then the rotation, as a matrix or quaternion, and a quaternion.
_ARM = (
    *(("body", "hand"), ("body", "rightclaw"), ("body", "leftclaw"), ("body", "leftpad"), ("body", "rightpad")),
    *(("site", tip) for tip in TIPS),
)
HAND, RIGHT_CLAW, LEFT_CLAW, LEFT_PAD, RIGHT_PAD, RIGHT_TIP, LEFT_TIP, OBJECT, SECOND = (
    slice(3 * i, 3 * i + 3) for i in range(len(_ARM) + 2)
)
POINTS = slice(27, 27 + 3 * MAX_POINTS)
_ROTATION = slice(POINTS.stop, POINTS.stop + 9)
_SECOND_QUAT = slice(_ROTATION.stop, _ROTATION.stop + 4)

_QUAT_ENTRIES, _SECOND_ENTRIES, _SECOND_QUAT_ENTRIES = slice(7, 11), slice(11, 14), slice(14, 18)


@dataclass(frozen=True)
class _Sources:
    """Where a task's numbers are in the raw row of its slots, and in its world's ``MjData``."""

    columns: Indices  # [M]
    offsets: Array  # [2, 3] of the object and the second object
    geom: Array | None  # [3] position of a geom that is observed
    rotation: Array | None  # [9] or [4]
    second_quat: Array | None  # [4]
    constant: Array  # [9] rotation, where none is read
    joint: int  # column in a row of state


@dataclass(frozen=True)
class Selection:
    """Rows to read: where in the raw numbers each slot, in some order, finds what its task reads."""

    index: Indices
    """[n, M] into the flat raw numbers."""
    joint_index: Indices
    """[n] into the flat states."""
    offsets: Array
    """[n, 2, 3]"""
    from_matrix: Indices | slice
    """Rows whose rotation is a matrix."""
    with_second: Indices
    """Rows with a second object."""
    adjusted: tuple[tuple[Task, Indices], ...]
    """Rows whose object is not quite where it is read."""


class Readings:
    """See the module.

    Args:
        tasks, worlds: [K] the tasks and the world of each.
        num_slots: n.

    Raises:
        InputError: a task reads what its model lacks.
    """

    def __init__(self, tasks: Sequence[Task], worlds: Sequence[World], num_slots: int) -> None:
        self._tasks, self._worlds = tasks, worlds
        self._num_bodies = max(world.model.nbody for world in worlds)
        self._num_sites = max(world.model.nsite for world in worlds)
        first_site = 3 * self._num_bodies
        self._own = first_site + 3 * self._num_sites  # a geom's position, the rotation and the second quaternion
        self.raw = np.zeros((num_slots, self._own + 3 + 9 + 4))
        """[n, R]"""
        self._sources = [self._find(task, world) for task, world in zip(tasks, worlds, strict=True)]
        self._columns = np.stack([source.columns for source in self._sources])  # [K, M]
        self._offsets = np.stack([source.offsets for source in self._sources])
        self._joints = np.array([source.joint for source in self._sources])
        self._is_matrix = np.array(
            [source.rotation is not None and source.rotation.size == 9 for source in self._sources]
        )
        self._has_second = np.array([task.second is not None for task in tasks])
        self._adjusted = [k for k, task in enumerate(tasks) if task.obj_from_joint is not None]

    def _find(self, task: Task, world: World) -> _Sources:
        nothing = Position("body", "hand")
        positions = [Position(kind, name) for kind, name in _ARM] + [task.obj, task.second or nothing, *task.points]
        positions += [nothing] * (MAX_POINTS - len(task.points))
        columns = [self._column(world, position) + i for position in positions for i in range(3)]
        columns += range(self._own + 3, self._own + 3 + 9 + 4)
        geoms = {position.name for position in positions if position.kind == "geom"}
        if len(geoms) > 1:
            raise InputError(f"task {task.name} reads the positions of {len(geoms)} geoms: put sites there instead")
        data, kind = world.data, task.orientation.kind
        rotation, constant = None, np.zeros(9)
        if kind == "constant":
            constant[:4] = task.orientation.constant
        else:
            at = world.id(kind, task.orientation.name)
            quat = kind == "body" and not task.orientation.xyzw
            rotation = (
                data.xquat[at]
                if quat
                else {"body": data.xmat, "site": data.site_xmat, "geom": data.geom_xmat}[kind][at]
            )
        qpos = 0 if task.joint is None else int(world.model.jnt_qposadr[world.id("joint", task.joint)])
        return _Sources(
            np.array(columns, dtype=np.intp),
            np.array([task.obj.offset, nothing.offset if task.second is None else task.second.offset]),
            data.geom_xpos[world.id("geom", geoms.pop())] if geoms else None,
            rotation,
            None if task.second_quat is None else data.xquat[world.id("body", task.second_quat)],
            constant,
            world.parts["QPOS"].start + qpos,
        )

    def _column(self, world: World, position: Position) -> int:
        if position.kind == "geom":
            return self._own
        first = 0 if position.kind == "body" else 3 * self._num_bodies
        return first + 3 * world.id(position.kind, position.name)

    def copies(self, slot: int, k: int) -> tuple[tuple[Array, Array], ...]:
        """What a turn of a slot with task ``k`` copies: pairs of a view of the slot's raw numbers and its source."""
        world, source, row = self._worlds[k], self._sources[k], self.raw[slot]
        model, data, own = world.model, world.data, row[self._own :]
        sites = row[3 * self._num_bodies : 3 * self._num_bodies + 3 * model.nsite]
        pairs = [(row[: 3 * model.nbody].reshape(-1, 3), data.xpos), (sites.reshape(-1, 3), data.site_xpos)]
        if source.geom is not None:
            pairs.append((own[:3], source.geom))
        if source.rotation is not None:
            pairs.append((own[3 : 3 + source.rotation.size], source.rotation))
        if source.second_quat is not None:
            pairs.append((own[12:], source.second_quat))
        return tuple(pairs)

    def prepare(self, slot: int, k: int) -> None:
        """Fill in the raw numbers of a slot with task ``k`` that no turn copies."""
        self.raw[slot, self._own :] = 0.0
        self.raw[slot, self._own + 3 : self._own + 12] = self._sources[k].constant

    def make_harmless(self, slots: NDArray[np.bool_]) -> None:
        """Leave something to convert in rows [n] that will not be used."""
        self.raw[slots] = np.arange(self.raw.shape[1])  # no two points in one place
        self.raw[slots, self._own + 3 : self._own + 12] = np.eye(3).ravel()

    def select(self, slots: Indices, task_idx: NDArray[np.int64], state_size: int) -> Selection:
        """Prepare reading slots [n] with these tasks [n], from states with rows of ``state_size``."""
        matrix = self._is_matrix[task_idx]
        adjusted = [(self._tasks[k], np.flatnonzero(task_idx == k)) for k in self._adjusted]
        return Selection(
            slots[:, None] * self.raw.shape[1] + self._columns[task_idx],
            slots * state_size + self._joints[task_idx],
            self._offsets[task_idx],
            slice(None) if matrix.all() else np.flatnonzero(matrix),
            np.flatnonzero(self._has_second[task_idx]),
            tuple((task, rows) for task, rows in adjusted if len(rows)),
        )

    def read(self, selection: Selection, state: Array) -> tuple[Array, Array, Array]:
        """Numbers read [n, M], joints [n], and frames [n, 18] of the observation.

        Source of the frame: ``SawyerXYZEnv._get_curr_obs_combined_no_goal``.
        """
        s = selection
        read = self.raw.ravel().take(s.index)
        joint = state.ravel().take(s.joint_index)
        frame = np.zeros((len(read), FRAME_SIZE))
        frame[:, :3] = read[:, HAND]
        frame[:, 3] = np.clip(distance(read[:, RIGHT_CLAW], read[:, LEFT_CLAW]) / 0.1, 0.0, 1.0)
        obj = frame[:, 4:7]
        np.add(read[:, OBJECT], s.offsets[:, 0], out=obj)
        for task, rows in s.adjusted:
            assert task.obj_from_joint is not None
            obj[rows] = task.obj_from_joint(obj[rows], joint[rows])
        rotation = read[:, _ROTATION]
        frame[:, _QUAT_ENTRIES] = rotation[:, :4]
        if isinstance(s.from_matrix, slice) or len(s.from_matrix):
            matrices = rotation[s.from_matrix].reshape(-1, 3, 3)
            frame[s.from_matrix, _QUAT_ENTRIES] = quaternions(matrices)
        if len(s.with_second):
            rows = s.with_second
            frame[rows, _SECOND_ENTRIES] = read[rows, SECOND] + s.offsets[rows, 1]
            frame[rows, _SECOND_QUAT_ENTRIES] = read[rows, _SECOND_QUAT]
        return read, joint, frame
