"""The task table against Meta-World's own classes, and the names people type."""

from __future__ import annotations

import pickle

import metaworld
import numpy as np
import pytest
from metaworld.utils import reward_utils

from metaworld_oracle import TASK_NAMES, make_env
from mtrl_vec.errors import InputError
from mtrl_vec.tasks.rewards import hamacher, tolerance
from mtrl_vec.tasks.suite import TASKS, resolve_tasks


@pytest.mark.parametrize("task", TASKS, ids=TASK_NAMES)
def test_reset_ranges_are_metaworlds(task) -> None:
    space = make_env(task.name)._random_reset_space
    np.testing.assert_array_equal(space.low, task.draw.low)
    np.testing.assert_array_equal(space.high, task.draw.high)
    # The goal is drawn from within what it is clipped to in observations.
    np.testing.assert_array_equal(space.low[3:], task.goal_low)
    np.testing.assert_array_equal(space.high[3:], task.goal_high)


@pytest.mark.parametrize("task", TASKS, ids=TASK_NAMES)
def test_benchmark_vectors_are_metaworlds_fifty(task) -> None:
    for seed in (0, 42):
        expected = [pickle.loads(t.data)["rand_vec"] for t in metaworld.MT1(task.name, seed=seed).train_tasks]
        np.testing.assert_array_equal(task.draw.benchmark_vectors(seed), expected)


def test_sampled_goals_fill_their_range_but_keep_their_distance() -> None:
    rng = np.random.default_rng(0)
    for task in TASKS:
        vectors = np.stack([task.draw.sample(rng) for _ in range(2000)])
        assert (np.linalg.norm(vectors[:, :2] - vectors[:, 3:5], axis=1) >= 0.15).all()
        low, high = np.array(task.draw.low), np.array(task.draw.high)
        spread = (vectors.max(0) - vectors.min(0)) / np.where(high > low, high - low, 1)
        assert ((vectors >= low) & (vectors <= high)).all()
        assert (spread[high > low] > 0.98).all()


def test_tolerance_and_hamacher_equal_metaworlds() -> None:
    rng = np.random.default_rng(0)
    x, margin = rng.uniform(-0.1, 0.3, 500), rng.uniform(0, 0.4, 500)
    margin[:50] = 0.0
    ours = tolerance(x, 0.015, 0.05, margin)
    theirs = [reward_utils.tolerance(a, (0.015, 0.05), m, "long_tail") for a, m in zip(x, margin, strict=True)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    a, b = rng.uniform(0, 1, 500), rng.uniform(0, 1, 500)
    a[:20], b[10:30] = 0.0, 0.0
    np.testing.assert_allclose(hamacher(a, b), [reward_utils.hamacher_product(*ab) for ab in zip(a, b, strict=True)])


def test_names_people_type(capsys) -> None:
    assert [t.name for t in resolve_tasks(["pick-place", "reach-v3"])] == ["pick-place-v3", "reach-v3"]
    assert capsys.readouterr().err == ""
    assert resolve_tasks(["push-v2-goal-observable"])[0].name == "push-v3"
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert "push-v2-goal-observable" in notice and "push-v3" in notice


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fly-v3"], "unknown task 'fly-v3': known tasks are reach-v3, push-v3, pick-place-v3"),
        (["reach-v3 "], "unknown task"),
        (["reach", "reach-v2"], "task 'reach-v3' is given twice"),
        ([], "no task given"),
    ],
)
def test_bad_names(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_tasks(names)
