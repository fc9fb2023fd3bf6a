"""The command ``video``: a policy on all of its tasks at once, with success marked as it comes.

Simulated by `mtrl_vec.sim.SimBatch`, bit for bit what Meta-World does, and drawn from its states with Meta-World's own
geometry. Drawing needs no display, only an OpenGL library: see `mtrl_vec.commands.stage.choose_gl`.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mtrl_vec.commands.arguments import VideoCommand
from mtrl_vec.commands.output import check_least, say, say_written
from mtrl_vec.commands.stage import Stage
from mtrl_vec.errors import InputError
from mtrl_vec.tasks.suite import resolve_tasks
from mtrl_vec.tasks.task import Array

if TYPE_CHECKING:
    from mtrl_vec.sim import SimBatch

Act = Callable[[Array, str], NDArray[np.float32]]
"""A policy: observations [n, 39] and the task's name -> actions [n, 4]."""

STEP_SECONDS = 0.0125
"""Simulated time of an environment step: 80 of them are a second."""
STEPS_AFTER_SUCCESS = 40
"""How much longer than to its success an episode is shown."""

MAX_WIDTH = 1920
"""Of the whole picture, in pixels."""

MAX_EPISODE_STEPS = 150
"""An episode without success by then has failed."""

_GIF_WIDTH, _GIF_FPS = 720, 20


def video(command: VideoCommand) -> None:
    """Film a policy. Raises InputError."""
    if command.episodes < 1:
        raise InputError(f"episodes is {command.episodes}: it must be positive")
    from mtrl_vec.policy import load_policy
    from mtrl_vec.policy.trained import choose_tasks

    policy = load_policy(command.checkpoint)
    tasks = choose_tasks(command.tasks, policy.tasks)
    out = command.out.with_suffix("") if command.out.suffix in (".mp4", ".gif") else command.out
    frames = f"{command.episodes * MAX_EPISODE_STEPS} steps at most, each 0.07 s per task if there is no GPU"
    say(f"filming {len(tasks)} task{'s' if len(tasks) > 1 else ''}: {frames}", command.quiet)
    files = record(policy, tasks, out, episodes=command.episodes, seed=command.seed)
    say_written(files, command.quiet)


def record(
    act: Act,
    tasks: Sequence[str],
    out: Path,
    *,
    episodes: int = 2,
    seed: int = 0,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    width: int = 360,
    height: int = 360,
    fps: int = 40,
) -> list[Path]:
    """Film episodes of all tasks at once; write ``<out>.mp4`` and ``<out>.gif``, and return their paths.

    Up to four tasks are side by side, more in rows. Every environment step is a frame, so 80 frames a second are real
    time and the default is half speed. The GIF takes just as long, with fewer and smaller frames. An episode goes on
    for half a simulated second after its success, then waits for those of the other tasks; at the end all stand still
    for a second. The files appear complete or not at all. Without a GPU a frame takes about 0.07 s for each task that
    still moves.

    Args:
        act: see `Act`; asked for one row at a time.
        tasks: names of the tasks, from left to right and row by row.
        out: the files' name without its end; in an existing folder.
        episodes: how many of each task.
        seed: of objects and goals: the same one gives the same video.
        max_episode_steps: an episode without success by then has failed, in environment steps.
        width, height: of a task's picture, in pixels, 64 or more. Where the whole would be wider than 1920 pixels, both
            are less in proportion: 188 instead of 360 for fifty tasks.
        fps: frames per second.

    Raises:
        InputError: an unknown task, a number that is too small, a missing library, or a place that cannot be written
            to; all before anything is simulated.
    """
    found = resolve_tasks(tasks)
    check_least(episodes=(episodes, 1), seed=(seed, 0), max_episode_steps=(max_episode_steps, 1))
    check_least(fps=(fps, 1), width=(width, 64), height=(height, 64))
    files = _files(out)
    width, height = fitting(len(found), width, height)
    with _folder_beside(out) as beside, Stage(width, height) as stage:
        from mtrl_vec.sim import SimBatch

        parts = [Path(beside, file.name) for file in files]
        sim = SimBatch(found, range(len(found)), seed=seed, max_episode_steps=max_episode_steps)
        every = max(1, round(fps / _GIF_FPS))
        small = _write_movie(parts[0], _film(act, sim, stage, episodes, fps), fps, every)
        _write_gif(parts[1], small, 1000 * every / fps)
        for part, file in zip(parts, files, strict=True):
            part.replace(file)
    return files


def _files(out: Path) -> list[Path]:
    """The files to write. Raises InputError where a library is missing or the files cannot be there."""
    try:
        import av  # noqa: F401  (what imageio encodes with)
        import imageio  # noqa: F401
    except ImportError as error:
        raise InputError("video needs imageio and av: pip install 'mtrl_vec[pictures]'") from error
    files = [out.parent / f"{out.name}{end}" for end in (".mp4", ".gif")]
    if not out.name or any(file.is_dir() for file in files):
        raise InputError(f"cannot write to {files[0]}: give another name")
    return files


