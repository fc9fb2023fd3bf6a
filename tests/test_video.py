"""Videos: the pictures against Meta-World's own and against a projection by hand, the files as they are read back."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaworld_oracle import TASK_NAMES, expert, set_vector
from mtrl_vec.commands.stage import Stage, camera_settings, choose_gl
from mtrl_vec.commands.video import _film, _together, fitting, record
from mtrl_vec.errors import InputError
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import MT3, resolve_tasks
from mtrl_vec.tasks.task import Task

DRAW = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"
CHOOSE = "from mtrl_vec.commands.stage import choose_gl; print(choose_gl())"
GREEN, RED = (24, 150, 64), (205, 45, 40)
SIZE = 96
WIDTH, HEIGHT = 240, 160
FPS = 20


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=180
    )


def draws(gl: str) -> bool:
    return python(DRAW, MUJOCO_GL=gl, PYOPENGL_PLATFORM=gl).returncode == 0


@pytest.fixture(scope="module")
def working_gl() -> str:
    """What can be drawn with here, according to MuJoCo's own renderer."""
    for gl in ("egl", "osmesa"):
        if draws(gl):
            return gl
    pytest.skip("neither EGL nor OSMesa works here: apt install libegl1 libgl1-mesa-dri")


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    """What `choose_gl` sets is undone, and there is no display."""
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def known_gl(working_gl, monkeypatch) -> None:
    """Spares films the search, which has tests of its own."""
    monkeypatch.setattr("mtrl_vec.commands.stage.choose_gl", lambda: working_gl)


@pytest.fixture(scope="module")
def stage(working_gl):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUJOCO_GL", working_gl)
        patch.setenv("PYOPENGL_PLATFORM", working_gl)
        with Stage(WIDTH, HEIGHT) as stage:
            yield stage


def solve(observation: np.ndarray, task: str) -> np.ndarray:
    """Meta-World's scripted expert; only rows of one, as it knows no batches."""
    return np.clip(expert(task).get_action(observation[0])[None], -1, 1).astype(np.float32)


def idle(observation: np.ndarray, task: str) -> np.ndarray:
    return np.zeros((len(observation), 4), np.float32)


