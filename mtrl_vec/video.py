"""A video of a policy on each of its tasks side by side, with success marked as it comes.

Simulated by `mtrl_vec.sim.SawyerSim`, bit for bit what Meta-World does, and drawn from its states with Meta-World's own
geometry. Drawing needs no display but an OpenGL library: see `choose_gl`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mtrl_vec.errors import InputError
from mtrl_vec.tasks import Array, resolve_tasks

if TYPE_CHECKING:
    from mtrl_vec.sim import SawyerSim

Act = Callable[[Array, str], NDArray[np.float32]]
"""A policy: observations [n, 39] and the task's name -> actions [n, 4]."""

STEP_SECONDS = 0.0125
"""Simulated time of an environment step: 80 of them are a second."""
STEPS_AFTER_SUCCESS = 40
"""How much longer than to its success an episode is shown."""

_MARKER = {"reach-v3": (0.8, 0, 0, 1), "push-v3": (0, 0.8, 0, 1), "pick-place-v3": (0, 0, 0.8, 1)}
"""The colours of the goal's marker in Meta-World's models of the tasks."""
_GIF_WIDTH, _GIF_FPS = 720, 20
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


def record(
    act: Act,
    tasks: Sequence[str],
    out: Path,
    *,
    episodes: int = 2,
    seed: int = 0,
    max_episode_steps: int = 150,
    width: int = 360,
    height: int = 360,
    fps: int = 40,
) -> list[Path]:
    """Film episodes of every task side by side; write ``<out>.mp4`` and ``<out>.gif``.

    Every environment step is a frame, so 80 frames a second are real time and the default is half speed. The GIF takes
    just as long, with fewer and smaller frames. An episode goes on for half a simulated second after its success, then
    waits for those of the other tasks; at the end all stand still for a second. The files appear complete or not at
    all. Without a GPU a frame takes about 0.07 s a task.

    Args:
        act: see `Act`; asked for one row at a time.
        tasks: names of the tasks, from left to right.
        out: the files' name without its end; in an existing folder.
        episodes: how many of each task.
        seed: of objects and goals: the same one gives the same video.
        max_episode_steps: an episode without success by then has failed, in environment steps.
        width: of a task's picture, in pixels, 64 or more.
        height: of a task's picture, in pixels, 64 or more.
        fps: frames per second.

    Returns:
        The files.

    Raises:
        InputError: an unknown task, a number that is too small, a missing library, or a place that files cannot be
            written to; all before anything is simulated.
    """
    found = resolve_tasks(tasks)
    counts = (
        ("episodes", episodes, 1),
        ("seed", seed, 0),
        ("max_episode_steps", max_episode_steps, 1),
        ("fps", fps, 1),
    )
    for name, number, least in (*counts, ("width", width, 64), ("height", height, 64)):
        if number < least:
            raise InputError(f"{name} is {number}: it must be at least {least}")
    try:
        import av  # noqa: F401  (what imageio encodes with)
        import imageio.v3 as iio
    except ImportError as error:
        raise InputError("video needs imageio and av: pip install 'mtrl_vec[pictures]'") from error
    files = [out.parent / f"{out.name}{end}" for end in (".mp4", ".gif")]
    if not out.name or any(file.is_dir() for file in files):
        raise InputError(f"cannot write to {files[0]}: give another name")
    try:
        folder = tempfile.TemporaryDirectory(prefix=".video-", dir=out.parent)
    except OSError as error:
        raise InputError(f"cannot write to folder {out.parent} ({error.strerror}): give another one") from error

    with folder as beside, _Stage(width, height) as stage:
        from mtrl_vec.sim import SawyerSim

        parts = [Path(beside, file.name) for file in files]
        sim = SawyerSim(found, range(len(found)), seed=seed, max_episode_steps=max_episode_steps)
        small: list[Image.Image] = []
        every = max(1, round(fps / _GIF_FPS))
        with iio.imopen(parts[0], "w", plugin="pyav") as movie:
            movie.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
            for index, frame in enumerate(_film(act, sim, stage, episodes, fps)):
                movie.write_frame(np.asarray(frame))
                if index % every == 0:
                    frame.thumbnail((_GIF_WIDTH, _GIF_WIDTH))  # in place: every frame is a new one
                    small.append(frame)
        # One palette for all, so that what stands still stays the same; an octree's, which keeps small bright things.
        both = Image.fromarray(np.vstack([np.asarray(small[k]) for k in (0, -1)]))
        palette = both.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in small)
        first.save(parts[1], save_all=True, append_images=rest, duration=1000 * every / fps, loop=0)
        for part, file in zip(parts, files, strict=True):
            part.replace(file)
    return files


