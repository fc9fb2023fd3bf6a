"""The Gymnasium vector environment: against a lone simulator, and against how Gymnasium's own ones behave."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from multiprocessing.connection import Connection

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import mtrl_vec
from mtrl_vec.errors import InputError
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import MT3


class Toy(gymnasium.Env):
    """Tells what our environments tell, and ends after three steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (39,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(39, np.float32), {"task_idx": 0}

    def step(self, action):
        self.steps += 1
        return np.zeros(39, np.float32), 1.0, False, self.steps == 3, {"task_idx": 0, "success": 0.0}


def make(num_envs: int, **options):
    return gymnasium.make_vec("mtrl_vec/MT3-v0", num_envs=num_envs, num_workers=2, **options)


@pytest.mark.parametrize(("one_hot", "random_phase"), [(False, False), (True, False), (False, True)])
def test_it_equals_a_lone_simulator(one_hot, random_phase) -> None:
    options = {"goals_seed": 3, "max_episode_steps": 5, "random_phase": random_phase}
    env = make(7, one_hot=one_hot, **options)
    sim = SimBatch(MT3, np.arange(7) % 3, seed=9, **options)
    told = np.eye(3, dtype=np.float32)[np.arange(7) % 3] if one_hot else np.zeros((7, 0), np.float32)
    sim.reset()
    rng = np.random.default_rng(0)
    try:
        assert env.single_observation_space.shape == (39 + 3 * one_hot,) and env.observation_space.shape[0] == 7
        observation, infos = env.reset(seed=9)
        for _ in range(12):
            assert observation in env.observation_space
            expected = sim.observation.astype(np.float32)
            np.testing.assert_array_equal(observation, np.concatenate([expected, told], axis=1))
            np.testing.assert_array_equal(infos["task_idx"], np.arange(7) % 3)
            action = rng.uniform(-1.5, 1.5, (7, 4)).astype(np.float32)
            observation, reward, terminated, truncated, infos = env.step(action)
            step = sim.step(action)
            np.testing.assert_array_equal(reward, step.reward.astype(np.float32))
            np.testing.assert_array_equal(truncated, step.truncated)
            assert not terminated.any() and ("final_obs" in infos) == step.truncated.any()
            told_success = infos["final_info"] if step.truncated.any() else infos
            np.testing.assert_array_equal(told_success["success"], step.success.astype(float))
            for i in np.flatnonzero(truncated):
                np.testing.assert_array_equal(infos["final_obs"][i][:39], step.observation[i].astype(np.float32))
                assert not one_hot or infos["final_obs"][i][39:].argmax() == i % 3
            sim.reset(step.truncated)
    finally:
        env.close()


def shapes_of(infos: dict) -> dict:
    return {
        key: shapes_of(value) if isinstance(value, dict) else (type(value), value.shape, value.dtype.kind)
        for key, value in infos.items()
    }


def test_infos_are_built_as_gymnasium_builds_them() -> None:
    ours = make(3, max_episode_steps=3)
    theirs = SyncVectorEnv([Toy] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    assert ours.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    try:
        assert shapes_of(ours.reset(seed=0)[1]) == shapes_of(theirs.reset(seed=0)[1])
        for _ in range(4):
            (*arrays, infos), (*expected, expected_infos) = (
                env.step(env.action_space.sample()) for env in (ours, theirs)
            )
            for a, b in zip(arrays, expected, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
            found, wanted = shapes_of(infos), shapes_of(expected_infos)
            if "final_obs" in wanted:  # a reset of theirs tells no success at all
                assert found.pop("success") and not infos["_success"].any() and found.pop("_success")
            assert found == wanted
            for key in expected_infos:
                if key.startswith("_"):
                    np.testing.assert_array_equal(infos[key], expected_infos[key])
    finally:
        ours.close()


def test_gymnasiums_statistics_count_whole_episodes() -> None:
    env = RecordEpisodeStatistics(make(4, max_episode_steps=6))
    try:
        env.reset(seed=1)
        total = np.zeros(4)
        for _ in range(6):
            _, reward, _, _, infos = env.step(np.zeros((4, 4), np.float32))
            total += reward
        np.testing.assert_allclose(infos["episode"]["r"], total)
        assert infos["episode"]["l"].tolist() == [6] * 4
    finally:
        env.close()


def test_seeds_and_masks_of_resets() -> None:
    env = make(5)
    try:
        some = np.array([False, True, False, False, True])
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(np.zeros((5, 4)))
        with pytest.raises(InputError, match="reset_mask leaves environments out that were never reset"):
            env.reset(options={"reset_mask": some})
        first, _ = env.reset(seed=4)
        other, _ = env.reset()
        assert not np.array_equal(first, other)
        np.testing.assert_array_equal(env.reset(seed=4)[0], first)
        moved, *_ = env.step(np.ones((5, 4)))
        after, _ = env.reset(options={"reset_mask": some})
        np.testing.assert_array_equal(after[~some], moved[~some])
        assert (after[some] != moved[some]).any(axis=1).all()
        for arguments, message in (
            ({"options": {"mask": some}}, "there is no option 'mask'"),
            ({"options": {"reset_mask": some[:3]}}, r"reset_mask has the shape \(3,\): it has to be \(5,\)"),
            ({"options": {"reset_mask": some & False}}, "reset_mask is False everywhere"),
        ):
            with pytest.raises(InputError, match=message):
                env.reset(**arguments)
        with pytest.raises(InputError, match=r"actions have the shape \(4,\): \(5, 4\) is needed"):
            env.step(np.zeros(4))
        np.testing.assert_array_equal(env.step(np.ones((5, 4)))[3], np.zeros(5, bool))  # nothing was lost to all that
    finally:
        env.close()
    for call in (env.reset, lambda: env.step(np.zeros((5, 4)))):
        with pytest.raises(gymnasium.error.ClosedEnvironmentError):
            call()


def interrupted_once(function):
    """A function that Ctrl-C interrupts before it does anything, the first time."""
    pending = [KeyboardInterrupt()]

    def call(*arguments):
        if pending:
            raise pending.pop()
        return function(*arguments)

    return call


@pytest.mark.parametrize("call", ["step", "reset"])
def test_after_an_interruption_a_reset_begins_anew(call, monkeypatch) -> None:
    """Answers to what was interrupted must not pass for those of what comes next."""
    env = make(4)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4)).astype(np.float32)
    try:
        runs = []
        for _ in range(2):
            first = env.reset(seed=4)[0]
            runs.append([first, *(env.step(action)[0] for action in actions)])
            place, name = (os, "read") if call == "step" else (Connection, "recv")
            with monkeypatch.context() as patch:
                patch.setattr(place, name, interrupted_once(getattr(place, name)))
                with pytest.raises(KeyboardInterrupt):
                    env.step(actions[0]) if call == "step" else env.reset()
            with pytest.raises(gymnasium.error.ResetNeeded):
                env.step(actions[0])
        for one, other in zip(*runs, strict=True):
            np.testing.assert_array_equal(one, other)
    finally:
        env.close()


def test_any_tasks_have_a_name() -> None:
    env = gymnasium.make_vec("mtrl_vec/MT1-v0", num_envs=2, tasks=["push-v3", "hammer"], num_workers=1)
    try:
        assert [task.name for task in env.tasks] == ["push-v3", "hammer-v3"]
        assert env.reset(seed=0)[0].shape == (2, 39)
    finally:
        env.close()
    assert {f"mtrl_vec/{name}-v0" for name in ("MT1", "MT3", "MT10", "MT50")} <= gymnasium.registry.keys()


@pytest.mark.parametrize(
    "make", [gymnasium.make, lambda name: gymnasium.make_vec(name, num_envs=2, vectorization_mode="sync")]
)
def test_single_environments_point_to_make_vec(make) -> None:
    with pytest.raises(gymnasium.error.Error, match="has vector environments only: use gymnasium"):
        make("mtrl_vec/MT10-v0")


def test_names_are_there_without_anything_heavy() -> None:
    program = "import sys, mtrl_vec, gymnasium; print('mtrl_vec/MT10-v0' in gymnasium.registry, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["True", "False"] and mtrl_vec.__version__


def test_a_name_can_say_what_to_import() -> None:
    program = "import gymnasium; gymnasium.make('mtrl_vec:mtrl_vec/MT10-v0')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "mtrl_vec has vector environments only" in found.stderr.splitlines()[-1]


class OneEnvironment(gymnasium.Env):
    """A vector environment of one as a single environment, for Gymnasium's checks."""

    def __init__(self) -> None:
        self._envs = make(1, max_episode_steps=20)
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        observation, infos = self._envs.reset(seed=seed, options=options)
        return observation[0], {name: value[0] for name, value in infos.items()}

    def step(self, action):
        observation, reward, terminated, truncated, infos = self._envs.step(action[None])
        last = infos.get("final_obs", observation)[0]
        return last, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {"success": infos["success"][0]}

    def close(self) -> None:
        self._envs.close()


def test_gymnasiums_own_checks_find_nothing() -> None:
    env = OneEnvironment()
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            check_env(env, skip_render_check=True)
    finally:
        env.close()
    messages = [str(warning.message) for warning in found]
    assert all("Box observation space m" in message and "infinity" in message for message in messages), messages
