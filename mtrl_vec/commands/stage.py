"""Drawing simulations off screen with Meta-World's own geometry."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError
from mtrl_vec.tasks.task import Array

_MARKER = {"reach-v3": (0.8, 0, 0, 1), "push-v3": (0, 0.8, 0, 1), "pick-place-v3": (0, 0, 0.8, 1)}
"""The colours of the goal's marker in Meta-World's models of the tasks."""
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
    raise InputError("video needs OpenGL: on Debian and Ubuntu apt install libegl1 libgl1-mesa-dri, or libosmesa6")


def _settings(gl: str) -> dict[str, str]:
    return {"MUJOCO_GL": gl} | ({"PYOPENGL_PLATFORM": gl} if gl in _OFFSCREEN else {})


class Stage:
    """Meta-World's scene, drawn off screen.

    MuJoCo's own renderer would do, but takes its kind of OpenGL from what ``MUJOCO_GL`` was when MuJoCo was imported.

    Args:
        model_file: see `mtrl_vec.tasks.task.Task.model_file`.
        width, height: of a picture, in pixels.

    Raises:
        InputError: no OpenGL library works.
    """

    def __init__(self, model_file: str, width: int, height: int) -> None:
        gl = choose_gl()
        import mujoco

        from mtrl_vec.sim.world import load_model

        self._model = model = load_model(model_file, visual=True)
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        model.vis.quality.shadowsize = 2048  # half of Meta-World's: looks the same, takes half the time without a GPU
        self._data = mujoco.MjData(model)
        self._goal = model.site("goal").id
        self._scene, self._option = mujoco.MjvScene(model, maxgeom=1000), mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        # Across the way from object to goal, and near; Meta-World's fixed cameras are far off and upside down.
        self._camera.lookat[:] = (0.0, 0.74, 0.14)
        self._camera.distance, self._camera.azimuth, self._camera.elevation = 0.85, 200, -25
        self._view = mujoco.MjrRect(0, 0, width, height)
        try:
            offscreen = importlib.import_module(f"mujoco.{gl}") if gl in _OFFSCREEN else mujoco
            self._gl = offscreen.GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # whatever drivers and PyOpenGL come up with
            settings = " and ".join(f"{name}={value}" for name, value in _settings(gl).items())
            raise InputError(f"MuJoCo cannot draw in this process: set {settings} before it starts") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    def picture(self, state: Array, signature: int, task: str, goal: Array) -> NDArray[np.uint8]:
        """A simulation's state [56] with the goal [3] marked as Meta-World does in that task: [height, width, 3]."""
        import mujoco

        model, data = self._model, self._data
        model.site_pos[self._goal], model.site_rgba[self._goal] = goal, _MARKER[task]
        mujoco.mj_setState(model, data, state, signature)
        mujoco.mj_forward(model, data)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._option, None, self._camera, everything, self._scene)
        picture = np.empty((self._view.height, self._view.width, 3), dtype=np.uint8)
        self._gl.make_current()
        mujoco.mjr_render(self._view, self._scene, self._context)
        mujoco.mjr_readPixels(picture, None, self._view, self._context)
        return picture[::-1]

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._gl.make_current()
        self._context.free()
        self._gl.free()