def film(out: Path, act=idle, tasks=("reach-v3",), **options) -> np.ndarray:
    """Record, and return the frames of the MP4: [t, height, width, 3]."""
    av = pytest.importorskip("av", reason="av is not installed: pip install 'mtrl_vec[pictures]'")
    small = {"episodes": 1, "max_episode_steps": 3, "width": SIZE, "height": SIZE, "fps": FPS}
    files = record(act, tasks, out, **small | options)
    assert files == [out.parent / f"{out.name}.mp4", out.parent / f"{out.name}.gif"]
    with av.open(files[0]) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def near(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(pixels.astype(int) - color).max(axis=-1) < 30


# -- OpenGL


def test_what_works_is_chosen_and_set(working_gl) -> None:
    assert choose_gl() == working_gl
    assert (os.environ["MUJOCO_GL"], os.environ["PYOPENGL_PLATFORM"]) == (working_gl, working_gl)
    assert choose_gl() == working_gl  # also when it is set already


def test_the_module_leaves_the_choice_open() -> None:
    """MuJoCo reads its choice when it is imported."""
    assert (
        python("import sys, mtrl_vec.commands.video; assert not {'mujoco', 'torch'} & {*sys.modules}").returncode == 0
    )


def test_a_choice_that_does_not_work_is_not_replaced(monkeypatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")  # there is no display
    with pytest.raises(InputError, match=r"^MUJOCO_GL=glfw does not work here: unset it to use what does$"):
        choose_gl()
    assert os.environ["MUJOCO_GL"] == "glfw"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no choice")
def test_without_libraries_their_packages_are_named(tmp_path, working_gl) -> None:
    """Empty files in their places hide the real ones. With EGL's alone hidden, OSMesa is used if it is there."""
    for name in ("EGL", "OSMesa"):
        for end in ("so", *(f"so.{k}" for k in range(10))):
            (tmp_path / f"lib{name}.{end}").touch()
    path = str(tmp_path)
    run = python(CHOOSE, LD_LIBRARY_PATH=path)
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1] == (
        "mtrl_vec.errors.InputError: drawing needs OpenGL: on Debian and Ubuntu apt install libegl1 libgl1-mesa-dri, "
        "or libosmesa6"
    )
    for file in tmp_path.glob("libOSMesa*"):
        file.unlink()
    expected = "osmesa\n" if draws("osmesa") else ""
    assert python(CHOOSE, LD_LIBRARY_PATH=path).stdout == expected


def test_a_process_that_uses_opengl_otherwise_is_told_what_to_set(working_gl) -> None:
    other = "osmesa" if working_gl == "egl" else "egl"
    code = (
        "from mtrl_vec.commands import stage; stage.choose_gl = lambda: {!r}; "
        "stage.Stage(8, 8).scenery('sawyer_xyz/sawyer_pick_place_v3.xml')"
    )
    if draws(other):
        pytest.skip(f"{other} works too")
    last = python(code.format(other)).stderr.strip()
    settings = f"set MUJOCO_GL={other} and PYOPENGL_PLATFORM={other} before it starts"
    assert f"mtrl_vec.errors.InputError: MuJoCo cannot draw in this process: {settings}" in last


# -- pictures


def metaworlds_picture(stage: Stage, gl: str, task: Task, monkeypatch) -> tuple[np.ndarray, SimBatch]:
    """What Meta-World's own renderer draws 25 steps into an episode, from the stage's camera; the same simulated."""
    import metaworld

    monkeypatch.setenv("MUJOCO_GL", gl)
    env = metaworld.ALL_V3_ENVIRONMENTS[task.name](render_mode="rgb_array", width=WIDTH, height=HEIGHT)
    env.model.vis.quality.shadowsize = stage.scenery(task.model_file).model.vis.quality.shadowsize
    env.mujoco_renderer.default_cam_config = camera_settings(task.name)
    vector = task.draw.sample(np.random.default_rng(1))
    sim = SimBatch([task], [0])
    observation = sim.reset(vectors=vector[None])
    np.testing.assert_array_equal(observation[0], set_vector(env, vector))
    for _ in range(25):
        action = solve(observation, task.name)
        env.step(action[0])
        observation = sim.step(action).observation
    picture = env.render()
    env.mujoco_renderer.viewer.con.free()  # while its own OpenGL context is current: later it would free the stage's
    env.close()
    return picture, sim


@pytest.mark.parametrize(
    "name", [*TASK_NAMES, "door-open-v3", "drawer-open-v3", "button-press-wall-v3", "push-wall-v3", "shelf-place-v3"]
)
def test_pictures_equal_metaworlds(stage, working_gl, name: str, monkeypatch) -> None:
    """Same pixels: of several models in turn, moved fixtures, and markers of all kinds."""
    expected, sim = metaworlds_picture(stage, working_gl, *resolve_tasks([name]), monkeypatch)
    picture = stage.picture(name, *sim.view(0))
    assert picture.std() > 30  # there is something to see
    np.testing.assert_array_equal(picture, expected)


def test_tasks_and_worlds_of_a_model_leave_each_other_alone(stage) -> None:
    """One moves the goal's frame, the other its colour; back again, nothing is left of it."""
    tasks = resolve_tasks(["plate-slide", "plate-slide-back", "push-wall", "pick-place-wall"])
    assert tasks[0].model_file == tasks[1].model_file and tasks[2].model_file == tasks[3].model_file
    together, alone = SimBatch(tasks, range(4), seed=1), [SimBatch([task], [0]) for task in tasks]
    together.reset()
    vectors = [task.draw.sample(np.random.default_rng(k)) for k, task in enumerate(tasks)]
    together.reset(vectors=vectors)
    for _ in range(2):
        pictures = [stage.picture(task.name, *together.view(k)) for k, task in enumerate(tasks)]
    for task, sim, vector, picture in zip(tasks, alone, vectors, pictures, strict=True):
        sim.reset(vectors=[vector])
        with Stage(WIDTH, HEIGHT) as fresh:
            np.testing.assert_array_equal(picture, fresh.picture(task.name, *sim.view(0)))
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.parametrize(
    ("name", "color", "radius"),
    [
        *zip(TASK_NAMES, "rgb", [0.02] * 3, strict=True),
        # Meta-World moves these only until it computes positions anew.
        *[("door-lock-v3", "g", 0.01), ("faucet-open-v3", "g", 0.01), ("coffee-pull-v3", "g", 0.01)],
        *[("disassemble-v3", "g", 0.005), ("stick-push-v3", "g", 0.02)],
    ],
)
def test_the_marker_is_where_the_goal_is(stage, name: str, color: str, radius: float) -> None:
    """What changes when the marker goes far away is around the goal's place in the picture, and has its colour."""
    sim = SimBatch(resolve_tasks([name]), [0], seed=5)
    sim.reset()
    *view, goal = sim.view(0)
    scenery = stage.scenery(view[0].model_file)
    scenery.scene.flags[0] = 0  # no shadows, which change elsewhere
    picture, without = (stage.picture(name, *view, place).astype(int) for place in (goal, goal + 100))
    scenery.scene.flags[0] = 1
    rows, columns = np.nonzero(np.abs(picture - without).max(axis=2) > 20)

    x, y, pixels = projected(goal, camera_settings(name), scenery.model.vis.global_.fovy)
    middle = np.array([columns.min() + columns.max() + 1, rows.min() + rows.max() + 1]) / 2
    np.testing.assert_allclose(middle, [x, y], atol=1)
    np.testing.assert_allclose(np.ptp(rows) + 1, 2 * pixels * radius, atol=2)
    assert picture[int(y), int(x)].argmax() == "rgb".index(color)


def projected(point: np.ndarray, camera: dict, fovy: float) -> tuple[float, float, float]:
    """Where a point is in the picture, and how many pixels a metre is there. A pinhole camera."""
    azimuth, elevation = np.radians([camera["azimuth"], camera["elevation"]])
    # Axes of the picture: right, up, and forward.
    forward = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    right = np.array([np.sin(azimuth), -np.cos(azimuth), 0.0])
    offset = point - (np.array(camera["lookat"]) - camera["distance"] * forward)
    pixels = HEIGHT / 2 / np.tan(np.radians(fovy) / 2) / (offset @ forward)
    return WIDTH / 2 + pixels * (offset @ right), HEIGHT / 2 - pixels * (offset @ np.cross(right, forward)), pixels


# -- films


def test_frames_show_every_task_at_every_step(stage) -> None:
    """A simulation of the same seed beside it: its states and goals, task by task, from left to right."""
    tasks = resolve_tasks(["pick-place", "drawer-close", "push"])
    film, sim = (SimBatch(tasks, range(3), seed=2) for _ in range(2))
    observation = sim.reset()
    for frame in itertools.islice(_film(solve, film, stage, 1, 0), 3):
        for k, task in enumerate(tasks):
            shown = np.asarray(frame)[
                24 : 24 + HEIGHT, k * 244 : k * 244 + WIDTH
            ]  # under a line of text, a gap between
            np.testing.assert_array_equal(shown, stage.picture(task.name, *sim.view(k)))
        actions = [solve(observation[[k]], task.name) for k, task in enumerate(tasks)]
        observation = sim.step(np.concatenate(actions)).observation


@pytest.mark.parametrize(
    ("count", "columns", "picture", "whole"),
    [
        (1, 1, (360, 240), (360, 276)),
        (3, 3, (360, 240), (1088, 276)),
        (4, 4, (360, 240), (1452, 276)),
        (10, 5, (360, 240), (1816, 556)),
        (50, 10, (188, 125), (1916, 731)),
    ],
)
def test_panels_are_in_rows(count: int, columns: int, picture: tuple[int, int], whole: tuple[int, int]) -> None:
    assert fitting(count, 360, 240) == picture
    width, height = picture[0], picture[1] + picture[0] // 10
    panels = [Image.new("RGB", (width, height), (k, 0, 0)) for k in range(count)]
    image = _together(panels)
    assert image.size == (whole[0], whole[1] + whole[1] % 2)
    for k, panel in enumerate(panels):
        left, top = k % columns * (width + 4), k // columns * (height + 4)
        assert image.crop((left, top, left + width, top + height)).tobytes() == panel.tobytes()


def test_wide_pictures_are_made_to_fit() -> None:
    assert fitting(1, 4000, 1000) == (1920, 480)
    assert fitting(3, 640, 480) == (637, 478)


def test_a_film_of_tasks_of_several_models(tmp_path, known_gl) -> None:
    """Two rows; names are written, and the last place is empty."""
    tasks = ("reach", "door-open", "window-close", "button-press", "coffee-pull")
    frames = film(tmp_path / "five", tasks=tasks, max_episode_steps=2)
    assert frames.shape == (2 + 1 + FPS, 2 * (SIZE + 9) + 4, 3 * SIZE + 2 * 4, 3)
    panels = [frames[0, row : row + 105, column : column + SIZE] for row in (0, 109) for column in (0, 100, 200)]
    assert near(panels[5], (255, 255, 255)).all()
    for one, two in itertools.combinations(panels, 2):
        assert np.abs(one[9:].astype(int) - two[9:]).mean() > 5
    for panel in panels[:5]:
        assert panel[:9].max() > 120 > np.median(panel[:9])  # light on dark


def test_success_shows_and_ends_the_episode_half_a_second_later(tmp_path, known_gl, monkeypatch) -> None:
    monkeypatch.setattr(Stage, "picture", lambda *_: np.zeros((SIZE, SIZE, 3), np.uint8))  # to be quick
    steps = []

    def act(observation: np.ndarray, task: str) -> np.ndarray:
        assert observation.shape == (1, 39) and task == "reach-v3"
        steps.append(observation)
        return solve(observation, task)

    frames = film(tmp_path / "solved", act, max_episode_steps=150, seed=25)
    sim = SimBatch(MT3[:1], [0], seed=25)
    observation, success = sim.reset(), 0
    while not success:
        step = sim.step(solve(observation, "reach-v3"))
        observation, success = step.observation, step.success[0] * sim.elapsed[0]
    assert len(steps) == success + 40
    assert len(frames) == success + 40 + 1 + FPS
    border = near(frames[:, SIZE // 2, 0], GREEN)
    assert border.tolist() == [t >= success for t in range(len(frames))]
    assert not near(frames, RED)[:, :, 0].any()


def test_doing_nothing_fails(tmp_path, known_gl) -> None:
    """Two episodes of the time limit."""
    frames = film(tmp_path / "failed", tasks=("push", "reach-v3"), episodes=2, max_episode_steps=6)
    length = 6 + 1 + FPS
    assert len(frames) == 2 * length
    for first_column in (0, SIZE + 4):
        red = near(frames[:, SIZE // 2, first_column], RED)
        assert red.tolist() == 2 * [t >= 6 for t in range(length)]
    assert not near(frames[:, SIZE // 2], GREEN).any()
    assert np.abs(frames[0].astype(int) - frames[length]).max() > 50  # another goal


def test_finished_tasks_stand_still_until_all_are_done(tmp_path, monkeypatch, known_gl) -> None:
    monkeypatch.setattr("mtrl_vec.commands.video.STEPS_AFTER_SUCCESS", 1)
    tasks = ("reach-v3", "push-v3")
    asked = []

    def act(observation: np.ndarray, task: str) -> np.ndarray:
        asked.append(task)
        return solve(observation, task) if task == "reach-v3" else idle(observation, task)

    frames = film(tmp_path / "wait", act, tasks, max_episode_steps=38, seed=25)
    reached = asked.count("reach-v3")
    assert reached < 34 and asked.count("push-v3") == 38
    left, right = frames[reached:39, :, :SIZE].astype(int), frames[reached:39, :, SIZE + 4 :].astype(int)
    assert np.abs(left - left[0]).max() < 40  # but for the encoder
    assert near(left[:, SIZE // 2, 0], GREEN).all()
    assert np.abs(right[-1] - right[0]).max() > 80  # its time goes on


def test_files_are_as_asked_for(tmp_path, working_gl) -> None:
    av, image = pytest.importorskip("av"), pytest.importorskip("PIL.Image")
    frames = film(tmp_path / "v1.0", width=91, height=70, fps=40)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v1.0.gif", "v1.0.mp4"]
    with av.open(tmp_path / "v1.0.mp4") as file:
        stream = file.streams.video[0]
        assert (stream.codec.canonical_name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 40)
        assert stream.frames == len(frames) == 3 + 1 + 40
    assert frames.shape[1:] == (80, 92, 3)  # with a line of text 9 high, made even
    with image.open(tmp_path / "v1.0.gif") as gif:
        assert gif.size == (92, 80) and gif.info["loop"] == 0
        lengths, pictures = [], []
        for k in range(gif.n_frames):
            gif.seek(k)
            lengths.append(gif.info["duration"])
            pictures.append(np.asarray(gif.convert("RGB"), dtype=int))
    assert lengths[0] == 50 and sum(lengths) == 44 * 1000 / 40  # every other frame, those that repeat made one
    for picture, frame, failed in ((pictures[0], frames[0], False), (pictures[-1], frames[-1], True)):
        assert np.abs(picture - frame).mean() < 10  # 256 colours against H.264
        assert near(picture, RED)[40, 0] == failed


def test_the_seed_decides(tmp_path, known_gl) -> None:
    one, two, other = (film(tmp_path / name, seed=seed) for name, seed in (("one", 3), ("two", 3), ("other", 4)))
    np.testing.assert_array_equal(one, two)
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()
    assert np.abs(one[0].astype(int) - other[0]).max() > 50


# -- what goes wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["fly-v3"]}, "unknown task 'fly-v3'"),
        ({"episodes": 0}, "episodes is 0: it must be at least 1"),
        ({"max_episode_steps": -1}, "max_episode_steps is -1: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"width": 63}, "width is 63: it must be at least 64"),
        ({"height": 0}, "height is 0"),
        ({"fps": 0}, "fps is 0"),
        ({"out": "missing/video"}, "cannot write to folder .*missing .No such file or directory.: give another one"),
        ({"out": "file/video"}, "cannot write to folder .*file .Not a directory."),
        ({"out": "taken"}, "cannot write to .*taken.mp4: give another name"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_simulated(options, message, tmp_path, monkeypatch) -> None:
    pytest.importorskip("av")
    monkeypatch.setattr("mtrl_vec.commands.video.Stage", None)
    (tmp_path / "file").touch()
    (tmp_path / "taken.mp4").mkdir()
    options = {"tasks": ["reach-v3"]} | options
    with pytest.raises(InputError, match=f"^{message}") as error:
        record(idle, options.pop("tasks"), tmp_path / options.pop("out", "video"), **options)
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "taken.mp4"]


@pytest.mark.parametrize("package", ["av", "imageio"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"^video needs imageio and av: pip install 'mtrl_vec\[pictures\]'$"):
        record(idle, ["reach-v3"], tmp_path / "video")
    assert not list(tmp_path.iterdir())


def test_no_opengl_is_found_out_before_anything_is_simulated(tmp_path, monkeypatch) -> None:
    pytest.importorskip("av")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setattr("mtrl_vec.sim.SimBatch", None)
    with pytest.raises(InputError, match="MUJOCO_GL=glfw does not work here"):
        record(idle, ["reach-v3"], tmp_path / "video")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_what_was_there(failure, tmp_path, known_gl) -> None:
    pytest.importorskip("av")
    for end in ("mp4", "gif"):
        (tmp_path / f"video.{end}").write_text("mine")

    def act(observation: np.ndarray, task: str) -> np.ndarray:
        assert len(list(tmp_path.iterdir())) == 3  # something is being written
        raise failure

    with pytest.raises(failure):
        film(tmp_path / "video", act)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"video.mp4": "mine", "video.gif": "mine"}
