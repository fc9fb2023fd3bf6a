"""`Scene`: a task's resets in its world. Shapes: ``S`` numbers of state, ``V`` of a drawn vector."""

from __future__ import annotations

import mujoco
import numpy as np

from mtrl_vec.sim.world import TIPS, World
from mtrl_vec.tasks.task import Array, Start, Task


class Scene:
    """Starts episodes of a task in the ``MjData`` of its world: what `Task.start` is given.

    Meta-World's environments settle anew at every reset, in 250 physics steps and twice. In most tasks this always
    ends in the same state, which is restored instead.
    """

    def __init__(self, world: World, task: Task) -> None:
        self.world, self.task = world, task
        self._settled = None if task.settles else world.settled(task.hand_init)
        self._tips = [world.id("site", name) for name in TIPS]
        self._ids: dict[tuple[str, str], int] = {}
        self._positions = {"body": world.data.xpos, "site": world.data.site_xpos, "geom": world.data.geom_xpos}
        self.init_tcp = np.zeros(3)
        """[3] tool centre after the last reset's settling."""

    def begin(self, vector: Array) -> Start:
        """Reset ``data`` to the start of the episode that a drawn vector [V] stands for."""
        world, task = self.world, self.task
        if world.fixture is not None:
            # Whatever any task of this model moves is written for all of them.
            place, there = task.place_fixture, world.fixture_in_model
            world.fixture[:] = there if place is None else place(vector, there)
        if self._settled is None:
            world.settle(task.hand_init)
        else:
            mujoco.mj_setState(world.model, world.data, self._settled, world.state_signature)
            self.step(1)
        right, left = world.data.site_xpos[self._tips]
        self.init_tcp = (right + left) / 2
        return task.start(self, vector)

    def position(self, kind: str, name: str) -> Array:
        """See `mtrl_vec.tasks.task.Scene`."""
        key = kind, name
        if key not in self._ids:
            self._ids[key] = self.world.id(kind, name)
        return self._positions[kind][self._ids[key]].copy()

    def joint(self, name: str) -> float:
        """See `mtrl_vec.tasks.task.Scene`."""
        return float(self.world.data.qpos[self._address(name)])

    def set_joint(self, name: str, value: float) -> None:
        """See `mtrl_vec.tasks.task.Scene`."""
        self.world.data.qpos[self._address(name)] = value

    def _address(self, joint: str) -> int:
        return int(self.world.model.jnt_qposadr[self.world.id("joint", joint)])

    def set_state(self, at: int, qpos: Array | float, still: slice = slice(0, 0)) -> None:
        """See `mtrl_vec.tasks.task.Scene`."""
        values = np.atleast_1d(qpos)
        self.world.data.qpos[at : at + len(values)] = values
        self.world.data.qvel[still] = 0.0
        self.forward()

    def place(self, joint: str, position: Array) -> None:
        """See `mtrl_vec.tasks.task.Scene`."""
        dof = int(self.world.model.jnt_dofadr[self.world.id("joint", joint)])
        self.set_state(self._address(joint), position, slice(dof, dof + 6))

    def forward(self) -> None:
        """See `mtrl_vec.tasks.task.Scene`."""
        mujoco.mj_forward(self.world.model, self.world.data)

    def step(self, count: int) -> None:
        """See `mtrl_vec.tasks.task.Scene`."""
        mujoco.mj_step(self.world.model, self.world.data, nstep=count)
