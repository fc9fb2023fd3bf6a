"""`Scorer`: rewards and successes of all slots, one call for each formula.

Slots are ordered by formula, so that each formula's rows are a slice of what is read for all of them.

Shapes: ``n`` slots, ``K`` tasks. All lengths in metres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError
from mtrl_vec.sim.readings import LEFT_PAD, LEFT_TIP, POINTS, RIGHT_PAD, RIGHT_TIP, Indices
from mtrl_vec.tasks.task import MAX_POINTS, Array, RewardFn, RewardInputs, Task

# What is kept of an episode's start: positions [3] each.
GOAL, INIT_TCP, INIT_OBJ, INIT_SECOND, FIRST_OBJ = (slice(3 * i, 3 * i + 3) for i in range(5))
NUM_KEPT = FIRST_OBJ.stop

OBSERVED_HAND_LOW, OBSERVED_HAND_HIGH = np.array([-0.525, 0.348, -0.0525]), np.array([0.525, 1.025, 0.7])
"""Bounds of the hand in observations (``SawyerXYZEnv._HAND_SPACE``)."""


class _Rows(NamedTuple):
    """The rows of one formula."""

    function: Callable[[RewardInputs], Any]
    rows: slice
    params: Mapping[str, Array]


class Order(NamedTuple):
    """Slots ordered by formula, and where each formula's rows are."""

    slots: Indices
    """[n]"""
    task_idx: NDArray[np.int64]
    """[n] of the slots in this order."""
    grasps: list[_Rows]
    rewards: list[_Rows]


class Scorer:
    """See the module. Args: the tasks [K]."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        grasps: list[Callable[[RewardInputs], Array] | None] = []
        rewards: list[RewardFn] = []
        for task in tasks:
            function = None if task.grasp is None else task.grasp.function
            if function not in grasps:
                grasps.append(function)
            if task.reward not in rewards:
                rewards.append(task.reward)
        groups = [
            (0 if t.grasp is None else 1 + grasps.index(t.grasp.function), rewards.index(t.reward)) for t in tasks
        ]
        sorted_tasks = sorted(range(len(tasks)), key=lambda k: groups[k])
        self._rank = np.empty(len(tasks), dtype=np.intp)  # position of each task in the order of formulas
        self._rank[sorted_tasks] = np.arange(len(tasks))
        self._grasps = _formulas(tasks, sorted_tasks, lambda task: task.grasp)
        self._rewards = _formulas(tasks, sorted_tasks, lambda task: (task.reward, task.params))

    def order(self, task_idx: NDArray[np.int64]) -> Order:
        """Order slots with these tasks [n]."""
        rank = self._rank[task_idx]
        slots = np.argsort(rank, kind="stable")
        ordered, rank = task_idx[slots], rank[slots]
        return Order(slots, ordered, *([*_rows(formulas, rank, ordered)] for formulas in (self._grasps, self._rewards)))

    def score(
        self,
        order: Order,
        read: Array,
        joint: Array,
        frame: Array,
        touching: NDArray[np.bool_],
        kept: Array,
        grip: NDArray[np.float32],
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Rewards [n] and successes [n] in the order given, from what was read in that order.

        Args:
            read, joint, frame: see `mtrl_vec.sim.readings.Readings.read`.
            touching: [n] see `RewardInputs`.
            kept: [n, 15] see `NUM_KEPT`.
            grip: [n]
        """
        n = len(read)
        whole = RewardInputs(
            hand=np.minimum(np.maximum(frame[:, :3], OBSERVED_HAND_LOW), OBSERVED_HAND_HIGH),
            gripper_open=frame[:, 3],
            obj=frame[:, 4:7],
            quat=frame[:, 7:11],
            second=frame[:, 11:14],
            tcp=(read[:, RIGHT_TIP] + read[:, LEFT_TIP]) / 2,
            left_pad=read[:, LEFT_PAD],
            right_pad=read[:, RIGHT_PAD],
            points=read[:, POINTS].reshape(n, MAX_POINTS, 3),
            joint=joint,
            touching=touching,
            grip=grip,
            goal=kept[:, GOAL],
            init_tcp=kept[:, INIT_TCP],
            init_obj=kept[:, INIT_OBJ],
            init_second=kept[:, INIT_SECOND],
            first_obj=kept[:, FIRST_OBJ],
            grasp=np.zeros(n),
            params={},
        )
        reward, success = np.empty(n), np.empty(n, dtype=bool)
        for function, rows, params in order.grasps:
            whole.grasp[rows] = function(whole.rows(rows, params))
        for function, rows, params in order.rewards:
            reward[rows], success[rows] = function(whole.rows(rows, params))
        return reward, success


class _Formula(NamedTuple):
    function: Callable[[RewardInputs], Any]
    first: int  # rank of its first task
    end: int
    params: dict[str, Array]  # [K, ...]


_Parts = tuple[Callable[..., Any], Mapping[str, Any]]  # a function and its parameters


def _formulas(
    tasks: Sequence[Task],
    sorted_tasks: Sequence[int],
    get: Callable[[Task], _Parts | None],
) -> list[_Formula]:
    """Formulas in the order of tasks, with the parameters of all their tasks as columns [K, ...]."""
    found: list[_Formula] = []
    for rank, k in enumerate(sorted_tasks):
        formula = get(tasks[k])
        if formula is None:
            continue
        function, params = formula
        if not found or found[-1].function is not function:
            first = tasks[k]
            empty = {name: np.zeros((len(tasks), *np.shape(value))) for name, value in params.items()}
            found.append(_Formula(function, rank, rank, empty))
        if found[-1].params.keys() != params.keys():
            raise InputError(
                f"tasks {first.name} and {tasks[k].name} share a reward function, but not the names of its params: "
                f"{', '.join(found[-1].params) or 'none'} and {', '.join(params) or 'none'}"
            )
        for name, value in params.items():
            found[-1].params[name][k] = value
        found[-1] = found[-1]._replace(end=rank + 1)
    return found


def _rows(formulas: Sequence[_Formula], rank: Indices, task_idx: NDArray[np.int64]) -> list[_Rows]:
    rows = []
    for formula in formulas:
        first, end = np.searchsorted(rank, (formula.first, formula.end))
        if end > first:
            here = slice(int(first), int(end))
            rows.append(_Rows(formula.function, here, {name: p[task_idx[here]] for name, p in formula.params.items()}))
    return rows
