"""`SimBatch` beyond parity: resets, random streams, time limits, unstable physics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from metaworld_oracle import TASK_NAMES, expert
from mtrl_vec.sim import SimBatch, Step
from mtrl_vec.sim.compilation import load_model
from mtrl_vec.tasks.suite import MT3, fixed_vectors
from mtrl_vec.tasks.task import Task

MODELS = [f"sawyer_xyz/sawyer_{name}_v3.xml" for name in ("reach", "push", "pick_place")]
"""Meta-World's own for each task: identical but for the goal's marker."""


def random_actions(n: int, steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, n, 4)).astype(np.float32)


def with_models(*models: str) -> tuple[Task, ...]:
    """The tasks with other model files, and so in as many worlds as there are different ones."""
    return tuple(dataclasses.replace(task, model_file=model) for task, model in zip(MT3, models, strict=True))


REACH, PUSH, PICK_PLACE = MODELS
WORLDS = {
    "reach apart": with_models(REACH, PICK_PLACE, PICK_PLACE),
    "push apart": with_models(PICK_PLACE, PUSH, PICK_PLACE),
    "three worlds": with_models(REACH, PUSH, PICK_PLACE),
}
in_worlds = pytest.mark.parametrize("tasks", WORLDS.values(), ids=WORLDS)


def test_results_do_not_depend_on_how_slots_are_grouped() -> None:
    actions = random_actions(6, 30)
    whole = SimBatch(MT3, np.arange(6) % 3, seed=3, random_phase=True)
    parts = [SimBatch(MT3, np.arange(f, f + 3) % 3, seed=3, first_slot=f, random_phase=True) for f in (0, 3)]
    np.testing.assert_array_equal(whole.reset(), np.concatenate([p.reset() for p in parts]))
    np.testing.assert_array_equal(whole.elapsed, np.concatenate([p.elapsed for p in parts]))
    for action in actions:
        one = whole.step(action)
        two = [parts[0].step(action[:3]), parts[1].step(action[3:])]
        for a, b in zip(one, zip(*two, strict=True), strict=True):
            np.testing.assert_array_equal(a, np.concatenate(b))


def test_resting_after_success_changes_nothing_before_it_and_nothing_moves_after() -> None:
    """Meta-World's experts in both, fed with the same observations, over an episode and a reset."""
    task_idx = np.arange(6) % 3
    usual, lazy = (SimBatch(MT3, task_idx, seed=1, rest_after_success=rest) for rest in (False, True))
    experts = [expert(TASK_NAMES[k]) for k in task_idx]
    physics = slice(
        0, usual.worlds[0].parts["CTRL"].start
    )  # clock, positions, velocities; what follows is only what acts on them
    for _ in range(2):
        observation = usual.reset()
        np.testing.assert_array_equal(lazy.reset(), observation)
        rested = np.zeros(6, dtype=bool)
        resting_state = lazy.state.copy()
        for _ in range(120):
            action = np.stack([e.get_action(o) for e, o in zip(experts, observation, strict=True)]).astype(np.float32)
            one, two = usual.step(action), lazy.step(action)
            np.testing.assert_array_equal(lazy.state[rested][:, physics], resting_state[rested][:, physics])
            assert two.success[rested].all() and not two.unstable.any()
            for a, b in zip(one, two, strict=True):
                np.testing.assert_array_equal(a[~rested], b[~rested])
            new = two.success & ~rested
            resting_state[new] = lazy.state[new]
            rested |= new
            observation = one.observation
            if rested.all():
                break
        assert rested.all()


def test_seeds_and_slots_draw_different_goals() -> None:
    goals = [SimBatch(MT3, [0, 0, 0], seed=s).reset()[:, 36:] for s in (0, 1)]
    assert len(np.unique(np.concatenate(goals), axis=0)) == 6
    sim = SimBatch(MT3, [0], seed=0)
    assert not np.array_equal(sim.reset()[0, 36:], sim.reset()[0, 36:])


def test_the_goal_is_visible_after_a_step() -> None:
    """With the goal-hidden bounds, which Meta-World caches at first, the clip would zero it."""
    sim = SimBatch(MT3, [0, 1, 2])
    first = sim.reset()
    step = sim.step(np.zeros((3, 4), np.float32))
    assert (np.abs(step.observation[:, 37]) >= 0.8).all()
    np.testing.assert_allclose(step.observation[:, 36:], first[:, 36:], atol=1e-4)


def test_time_limit_and_reset_counts() -> None:
    sim = SimBatch(MT3, [0, 1, 2], max_episode_steps=5)
    sim.reset()
    for t in range(1, 6):
        truncated = sim.step(np.zeros((3, 4), np.float32)).truncated
        assert truncated.tolist() == [t == 5] * 3
    sim.reset(np.array([True, False, True]))
    assert sim.elapsed.tolist() == [0, 5, 0]


