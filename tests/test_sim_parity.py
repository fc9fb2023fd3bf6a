"""`SimBatch` against the real Meta-World, step by step."""

from __future__ import annotations

import numpy as np
import pytest

from metaworld_oracle import TASK_NAMES, expert, make_env, set_vector
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import TASKS

STEPS = 500


def draw_vectors(task_idx: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.stack([TASKS[k].draw.sample(rng) for k in task_idx])


def compare_rollout(sim: SimBatch, envs, observations: np.ndarray, rng: np.random.Generator, steps: int) -> dict:
    """Step `sim` and `envs` with the same actions: even slots follow the expert for half of the steps, the rest random.

    Returns what the rollout visited, so that a test can tell whether it proved anything.
    """
    experts = [expert(TASK_NAMES[k]) for k in sim.task_idx]
    visited = {"success": np.zeros(len(envs), bool), "lifted": np.zeros(len(envs), bool), "reward": np.zeros(len(envs))}
    for t in range(steps):
        action = rng.uniform(-1.2, 1.2, (len(envs), 4)).astype(np.float32)
        for i in range(0, len(envs), 2):
            if t < steps // 2:
                action[i] = experts[i].get_action(observations[i])
        step = sim.step(action)
        for i, env in enumerate(envs):
            observation, reward, terminated, truncated, info = env.step(action[i])
            np.testing.assert_array_equal(step.observation[i], observation, err_msg=f"slot {i} step {t}")
            # Meta-World falls back to float32 where the float32 action enters its reward.
            np.testing.assert_allclose(step.reward[i], reward, rtol=0, atol=1e-6)
            assert step.success[i] == bool(info["success"])
            assert step.truncated[i] == truncated
            assert not terminated and not step.unstable[i]
            visited["success"][i] |= step.success[i]
            visited["lifted"][i] |= observation[6] > 0.05
            visited["reward"][i] = max(visited["reward"][i], reward)
        observations = step.observation
    return visited


@pytest.mark.parametrize("task_index", range(len(TASKS)), ids=TASK_NAMES)
def test_episodes_equal_metaworld(task_index: int) -> None:
    """Four goals, a whole episode, then a reset and the start of the next one: same bits."""
    rng = np.random.default_rng(task_index)
    task_idx = np.full(4, task_index)
    sim = SimBatch(TASKS, task_idx)
    envs = [make_env(TASK_NAMES[task_index]) for _ in task_idx]
    for steps in (STEPS, 60):
        vectors = draw_vectors(task_idx, rng)
        observations = sim.reset(vectors=vectors)
        expected = np.stack([set_vector(env, v) for env, v in zip(envs, vectors, strict=True)])
        np.testing.assert_array_equal(observations, expected)
        visited = compare_rollout(sim, envs, observations, rng, steps)
        if steps == STEPS:  # the experts solved their slots, so contacts, caging and lifting were all compared
            assert visited["success"][::2].all()
            assert (visited["reward"][::2] > 9.9).all()
            if TASK_NAMES[task_index] == "pick-place-v3":
                assert visited["lifted"][::2].any()


def test_a_slot_that_changes_its_task_stays_exact() -> None:
    rng = np.random.default_rng(7)
    sim = SimBatch(TASKS, [0, 1, 2, 0])
    sim.reset()
    for _ in range(40):
        sim.step(rng.uniform(-1, 1, (4, 4)).astype(np.float32))

    mask, task_idx = np.array([True, False, True, True]), np.array([2, 0, 1, 1])
    vectors = draw_vectors(task_idx, rng)
    kept = sim.observation[1].copy()
    observations = sim.reset(mask, task_idx=task_idx, vectors=vectors)
    np.testing.assert_array_equal(observations[1], kept)
    assert sim.task_idx.tolist() == [2, 1, 1, 1]

    vectors[1] = draw_vectors(np.array([1]), rng)[0]
    observations = sim.reset(np.array([False, True, False, False]), vectors=vectors)
    envs = [make_env(TASK_NAMES[k]) for k in sim.task_idx]
    expected = np.stack([set_vector(env, v) for env, v in zip(envs, vectors, strict=True)])
    np.testing.assert_array_equal(observations, expected)
    compare_rollout(sim, envs, observations, rng, 200)
