"""The rows of the catalog against Meta-World's own classes, the names people type, and tasks of their own."""

from __future__ import annotations

import dataclasses
import pickle
from functools import cache

import metaworld
import mujoco
import numpy as np
import pytest
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

from metaworld_oracle import make_env
from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.sim import SimBatch
from mtrl_vec.sim.rotation import quaternions
from mtrl_vec.tasks.catalog.common import at_drawn
from mtrl_vec.tasks.draw import Draw, benchmark_vectors
from mtrl_vec.tasks.suite import MT3, MT10, MT50, UnknownTask, fixed_vectors, register_task, resolve_tasks
from mtrl_vec.tasks.task import Orientation, Position, Task
from mtrl_vec.tasks.terms import band_tolerance, gaussian_tolerance, hamacher, rectangular_prism, tolerance

every_task = pytest.mark.parametrize("task", MT50, ids=[task.name for task in MT50])


@cache
def real(name: str) -> SawyerXYZEnv:
    env = make_env(name)
    env._partially_observable = False
    return env


@every_task
def test_a_row_is_what_metaworlds_class_says(task: Task) -> None:
    env = real(task.name)
    np.testing.assert_array_equal(env._random_reset_space.low, task.draw.low)
    np.testing.assert_array_equal(env._random_reset_space.high, task.draw.high)
    np.testing.assert_array_equal(env.goal_space.low, task.goal_low)
    np.testing.assert_array_equal(env.goal_space.high, task.goal_high)
    np.testing.assert_array_equal(env.hand_init_pos, task.hand_init)
    np.testing.assert_array_equal(env.mocap_low, task.mocap_low)
    np.testing.assert_array_equal(env.mocap_high, task.mocap_high)


def test_sets_are_metaworlds_in_its_order() -> None:
    assert [task.name for task in MT10] == list(metaworld.env_dict.MT10_V3)
    assert [task.name for task in MT50] == list(metaworld.env_dict.MT50_V3)


def vectors_of(tasks: list) -> dict[str, np.ndarray]:
    found: dict[str, list] = {}
    for task in tasks:
        found.setdefault(task.env_name, []).append(pickle.loads(task.data)["rand_vec"])
    return {name: np.stack(vectors) for name, vectors in found.items()}


@pytest.mark.parametrize("name", ["push-v3", "sweep-v3", "sweep-into-v3", "shelf-place-v3"])
def test_fixed_vectors_of_a_task_are_metaworlds_fifty(name: str, without_settling) -> None:
    (task,) = resolve_tasks([name])
    for seed in (0, 42):
        expected = vectors_of(metaworld.MT1(name, seed=seed).train_tasks)[name]
        np.testing.assert_array_equal(fixed_vectors([task], seed)[0], expected)


@pytest.mark.parametrize(
    ("tasks", "benchmark"),
    [
        pytest.param(MT10, metaworld.MT10, id="MT10"),
        pytest.param(MT50, metaworld.MT50, id="MT50", marks=pytest.mark.slow),
    ],
)
def test_fixed_vectors_of_a_benchmark_are_metaworlds(tasks, benchmark, without_settling) -> None:
    """One random stream runs through all tasks of a benchmark."""
    expected = vectors_of(benchmark(seed=5).train_tasks)
    for task, vectors in zip(tasks, fixed_vectors(tasks, 5), strict=True):
        np.testing.assert_array_equal(vectors, expected[task.name], err_msg=task.name)
    alone = benchmark_vectors([tasks[1].draw], 5)[0]
    assert not np.array_equal(alone, expected[tasks[1].name])


@pytest.fixture
def without_settling(monkeypatch) -> None:
    """What Meta-World draws does not depend on the hand's settling, which takes nearly all of the time."""

    def reset_hand(env: SawyerXYZEnv, steps: int = 50) -> None:
        mujoco.mj_forward(env.model, env.data)
        env.init_tcp = env.tcp_center

    monkeypatch.setattr(SawyerXYZEnv, "_reset_hand", reset_hand)


def test_sampled_goals_fill_their_range_but_keep_their_distance() -> None:
    rng = np.random.default_rng(0)
    for task in MT50:
        draw, vectors = task.draw, np.stack([task.draw.sample(rng) for _ in range(1000)])
        other = vectors[:, -3:-1] if draw.keep_from is None else np.array(draw.keep_from)
        assert (np.linalg.norm(vectors[:, :2] - other, axis=1) >= draw.min_distance).all() or not draw.min_distance
        low, high = np.array(draw.low), np.array(draw.high)
        spread = (vectors.max(0) - vectors.min(0)) / np.where(high > low, high - low, 1)
        assert ((vectors >= low) & (vectors <= high)).all()
        assert (spread[high > low] > 0.8).all()  # corners may be too close