def _film(act: Act, sim: SawyerSim, stage: _Stage, episodes: int, hold: int) -> Iterator[Image.Image]:
    """The frames of all episodes, the last one of each ``hold`` times more."""
    names = [sim.tasks[k].name for k in sim.task_idx]
    panels = [Image.new("RGB", (1, 1))] * len(names)
    for episode in range(1, episodes + 1):
        observation = sim.reset()
        goals = observation[:, 36:]
        verdicts = [""] * len(names)
        ends = np.full(len(names), sim.max_episode_steps)
        for step in range(sim.max_episode_steps + 1):
            for k in np.flatnonzero(step <= ends):
                picture = stage.picture(sim.state[k], sim.state_signature, names[k], goals[k])
                details = f"episode {episode}   step {step}   {step * STEP_SECONDS:.2f} s"
                panels[k] = _panel(picture, names[k], details, verdicts[k])
            yield _side_by_side(panels)
            if step == ends.max():
                break
            action = np.zeros((len(names), 4), dtype=np.float32)
            for k in np.flatnonzero(step < ends):
                action[k] = act(observation[[k]], names[k])[0]
            observation, _, success, truncated, _ = sim.step(action)
            for k in np.flatnonzero(step < ends):
                if success[k]:
                    verdicts[k], ends[k] = "success", min(step + 1 + STEPS_AFTER_SUCCESS, ends[k])
                elif truncated[k] and not verdicts[k]:
                    verdicts[k], ends[k] = "failed", step + 1
        for _ in range(hold):
            yield _side_by_side(panels)


class _Stage:
    """Meta-World's scene, drawn off screen.

    MuJoCo's own renderer would do, but takes its kind of OpenGL from what ``MUJOCO_GL`` was when MuJoCo was imported.
    """

    def __init__(self, width: int, height: int) -> None:
        gl = choose_gl()
        import mujoco

        from mtrl_vec.sim import load_model

        self._model = model = load_model(visual=True)
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

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._gl.make_current()
        self._context.free()
        self._gl.free()


_GAP = 4  # between panels, in pixels
_COLORS = {"success": (24, 150, 64), "failed": (205, 45, 40)}


def _panel(picture: NDArray[np.uint8], title: str, details: str, verdict: str) -> Image.Image:
    """A task's picture under a line of text, with the verdict on it if there is one."""
    height, width, _ = picture.shape
    large, small = (ImageFont.load_default(width / share) for share in (20, 26))
    bar = width // 10
    panel = Image.new("RGB", (width, bar + height), (32, 33, 36))
    panel.paste(Image.fromarray(picture), (0, bar))
    draw = ImageDraw.Draw(panel)
    draw.text((width // 36, bar // 2), title, "white", large, "lm")
    draw.text((width - width // 36, bar // 2), details, (200, 200, 205), small, "rm")
    if verdict:
        color, middle, bottom = _COLORS[verdict], width // 2, bar + height
        draw.rectangle((0, bar, width - 1, bottom - 1), outline=color, width=1 + width // 60)
        draw.rectangle((middle - width // 7, bottom - bar, middle + width // 7, bottom), fill=color)
        draw.text((middle, bottom - bar // 2), verdict, "white", large, "mm")
    return panel


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels in one picture, of even width and height as H.264 wants it."""
    pitch, height = panels[0].width + _GAP, panels[0].height
    width = pitch * len(panels) - _GAP
    row = Image.new("RGB", (width + width % 2, height + height % 2), "white")
    for k, panel in enumerate(panels):
        row.paste(panel, (k * pitch, 0))
    return row
