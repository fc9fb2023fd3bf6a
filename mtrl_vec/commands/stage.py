"""Drawing simulations off screen with Meta-World's own geometry."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError
from mtrl_vec.tasks.task import Array

if TYPE_CHECKING:
    from mtrl_vec.sim.world import World

_GOAL_SITES = {
    "assembly-v3": ("pegTop",),
    "coffee-button-v3": ("coffee_goal", "mug_goal"),
    "coffee-pull-v3": ("mug_goal", "coffee_goal"),
    "coffee-push-v3": ("coffee_goal", "mug_goal"),
    "disassemble-v3": ("pegTop",),
    "door-lock-v3": ("goal_lock", "goal_unlock"),
    "door-unlock-v3": ("goal_unlock", "goal_lock"),
    "faucet-close-v3": ("goal_close", "goal_open"),
    "faucet-open-v3": ("goal_open", "goal_close"),
}
"""Sites that are for goals: the one that marks the task's own, then that of another task with the same model."""
_GOAL_SITE = ("goal",)
"""Those of all other tasks. Some models have none: buttons and handles show their goals themselves."""
_OUT_OF_SIGHT = [10.0, 10.0, 10.0]
_MARKER = {
    "reach-v3": (0.8, 0, 0, 1),
    "push-v3": (0, 0.8, 0, 1),
    "pick-place-v3": (0, 0, 0.8, 1),
    "push-wall-v3": (0, 0.8, 0, 1),
    "pick-place-wall-v3": (0, 0, 0.8, 1),
}
"""Colours of the goal's marker where Meta-World's models of tasks that share a model here differ in nothing else."""
# Meta-World's fixed cameras are far off and upside down.
_ACROSS = {"lookat": (0.0, 0.74, 0.14), "distance": 0.85, "azimuth": 200, "elevation": -25}
"""Across the way from object to goal, and near."""
_FRONT = {"lookat": (0.0, 0.7, 0.14), "distance": 1.1, "azimuth": 150, "elevation": -25}
"""From beside the robot, as doors, buttons and handles face it, and a little further off."""
_OFFSCREEN = ("egl", "osmesa")
_TRIAL = """
import mujoco
context = mujoco.GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
"""


def choose_gl() -> str:
    """Find out by trying it in a process of its own what MuJoCo can draw with here, and set ``MUJOCO_GL`` to it.

    On Linux these are tried: EGL, OSMesa, and where there is a display GLFW; or only ``MUJOCO_GL`` where it is set
    already. Other systems have a default that works.

    Returns:
        What ``MUJOCO_GL`` is now; empty for the system's default.

    Raises:
        InputError: nothing works. The message names the packages to install.
    """
    given = os.environ.get("MUJOCO_GL", "").strip().lower()
    if sys.platform != "linux":
        return given
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    for gl in [given] if given else [*_OFFSCREEN, *(["glfw"] if display else [])]:
        trial = subprocess.run([sys.executable, "-c", _TRIAL], env=os.environ | _settings(gl), capture_output=True)
        if trial.returncode == 0:
            os.environ.update(_settings(gl))
            return gl
    if given:
        raise InputError(f"MUJOCO_GL={given} does not work here: unset it to use what does")
    raise InputError("drawing needs OpenGL: on Debian and Ubuntu apt install libegl1 libgl1-mesa-dri, or libosmesa6")


def _settings(gl: str) -> dict[str, str]:
    return {"MUJOCO_GL": gl} | ({"PYOPENGL_PLATFORM": gl} if gl in _OFFSCREEN else {})


def camera_settings(task: str) -> dict[str, Any]:
    """From where a task is seen: attributes of ``mujoco.MjvCamera``."""
    return _ACROSS if task in ("reach-v3", "push-v3", "pick-place-v3") else _FRONT


