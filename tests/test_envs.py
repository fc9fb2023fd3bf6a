"""The TorchRL environment: specs, partial resets, and worker processes against a single batch."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from mtrl_vec.envs import MetaWorldEnv, make_env
from mtrl_vec.errors import InputError, WorkerDied


def test_specs() -> None:
    check_env_specs(MetaWorldEnv(num_envs=6))
    check_env_specs(MetaWorldEnv(["push"], num_envs=2))


def test_step_carries_everything() -> None:
    env = MetaWorldEnv(num_envs=6, max_episode_steps=2)
    td = env.reset()
    assert td["observation"].shape == (6, 39) and td["observation"].dtype == torch.float32
    assert td["task_idx"].tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(td["task_one_hot"], torch.eye(3).repeat(2, 1))
    td["action"] = torch.zeros(6, 4)
    nxt = env.step(td)["next"]
    assert nxt["reward"].shape == nxt["success"].shape == nxt["truncated"].shape == (6, 1)
    assert not nxt["done"].any()


def test_partial_reset_keeps_the_others_and_next_holds_the_true_last_observation() -> None:
    env = MetaWorldEnv(num_envs=3, max_episode_steps=4)
    td = env.reset()
    env.sim.elapsed[:] = [0, 2, 0]
    for _ in range(2):
        td["action"] = torch.rand(3, 4) * 2 - 1
        out, td = env.step_and_maybe_reset(td)
    assert out["next", "truncated"].squeeze(-1).tolist() == [False, True, False]
    assert not out["next", "terminated"].any()
    last, first = out["next", "observation"], td["observation"]
    assert torch.equal(last[[0, 2]], first[[0, 2]])
    assert not torch.equal(last[1], first[1])
    assert torch.equal(first[1, :18], first[1, 18:36])  # a first frame is stacked onto itself
    assert not torch.equal(last[1, :18], last[1, 18:36])
    assert not td["done"].any()


def rollout(env, steps: int) -> torch.Tensor:
    """Observations, rewards and flags of seeded random actions, [steps, B, 45], with automatic resets."""
    generator = torch.Generator().manual_seed(0)
    td, rows = env.reset(), []
    for _ in range(steps):
        td["action"] = (torch.rand(6, 4, generator=generator) * 2 - 1).view(*env.batch_size, 4)
        out, td = env.step_and_maybe_reset(td)
        nxt = out["next"]
        row = [nxt["observation"], nxt["reward"], nxt["success"].float(), nxt["truncated"].float(), nxt["task_one_hot"]]
        rows.append(torch.cat(row, -1).flatten(0, -2))
    return torch.stack(rows)


def test_workers_change_nothing() -> None:
    single = MetaWorldEnv(num_envs=6, seed=5, max_episode_steps=12, random_phase=True)
    expected = rollout(single, 30)
    assert expected[..., 41].sum() > 10  # resets are part of what is compared
    for workers in (1, 2):
        env = make_env(num_workers=workers, envs_per_worker=6 // workers, seed=5, max_episode_steps=12)
        try:
            assert env.batch_size == (workers, 6 // workers)
            assert torch.equal(rollout(env, 30), expected)
        finally:
            env.close()


@pytest.mark.parametrize("call", ["step_and_maybe_reset", "step", "reset"])
def test_a_dead_worker_is_named(call) -> None:
    env = make_env(num_workers=2, envs_per_worker=3)
    try:
        td = env.reset()
        victim = env._workers[1].pid
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
        td["action"] = torch.zeros(2, 3, 4)
        with pytest.raises(WorkerDied, match=rf"worker 1 \(pid {victim}\)"):
            getattr(env, call)(td)
    finally:
        processes = list(env._workers)
        env.close()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["fly"]}, "unknown task"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"envs_per_worker": 4}, "envs_per_worker is 4.*3 tasks"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_env(**arguments)