def test_terms_equal_metaworlds() -> None:
    rng = np.random.default_rng(0)
    x, margin = rng.uniform(-0.1, 0.3, 500), rng.uniform(0, 0.4, 500)
    margin[:50] = 0.0
    theirs = [reward_utils.tolerance(a, (0.015, 0.05), m, "long_tail") for a, m in zip(x, margin, strict=True)]
    np.testing.assert_allclose(band_tolerance(x, 0.015, 0.05, margin), theirs, rtol=1e-14, atol=1e-200)
    x = np.abs(x)
    for ours, sigmoid in ((tolerance, "long_tail"), (gaussian_tolerance, "gaussian")):
        theirs = [reward_utils.tolerance(a, (0, 0.05), m, sigmoid) for a, m in zip(x, margin, strict=True)]
        np.testing.assert_allclose(ours(x, 0.05, margin), theirs, rtol=1e-13, atol=1e-200)
    a, b = rng.uniform(0, 1, 500), rng.uniform(0, 1, 500)
    a[:20], b[10:30] = 0.0, 0.0
    np.testing.assert_allclose(hamacher(a, b), [reward_utils.hamacher_product(*ab) for ab in zip(a, b, strict=True)])
    points, zero, one = (rng.uniform(0, 1, (500, 3)) for _ in range(3))
    theirs = [reward_utils.rect_prism_tolerance(*rows) for rows in zip(points, zero, one, strict=True)]
    np.testing.assert_allclose(rectangular_prism(points, zero, one), theirs)


def test_quaternions_are_scipys_to_the_last_bit() -> None:
    random = Rotation.random(5000, rng=0)
    turns = Rotation.from_euler("xyz", np.random.default_rng(1).integers(-2, 3, (5000, 3)) * 90 + 1e-4, degrees=True)
    for rotations in (random, turns):
        matrices = rotations.as_matrix()
        np.testing.assert_array_equal(quaternions(matrices), Rotation.from_matrix(matrices).as_quat())