def test_random_phases_spread_the_first_episodes_only() -> None:
    sim = SimBatch(MT3, np.zeros(300, int), random_phase=True)
    sim.reset()
    counts, _ = np.histogram(sim.elapsed, bins=5, range=(0, 500))
    assert counts.min() > 35  # 60 expected, standard deviation 7
    sim.reset()
    assert (sim.elapsed == 0).all()


@pytest.mark.parametrize("task", MT3, ids=TASK_NAMES)
def test_fixed_goals_are_the_fifty_of_the_benchmark_seed(task) -> None:
    sim = SimBatch([task], np.zeros(400, int), goals_seed=7)
    seen = np.unique(sim.reset()[:, 36:38], axis=0)
    expected = np.unique(fixed_vectors([task], 7)[0][:, 3:5], axis=0)
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("tasks", [MT3, WORLDS["three worlds"]], ids=["one world", "three worlds"])
def test_unstable_physics_truncates_its_slot_and_leaves_the_others_alone(tasks) -> None:
    actions = random_actions(3, 20)
    sim, undisturbed = SimBatch(tasks, [0, 1, 2]), SimBatch(tasks, [0, 1, 2])
    sim.reset(), undisturbed.reset()
    for t, action in enumerate(actions):
        if t == 10:
            sim.state[1, 20] = 1e12  # a velocity that no simulation survives
        if t == 12:
            action[2] = np.nan
            last_good = sim.observation[2].copy()
        step, expected = sim.step(action), undisturbed.step(np.nan_to_num(action))
        assert step.unstable.tolist() == [False, t == 10, t == 12]
        np.testing.assert_array_equal(step.observation[0], expected.observation[0])
        assert np.isfinite(step.observation).all() and np.isfinite(step.reward).all()
        if t == 10:
            assert step.truncated.tolist() == [False, True, False]
            assert step.reward[1] == 0 and not step.success[1]
            sim.reset(np.array([False, True, False]))
        if t == 12:
            np.testing.assert_array_equal(step.observation[2], last_good)
            sim.reset(np.array([False, False, True]))
        elif t > 12:
            assert not step.truncated.any()