class Stage:
    """Meta-World's scenes, drawn off screen: one OpenGL context for all, and the scenery of a model once it is needed.

    A model takes about 80 MB and 0.4 s, all of MT50's 2.6 GB. MuJoCo's own renderer would do, but takes its kind of
    OpenGL from what ``MUJOCO_GL`` was when MuJoCo was imported.

    Args:
        width, height: of a picture, in pixels.

    Raises:
        InputError: no OpenGL library works.
    """

    def __init__(self, width: int, height: int) -> None:
        self._gl_name = gl = choose_gl()
        import mujoco

        self._option = mujoco.MjvOption()
        self._view = mujoco.MjrRect(0, 0, width, height)
        self._sceneries: dict[str, _Scenery] = {}
        with _explained(gl):
            offscreen = importlib.import_module(f"mujoco.{gl}") if gl in _OFFSCREEN else mujoco
            self._gl = offscreen.GLContext(width, height)
            self._gl.make_current()

    def picture(self, task: str, world: World, state: Array, fixture: Array, goal: Array) -> NDArray[np.uint8]:
        """A simulation, as `mtrl_vec.sim.SimBatch.view` describes it, with the goal marked: [height, width, 3].

        Meta-World moves the same sites, and most of them in the model too; where it does not, its own pictures show
        them out of place, as it computes positions anew before it draws.
        """
        import mujoco

        scenery = self.scenery(world.model_file)
        scenery.arrange(task, world, state, fixture, goal)
        everything, camera = mujoco.mjtCatBit.mjCAT_ALL, mujoco.MjvCamera()
        for name, value in camera_settings(task).items():
            setattr(camera, name, value)
        mujoco.mjv_updateScene(scenery.model, scenery.data, self._option, None, camera, everything, scenery.scene)
        picture = np.empty((self._view.height, self._view.width, 3), dtype=np.uint8)
        self._gl.make_current()
        # Buffers belong to the OpenGL context, which was last told to draw another model's.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, scenery.context)
        mujoco.mjr_render(self._view, scenery.scene, scenery.context)
        mujoco.mjr_readPixels(picture, None, self._view, scenery.context)
        return picture[::-1]

    def scenery(self, model_file: str) -> _Scenery:
        """What is needed to draw a model. Raises InputError."""
        if model_file not in self._sceneries:
            self._gl.make_current()
            with _explained(self._gl_name):
                self._sceneries[model_file] = _Scenery(model_file, self._view.width, self._view.height)
        return self._sceneries[model_file]

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._gl.make_current()
        for scenery in self._sceneries.values():
            scenery.context.free()
        self._gl.free()


class _Scenery:
    """A model with its visual geometry, and what MuJoCo draws it with in the current OpenGL context.

    Args:
        model_file: see `mtrl_vec.tasks.task.Task.model_file`.
        width, height: of a picture, in pixels.
    """

    def __init__(self, model_file: str, width: int, height: int) -> None:
        import mujoco

        from mtrl_vec.sim.compilation import load_model

        self.model = model = load_model(model_file, visual=True)
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        model.vis.quality.shadowsize = _shadow_size(width, height)
        self.data = mujoco.MjData(model)
        self.scene = mujoco.MjvScene(model, maxgeom=1000)
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        self._body_pos, self._site_rgba = model.body_pos.copy(), model.site_rgba.copy()

    def arrange(self, task: str, world: World, state: Array, fixture: Array, goal: Array) -> None:
        """Compute all positions; see `Stage.picture`."""
        import mujoco

        model, data = self.model, self.data
        # Worlds of one model can have different fixtures, and tasks of one world different markers.
        model.body_pos[:], model.site_rgba[:] = self._body_pos, self._site_rgba
        if world.fixture_name is not None:
            model.body(world.fixture_name).pos = fixture
        mujoco.mj_setState(model, data, state, world.state_signature)
        mujoco.mj_forward(model, data)
        place = goal.tolist()
        for name in _GOAL_SITES.get(task, _GOAL_SITE):
            site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, name)
            if site >= 0:  # not in the model: into its frame, as it may belong to a body
                data.site_xpos[site] = place
                model.site_rgba[site] = _MARKER.get(task, model.site_rgba[site])
            place = _OUT_OF_SIGHT


def _shadow_size(width: int, height: int) -> int:
    """Pixels a side of the map that shadows are drawn from: half of Meta-World's in pictures of the usual size.

    That looks the same and takes half the time without a GPU; in the pictures of many tasks, which are small, a quarter
    does, and 33 models' maps take 0.1 GB instead of 0.5 GB.
    """
    return 2048 if width * height > 200**2 else 1024


@contextmanager
def _explained(gl: str) -> Iterator[None]:
    """Raises InputError where OpenGL fails."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever drivers and PyOpenGL come up with
        settings = " and ".join(f"{name}={value}" for name, value in _settings(gl).items())
        raise InputError(f"MuJoCo cannot draw in this process: set {settings} before it starts") from error
