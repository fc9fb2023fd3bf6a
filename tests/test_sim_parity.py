"""`SimBatch` against the real Meta-World, step by step, in all fifty tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pytest

from metaworld_oracle import expert, judge, make_env, set_vector
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import MT10, MT50
from mtrl_vec.tasks.task import Task

FAILING_EXPERTS = {"disassemble-v3"}
"""Tasks whose scripted expert does not always succeed, less so with noise."""


class Pair:
    """A batch of slots and a real environment for each, always given the same actions."""

    def __init__(self, tasks: Sequence[Task], slots_per_task: int, seed: int = 0) -> None:
        self.tasks = tasks
        self.sim = SimBatch(tasks, np.arange(slots_per_task * len(tasks)) % len(tasks))
        self.rng = np.random.default_rng(seed)
        self.envs = [make_env(self.name(slot)) for slot in range(self.sim.num_slots)]
        self.succeeded = np.zeros(len(tasks), dtype=bool)

    def name(self, slot: int) -> str:
        return self.tasks[self.sim.task_idx[slot]].name

    def reset(self, vectors: list[np.ndarray] | None = None) -> None:
        """Start an episode in all of them: the first observations are the same bits."""
        drawn = [self.tasks[k].draw.sample(self.rng) for k in self.sim.task_idx] if vectors is None else vectors
        self.experts = [expert(self.name(slot)) for slot in range(self.sim.num_slots)]
        observations = self.sim.reset(vectors=drawn)
        for slot, (env, vector) in enumerate(zip(self.envs, drawn, strict=True)):
            np.testing.assert_array_equal(observations[slot], set_vector(env, vector), err_msg=self.name(slot))

    def actions(self, with_expert: np.ndarray) -> np.ndarray:
        """Of the expert with noise in some slots; random beyond [-1, 1] in the others."""
        action = self.rng.uniform(-1.3, 1.3, (self.sim.num_slots, 4)).astype(np.float32)
        for slot in np.flatnonzero(with_expert):
            wanted = np.clip(self.experts[slot].get_action(self.sim.observation[slot]), -1, 1)
            action[slot] = wanted + self.rng.normal(0, 0.05, 4)
        return action

    def step(self, action: np.ndarray) -> None:
        """Same observation to the last bit, same reward to where Meta-World computes in float32, same success."""
        step = self.sim.step(action)
        assert not step.unstable.any()
        for slot, env in enumerate(self.envs):
            observation, reward, terminated, truncated, info = env.step(action[slot])
            np.testing.assert_array_equal(step.observation[slot], observation, err_msg=self.name(slot))
            np.testing.assert_allclose(step.reward[slot], reward, rtol=0, atol=1e-6, err_msg=self.name(slot))
            assert step.success[slot] == bool(info["success"]), self.name(slot)
            assert not terminated and step.truncated[slot] == truncated
        self.succeeded[self.sim.task_idx[step.success]] = True


def batches(size: int) -> list[list[Task]]:
    """The fifty tasks in batches, those that share a model in the same one."""
    found: list[list[Task]] = [[]]
    for _, tasks in groupby(sorted(MT50, key=lambda task: task.model_file), key=lambda task: task.model_file):
        sharing = list(tasks)
        if len(found[-1]) + len(sharing) > size:
            found.append([])
        found[-1] += sharing
    return found


def test_fifty_tasks_in_one_batch_equal_metaworld() -> None:
    """An episode's beginning and that of another after it, half by the expert and half at random."""
    pair = Pair(MT50, 1)
    everywhere = np.ones(len(MT50), dtype=bool)
    for steps in (50, 24):
        pair.reset()
        for t in range(steps):
            pair.step(pair.actions(everywhere if t < steps // 2 else ~everywhere))


@pytest.mark.slow
def test_metaworlds_own_rewards_of_whole_episodes() -> None:
    """The experts solve our simulations; Meta-World judges every state on the way, without simulating."""
    sim = SimBatch(MT50, np.arange(len(MT50)))
    rng = np.random.default_rng(1)
    vectors = [task.draw.sample(rng) for task in MT50]
    sim.reset(vectors=vectors)
    envs, experts = [make_env(task.name) for task in MT50], [expert(task.name) for task in MT50]
    for env, vector in zip(envs, vectors, strict=True):
        set_vector(env, vector)
    succeeded = np.zeros(len(MT50), dtype=bool)
    for t in range(200):
        action = np.stack([e.get_action(o) for e, o in zip(experts, sim.observation, strict=True)]).astype(np.float32)
        step = sim.step(action)
        for slot, env in enumerate(envs):
            if succeeded[slot] and t % 10:
                continue
            observation, reward, success = judge(env, sim, slot, action[slot])
            if not succeeded[slot]:  # later the environment has not seen the frame before
                np.testing.assert_array_equal(step.observation[slot], observation, err_msg=MT50[slot].name)
            np.testing.assert_allclose(step.reward[slot], reward, rtol=0, atol=1e-6, err_msg=MT50[slot].name)
            assert step.success[slot] == success, MT50[slot].name
        succeeded |= step.success
    assert succeeded.sum() >= 45  # else this would prove little


@pytest.mark.slow
@pytest.mark.parametrize("tasks", batches(10), ids=lambda tasks: tasks[0].name)
def test_whole_episodes_equal_metaworld(tasks: list[Task]) -> None:
    """Four goals, whole episodes of 500 steps, and four more after a reset; even rows by the expert with noise."""
    pair = Pair(tasks, 4, seed=2)
    with_expert = np.arange(pair.sim.num_slots) // len(tasks) % 2 == 0
    for _ in range(2):
        pair.reset()
        for _ in range(500):
            pair.step(pair.actions(with_expert))
    missed = {task.name for task, ok in zip(tasks, pair.succeeded, strict=True) if not ok}
    assert missed <= FAILING_EXPERTS


def test_slots_that_change_task_and_model_stay_exact() -> None:
    pair = Pair(MT10, 1, seed=7)
    pair.reset()
    for _ in range(20):
        pair.step(pair.actions(np.zeros(10, dtype=bool)))
    sim, rng = pair.sim, pair.rng
    mask, task_idx = np.arange(10) % 3 != 1, np.roll(np.arange(10), 3)
    vectors = [MT10[k].draw.sample(rng) for k in task_idx]
    kept = sim.observation[~mask].copy()
    observations = sim.reset(mask, task_idx=task_idx, vectors=vectors)
    np.testing.assert_array_equal(observations[~mask], kept)
    for slot in np.flatnonzero(mask):
        pair.envs[slot] = make_env(pair.name(slot))
        np.testing.assert_array_equal(observations[slot], set_vector(pair.envs[slot], vectors[slot]))
        pair.experts[slot] = expert(pair.name(slot))
    for t in range(60):
        pair.step(pair.actions(np.full(10, t < 40)))


def test_starts_that_depend_on_the_draw_are_simulated_once_and_exact() -> None:
    """The second reset with a vector comes from the saved start, the first does not."""
    tasks = [task for task in MT50 if task.settles]
    assert len(tasks) == 10
    pair = Pair(tasks, 1)
    slots = range(len(tasks))
    vectors = [pair.sim._vectors[k][3] for k in slots]
    pair.sim._vectors = [vector[None] for vector in vectors]  # so that the next draw takes it
    pair.sim.reset()
    assert all(pair.sim._starts.get(k, vectors[k]) is not None for k in slots)
    pair.reset(vectors)
    for _ in range(20):
        pair.step(pair.actions(np.zeros(len(tasks), dtype=bool)))


def test_fresh_starts_are_not_limited_to_the_pool() -> None:
    task = next(task for task in MT50 if task.name == "handle-press-v3")
    pooled, fresh = (SimBatch([task], [0], fresh_starts=f) for f in (False, True))
    pool = pooled._vectors[0]
    assert pool is not None and len(np.unique(pool, axis=0)) == 500
    starts = [pooled.reset()[0, 4:7] for _ in range(2)]
    assert not np.array_equal(*starts)
    assert fresh._vectors[0] is None
    goals = {fresh.reset()[0, 36:].tobytes() for _ in range(5)}
    assert len(goals) == 5 and not fresh._starts._starts