def test_physics_warnings_leave_no_file_behind(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sim = SimBatch(MT3, [0])
    sim.reset()
    sim.state[0, 20] = 1e12
    assert sim.step(np.zeros((1, 4), np.float32)).unstable[0]
    assert list(tmp_path.iterdir()) == []


def test_a_saved_row_continues_with_the_same_bits() -> None:
    actions = random_actions(2, 40)
    sim = SimBatch(MT3, [1, 2])
    sim.reset()
    for action in actions[:20]:
        sim.step(action)
    saved = sim.state.copy()
    first = [sim.step(action).observation[:, :7] for action in actions[20:]]
    sim.state[:] = saved
    second = [sim.step(action).observation[:, :7] for action in actions[20:]]
    np.testing.assert_array_equal(first, second)


def test_the_three_models_differ_only_in_the_goal_marker() -> None:
    """What lets one model serve all tasks; a new Meta-World release could end it."""
    import mujoco
    from metaworld.asset_path_utils import full_V3_path_for

    models = [mujoco.MjModel.from_xml_path(full_V3_path_for(model)) for model in MODELS]
    marker = {"site_pos", "site_rgba"}
    for attribute in dir(models[0]):
        value = getattr(models[0], attribute)
        if isinstance(value, np.ndarray) and attribute not in marker:
            for other in models[1:]:
                np.testing.assert_array_equal(value, getattr(other, attribute), err_msg=attribute)
    (file,) = {task.model_file for task in MT3}
    assert load_model(file).ngeom < load_model(file, visual=True).ngeom == models[0].ngeom


def test_a_restored_simulation_goes_on_to_the_last_bit_in_another_simulator() -> None:
    """With resets, random draws and contacts after the snapshot; the other one has another past and another seed."""
    options = {"max_episode_steps": 25, "random_phase": True, "rest_after_success": True}
    first = SimBatch(MT3, np.arange(6) % 3, seed=7, **options)
    second = SimBatch(MT3, np.arange(6)[::-1] % 3, seed=8, first_slot=100, **options)
    actions = np.random.default_rng(0).uniform(-1, 1, (80, 6, 4)).astype(np.float32)
    for sim, start in ((first, 0), (second, 10)):
        sim.reset()
        for action in actions[start : start + 30]:
            sim.reset(sim.step(action).truncated)
    first._rngs[2].integers(10, dtype=np.uint32)  # leaves half of a draw behind, which is part of the state
    second.restore({name: array.copy() for name, array in first.snapshot().items()})
    for action in actions[30:]:
        theirs, ours = first.step(action), second.step(action)
        for name, expected, got in zip(theirs._fields, theirs, ours, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=name)
        np.testing.assert_array_equal(first.reset(theirs.truncated), second.reset(ours.truncated))
    assert first._rngs[2].integers(10, dtype=np.uint32) == second._rngs[2].integers(10, dtype=np.uint32)


def test_a_snapshot_is_a_copy() -> None:
    sim = SimBatch(MT3, [0, 1, 2], seed=7)
    sim.reset()
    snapshot = sim.snapshot()
    kept = {name: array.copy() for name, array in snapshot.items()}
    sim.step(np.ones((3, 4), np.float32))
    sim.reset()
    for name, array in kept.items():
        np.testing.assert_array_equal(snapshot[name], array, err_msg=name)
        assert len(array) == 3


def act(experts: list, sim: SimBatch, random: np.ndarray) -> np.ndarray:
    """Actions [n, 4] of the experts of the slots' tasks in even slots, random ones in the others."""
    action = random.copy()
    for slot in range(0, sim.num_slots, 2):
        action[slot] = experts[sim.task_idx[slot]].get_action(sim.observation[slot])
    return action


def assert_step_and_reset_alike(one: SimBatch, other: SimBatch, action: np.ndarray) -> Step:
    """Step both and reset what is truncated; every number that comes out is the same. Returns the step's."""
    step, got = one.step(action), other.step(action)
    for name, expected, value in zip(step._fields, step, got, strict=True):
        np.testing.assert_array_equal(value, expected, err_msg=name)
    np.testing.assert_array_equal(other.reset(step.truncated), one.reset(step.truncated))
    np.testing.assert_array_equal(other.task_idx, one.task_idx)
    return step


@in_worlds
def test_tasks_in_worlds_of_their_own_give_the_bits_of_one_world(tasks) -> None:
    """Also where slots change to a task of another world at a reset, and while a world has no slot at all."""
    n, options = 9, {"seed": 3, "max_episode_steps": 60, "random_phase": True}
    one, other = (SimBatch(some, np.arange(n) % 3, **options) for some in (MT3, tasks))
    assert len(one.worlds) == 1 and len(other.worlds) == len({task.model_file for task in tasks}) > 1
    np.testing.assert_array_equal(other.reset(), one.reset())
    experts, actions = [expert(name) for name in TASK_NAMES], random_actions(n, 200)
    apart = np.array([task.model_file != PICK_PLACE for task in tasks])  # from the last task
    # The marker that a slot's positions were computed with tells its world, in which nothing else is different.
    markers = np.array([load_model(task.model_file).site("goal").pos for task in tasks])
    marker = slice(3 * one.worlds[0].model.nbody, 3 * one.worlds[0].model.nbody + 3)  # sites come after bodies
    assert one.worlds[0].model.site(0).name == "goal"
    moved, succeeded = 0, np.zeros(3, dtype=bool)
    for t, random in enumerate(actions):
        if t == 20:
            one.set_task_probs(np.ones(3) / 3), other.set_task_probs(np.ones(3) / 3)
        if t == 100:  # to chosen tasks and vectors, and all slots away from the others' worlds
            task_idx, rng = np.full(n, 2), np.random.default_rng(0)
            vectors = np.stack([MT3[k].draw.sample(rng) for k in task_idx])
            start = [sim.reset(task_idx=task_idx, vectors=vectors) for sim in (one, other)]
            np.testing.assert_array_equal(*start)
        before = apart[other.task_idx]
        step = assert_step_and_reset_alike(one, other, act(experts, one, random))
        np.testing.assert_allclose(other.snapshot()["raw"][:, marker], markers[other.task_idx], atol=1e-12)
        moved += int((before != apart[other.task_idx]).sum())
        succeeded[one.task_idx[step.success]] = True
    assert moved >= 4 and succeeded[:2].all()  # else this would prove little
    theirs, ours = one.snapshot(), other.snapshot()
    for arrays in (theirs, ours):
        arrays["raw"][:, marker] = 0.0  # nothing reads it
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@in_worlds
def test_a_snapshot_goes_on_in_another_instance_and_in_other_worlds(tasks) -> None:
    n, options = 6, {"max_episode_steps": 25, "random_phase": True, "rest_after_success": True}
    probs = np.array([0.3, 0.3, 0.4])
    first = SimBatch(tasks, np.arange(n) % 3, seed=7, **options)
    others = [SimBatch(some, np.arange(n)[::-1] % 3, seed=8, first_slot=100, **options) for some in (tasks, MT3)]
    actions = random_actions(n, 90)
    for start, sim in enumerate((first, *others)):  # each with a past of its own
        sim.set_task_probs(probs)
        sim.reset()
        for action in actions[10 * start : 10 * start + 30]:
            sim.reset(sim.step(action).truncated)
    snapshot = first.snapshot()
    for other in others:
        assert not np.array_equal(other.task_idx, first.task_idx)
        first.restore(snapshot)
        other.restore({name: array.copy() for name, array in snapshot.items()})
        np.testing.assert_array_equal(other.task_idx, snapshot["task_idx"])
        resets = sum(assert_step_and_reset_alike(first, other, action).truncated.sum() for action in actions[30:])
        assert resets > n and not np.array_equal(first.task_idx, snapshot["task_idx"])