def _folder_beside(out: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the file system of the output. Raises InputError."""
    try:
        return tempfile.TemporaryDirectory(prefix=".video-", dir=out.parent)
    except OSError as error:
        raise InputError(f"cannot write to folder {out.parent} ({error.strerror}): give another one") from error


def _write_movie(file: Path, frames: Iterator[Image.Image], fps: int, every: int) -> list[Image.Image]:
    """Write the MP4. Returns smaller copies of some frames, for the GIF."""
    import imageio.v3 as iio

    small: list[Image.Image] = []
    with iio.imopen(file, "w", plugin="pyav") as movie:
        movie.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
        for index, frame in enumerate(frames):
            movie.write_frame(np.asarray(frame))
            if index % every == 0:
                frame.thumbnail((_GIF_WIDTH, _GIF_WIDTH))  # in place: every frame is a new one
                small.append(frame)
    return small


def _write_gif(file: Path, frames: list[Image.Image], milliseconds: float) -> None:
    """Write the GIF, in which a frame takes some milliseconds."""
    # One palette for all, so that what stands still stays the same; an octree's, which keeps small bright things.
    both = Image.fromarray(np.vstack([np.asarray(frames[k]) for k in (0, -1)]))
    palette = both.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(file, save_all=True, append_images=rest, duration=milliseconds, loop=0)


def _film(act: Act, sim: SimBatch, stage: Stage, episodes: int, hold: int) -> Iterator[Image.Image]:
    """The frames of all episodes, the last one of each ``hold`` times more."""
    names = [sim.tasks[k].name for k in sim.task_idx]
    panels = [Image.new("RGB", (1, 1))] * len(names)
    for episode in range(1, episodes + 1):
        observation = sim.reset()
        verdicts = [""] * len(names)
        ends = np.full(len(names), sim.max_episode_steps)
        for step in range(sim.max_episode_steps + 1):
            for k in np.flatnonzero(step <= ends).tolist():
                picture = stage.picture(names[k], *sim.view(k))
                parts = f"episode {episode}", f"step {step}", f"{step * STEP_SECONDS:.2f} s"
                panels[k] = _panel(picture, names[k], ("   ".join(parts), parts[1]), verdicts[k])
            yield _together(panels)
            if step == ends.max():
                break
            action = np.zeros((len(names), 4), dtype=np.float32)
            for k in np.flatnonzero(step < ends).tolist():
                action[k] = act(observation[[k]], names[k])[0]
            observation, _, success, truncated, _ = sim.step(action)
            for k in np.flatnonzero(step < ends).tolist():
                if success[k]:
                    verdicts[k], ends[k] = "success", min(step + 1 + STEPS_AFTER_SUCCESS, ends[k])
                elif truncated[k] and not verdicts[k]:
                    verdicts[k], ends[k] = "failed", step + 1
        for _ in range(hold):
            yield _together(panels)


def grid(count: int) -> tuple[int, int]:
    """Columns and rows of that many panels, about twice as many columns as rows; up to four are in one row."""
    rows = round(math.sqrt(count / 2))
    return math.ceil(count / rows), rows


def fitting(count: int, width: int, height: int) -> tuple[int, int]:
    """Size of each of that many pictures, which is given, or less where the whole would be wider than `MAX_WIDTH`."""
    columns, _ = grid(count)
    fits = min(width, (MAX_WIDTH + _GAP) // columns - _GAP)
    return fits, max(1, round(height * fits / width))


_GAP = 4  # between panels, in pixels
_COLORS = {"success": (24, 150, 64), "failed": (205, 45, 40)}


def _panel(picture: NDArray[np.uint8], title: str, details: Sequence[str], verdict: str) -> Image.Image:
    """A task's picture under its name and the first of the details that fits, with the verdict if there is one."""
    height, width, _ = picture.shape
    large, small = (ImageFont.load_default(width / share) for share in (20, 26))
    bar, margin = width // 10, width // 36
    panel = Image.new("RGB", (width, bar + height), (32, 33, 36))
    panel.paste(Image.fromarray(picture), (0, bar))
    draw = ImageDraw.Draw(panel)
    draw.text((margin, bar // 2), title, "white", large, "lm")
    left = width - 3 * margin - draw.textlength(title, large)
    for text in details:
        # As if the step had three digits, so that the choice stays the same while it grows.
        if draw.textlength(re.sub(r"(?<=step )\d+", "000", text), small) <= left:
            draw.text((width - margin, bar // 2), text, (200, 200, 205), small, "rm")
            break
    if verdict:
        color, middle, bottom = _COLORS[verdict], width // 2, bar + height
        draw.rectangle((0, bar, width - 1, bottom - 1), outline=color, width=1 + width // 60)
        draw.rectangle((middle - width // 7, bottom - bar, middle + width // 7, bottom), fill=color)
        draw.text((middle, bottom - bar // 2), verdict, "white", large, "mm")
    return panel


def _together(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels row by row in one picture, of even width and height as H.264 wants it."""
    columns, rows = grid(len(panels))
    across, down = panels[0].width + _GAP, panels[0].height + _GAP
    width, height = columns * across - _GAP, rows * down - _GAP
    whole = Image.new("RGB", (width + width % 2, height + height % 2), "white")
    for k, panel in enumerate(panels):
        whole.paste(panel, (k % columns * across, k // columns * down))
    return whole