def test_names_people_type(capsys) -> None:
    assert [t.name for t in resolve_tasks(["pick-place", "reach-v3"])] == ["pick-place-v3", "reach-v3"]
    assert resolve_tasks(["MT10"]) == resolve_tasks(["mt10"]) == MT10
    assert resolve_tasks(["MT3", "door-open"])[:3] == MT3
    assert capsys.readouterr().err == ""
    assert resolve_tasks(["push-v2-goal-observable"])[0].name == "push-v3"
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert "push-v2-goal-observable" in notice and "push-v3" in notice


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pick-plaec-v3"], r"unknown task 'pick-plaec-v3': did you mean pick-place-v3\?"),
        (["button-press-topdwn"], r"unknown task 'button-press-topdwn': did you mean button-press-topdown-v3\?"),
        (["MT5O"], r"unknown task 'MT5O': did you mean MT50\?"),
        (["fly"], "unknown task 'fly': name a set.*one of your own has to be registered first"),
        (["reach-v3 "], "unknown task"),
        (["reach", "reach-v2"], "task 'reach-v3' is given twice"),
        (["MT10", "door-open"], "task 'door-open-v3' is given and is in MT10: name each task once"),
        (["window-open", "MT10"], "task 'window-open-v3' is given and is in MT10: name each task once"),
        (["MT3", "MT10"], "task 'reach-v3' is given and is in MT10"),
        ([], "no task given"),
    ],
)
def test_bad_names(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_tasks(names)


def test_names_of_your_own_tasks(monkeypatch) -> None:
    monkeypatch.setattr("mtrl_vec.tasks.suite._KNOWN", {task.name: task for task in MT50})
    mine = dataclasses.replace(MT3[0], name="my-reach")
    with pytest.raises(UnknownTask, match="unknown task 'my-reach': did you mean reach-v3") as error:
        resolve_tasks(["my-reach"])
    sent = pickle.loads(pickle.dumps(error.value))  # as between ranks
    assert sent.name == "my-reach" and str(sent) == str(error.value)
    register_task(mine)
    register_task(mine)  # as when its module is imported again
    assert resolve_tasks(["my-reach", "push"]) == (mine, MT3[1])
    with pytest.raises(InputError, match="a task named 'push-v3' exists already: give yours another name"):
        register_task(dataclasses.replace(mine, name="push-v3"))
    for name in ("mt10", "push", "push-v2"):
        with pytest.raises(InputError, match=f"task name '{name}' stands for something else already"):
            register_task(dataclasses.replace(mine, name=name))
    with pytest.raises(InputError, match="task 'push-v3' is not registered: call register_task with it first"):
        TrainConfig.of(tasks=[dataclasses.replace(MT3[1])])
    with pytest.raises(InputError, match="task name 'My reach' has other characters than a to z, 0 to 9 and '-'"):
        register_task(dataclasses.replace(mine, name="My reach"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obj": Position("joint", "objjoint")}, "task mine reads a 'joint': it must be one of body, site, geom"),
        ({"orientation": Orientation("geom", "objGeom", xyzw=False)}, "xyzw=False, which only bodies have"),
        ({"fixture": "obj"}, "has fixture obj and place_fixture None: give both or neither"),
        ({"points": (Position("site", "goal"),) * 6}, "has 6 points: there is room for 5"),
    ],
)
def test_a_task_whose_fields_do_not_go_together(changes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(MT3[0], name="mine", **changes)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (((0, 1, 0), (0, 0, 0)), "give a box, low before high"),
        (((0, 0, 0), (1, 1, 1), 0.1), r"draw of 3 numbers with min_distance 0\.1: there is no goal"),
        (((0,) * 6, (0.1,) * 6, 0.5), r"nothing is 0\.5 m apart, make it less"),
    ],
)
def test_draws_that_cannot_be(draw: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Draw(*draw).sample(np.random.default_rng(0))


def test_tasks_of_one_formula_have_the_same_params() -> None:
    other = dataclasses.replace(MT3[0], name="mine", params={})
    with pytest.raises(InputError, match="tasks reach-v3 and mine share a reward function, but not the names"):
        SimBatch([MT3[0], other], [0, 1])


def test_a_visual_geom_is_kept_for_whatever_reads_it() -> None:
    """The door's handle, read as a second object: it is where the door's own task observes it."""
    (door,) = resolve_tasks(["door-open"])
    mine = dataclasses.replace(door, name="mine", obj=Position("body", "door_link"), second=door.obj)
    sim, expected = SimBatch([mine], [0]), SimBatch([door], [0])
    vector = door.draw.sample(np.random.default_rng(0))
    sim.reset(vectors=[vector])
    expected.reset(vectors=[vector])
    action = np.full((1, 4), 0.5, np.float32)
    np.testing.assert_array_equal(sim.step(action).observation[:, 11:14], expected.step(action).observation[:, 4:7])


def test_unstable_rows_of_every_task_are_harmless() -> None:
    """Without a warning of NumPy, which is an error here."""
    sim = SimBatch(MT50, np.arange(50))
    sim.reset()
    sim.state[:, 20] = 1e12
    step = sim.step(np.zeros((50, 4), np.float32))
    assert step.unstable.all() and np.isfinite(step.reward).all()


def model_without(tmp_path, what: str) -> str:
    """Meta-World's arm alone is in the assets as an include; a plain scene lacks all of it."""
    file = tmp_path / "scene.xml"
    file.write_text(f"<mujoco><worldbody>{what}</worldbody></mujoco>")
    return str(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obj": Position("body", "ball")}, "model .*pick_place.* has no body named 'ball', which the task reads"),
        ({"joint": "hinge"}, "has no joint named 'hinge', which the task reads"),
        ({"touch": "brick"}, "has no geom named 'brick', which the task reads"),
        ({"fixture": "door", "place_fixture": at_drawn}, "has no body named 'door', which the task reads"),
    ],
)
def test_a_task_whose_model_lacks_what_it_reads(changes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SimBatch([dataclasses.replace(MT3[0], name="mine", **changes)], [0])


def test_a_model_that_is_no_arm_or_is_not_there(tmp_path) -> None:
    file = model_without(tmp_path, '<geom name="ball" size="0.1"/>')
    with pytest.raises(InputError, match="has 0 actuators and 0 mocap bodies: actions drive Meta-World's arm"):
        SimBatch([dataclasses.replace(MT3[0], name="mine", model_file=file)], [0])
    with pytest.raises(InputError, match=r"model /nowhere\.xml does not compile"):
        SimBatch([dataclasses.replace(MT3[0], name="mine", model_file="/nowhere.xml")], [0])
