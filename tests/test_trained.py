"""A trained policy as other people use it: in Meta-World's own environments."""

from __future__ import annotations

import subprocess
import sys

import gymnasium as gym
import metaworld  # noqa: F401
import numpy as np
import pytest
import torch

import mtrl_vec
from helpers import make_policy, tiny_config
from mtrl_vec.commands.arguments import EvalCommand
from mtrl_vec.commands.evaluate import evaluate_checkpoints
from mtrl_vec.errors import InputError
from mtrl_vec.policy import load_policy
from mtrl_vec.policy.checkpoint import save_checkpoint
from mtrl_vec.policy.trained import choose_tasks
from mtrl_vec.tasks.suite import UnknownTask
from mtrl_vec.train import Trainer


@pytest.fixture(scope="module")
def policy():
    return load_policy("pretrained")


@pytest.mark.parametrize("task", ["reach-v3", "push-v3", "pick-place-v3"])
def test_it_solves_a_task_in_a_plain_gymnasium_loop(policy, task) -> None:
    env = gym.make("Meta-World/MT1", env_name=task, seed=11, disable_env_checker=True)  # it warns of Meta-World itself
    observation, _ = env.reset()
    for _ in range(150):
        action = policy(observation, task)
        assert action.shape == (4,) and action.dtype == np.float32 and env.action_space.contains(action)
        observation, _, _, _, info = env.step(action)
        if info["success"]:
            break
    assert info["success"]
    env.close()


def test_rows_of_any_tasks_in_one_call(policy) -> None:
    rows, task_idx = np.random.default_rng(0).normal(size=(6, 39)), np.array([2, 0, 1, 1, 0, 2])
    actions = policy.act(rows, task_idx)
    expected = [policy(row, policy.tasks[k]) for row, k in zip(rows, task_idx, strict=True)]
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)
    assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
    torch.manual_seed(0)
    drawn = policy.act(rows, task_idx, sample=True)
    assert np.abs(drawn).max() <= 1 and not np.allclose(drawn, actions, atol=1e-3)


def test_batches_names_and_samples(policy) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 39))
    together = policy(rows, "push")  # any name of the task
    np.testing.assert_allclose(together, [policy(row, "push-v3") for row in rows], rtol=1e-5, atol=1e-6)
    assert not np.allclose(together, policy(rows, "reach"), atol=1e-3)
    torch.manual_seed(0)
    many = policy(np.tile(rows[:1], (4000, 1)), "push", sample=True)
    loc, scale = policy.module.distribution(
        torch.tensor(rows[:1], dtype=torch.float32), torch.eye(3)[1][None], torch.tensor([1])
    )
    clipped = torch.distributions.Normal(loc, scale).sample((40_000,)).clamp(-1, 1)[:, 0]
    np.testing.assert_allclose(many.mean(0), clipped.mean(0), atol=0.03)
    np.testing.assert_allclose(many.std(0), clipped.std(0), atol=0.03)


@pytest.mark.parametrize(
    ("observation", "task", "message"),
    [
        (np.zeros(39), "fly-v3", "unknown task 'fly-v3'"),
        (np.zeros(12), "reach-v3", r"observation has shape \[12\]: it must be \[39\] or \[n, 39\]"),
        (np.zeros((2, 3, 39)), "reach-v3", r"observation has shape \[2, 3, 39\]"),
    ],
)
def test_bad_calls_are_named(policy, observation, task, message) -> None:
    with pytest.raises(InputError, match=message):
        policy(observation, task)


def test_positions_that_are_no_task(policy) -> None:
    with pytest.raises(
        InputError, match="task_idx has 1 to 3: this policy has 3 tasks, reach-v3, push-v3, pick-place-v3"
    ):
        policy.act(np.zeros((2, 39)), np.array([1, 3]))
    assert policy.act(np.zeros((0, 39)), np.zeros(0, dtype=int)).shape == (0, 4)
    few = np.arange(3, dtype=np.uint8)
    np.testing.assert_array_equal(policy.act(np.ones((3, 39)), few), policy.act(np.ones((3, 39)), few.astype(np.int64)))


def test_a_task_that_it_was_not_trained_on(tmp_path) -> None:
    config = tiny_config(tasks=("push",))
    content = {"config": config.to_dict(), "policy": make_policy(config).state_dict(), "frames": 5}
    save_checkpoint(tmp_path / "one.pt", content)
    with pytest.raises(InputError, match="task is 'reach-v3': this policy was trained on push-v3"):
        load_policy(tmp_path / "one.pt")(np.zeros(39), "reach-v3")
    with pytest.raises(InputError, match="task is 'MT3': name one of reach-v3, push-v3, pick-place-v3"):
        load_policy("pretrained")(np.zeros(39), "MT3")


def test_a_task_that_is_not_registered_in_this_program(tmp_path) -> None:
    config = tiny_config(tasks=("push",))
    settings = config.to_dict()
    settings["environment"]["tasks"] = ["touch-ball"]
    content = {"config": settings, "policy": make_policy(config).state_dict(), "frames": 5, "rollouts": {}}
    save_checkpoint(tmp_path / "checkpoint-000000005.pt", content)
    message = f"^{tmp_path}.* was trained on 'touch-ball', which is not one of Meta-World's tasks: register it before"
    file = tmp_path / "checkpoint-000000005.pt"
    for load in (
        lambda: load_policy(file),
        lambda: evaluate_checkpoints(EvalCommand((file,), quiet=True)),
        lambda: Trainer(tiny_config(tasks=("push",), init_from=file, run_dir=tmp_path / "new")),
        lambda: Trainer.resume(tmp_path),
    ):
        with pytest.raises(UnknownTask, match=message):
            load()
    assert not (tmp_path / "new").exists()


def test_tasks_of_a_policy_are_chosen_by_any_name() -> None:
    known = ("push-v3", "hammer-v3", "reach-v3", "pick-place-v3")
    assert choose_tasks(["hammer", "push-v3"], known) == ("hammer-v3", "push-v3")
    assert choose_tasks(["mt3"], known) == ("reach-v3", "push-v3", "pick-place-v3")
    assert choose_tasks(None, ("a task of another program",)) == ("a task of another program",)


def test_a_policy_without_its_critic_acts_all_the_same(tmp_path) -> None:
    config = tiny_config(tasks=("push",))
    policy = make_policy(config)
    acting = {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith("critic_heads.")}
    content = {"config": config.to_dict(), "frames": 5}
    save_checkpoint(tmp_path / "whole.pt", content | {"policy": policy.state_dict()})
    save_checkpoint(tmp_path / "acting.pt", content | {"policy": acting})
    observation = np.random.default_rng(0).normal(size=(5, 39))
    ours, theirs = (load_policy(tmp_path / name)(observation, "push") for name in ("acting.pt", "whole.pt"))
    np.testing.assert_array_equal(ours, theirs)
    del acting["torso.module.layers.0.weight"]
    save_checkpoint(tmp_path / "less.pt", content | {"policy": acting})
    with pytest.raises(InputError, match="does not fit this version"):
        load_policy(tmp_path / "less.pt")


def test_what_the_package_offers_and_what_a_simulator_process_need_not_load() -> None:
    assert {name for name in mtrl_vec.__all__ if getattr(mtrl_vec, name)} == set(mtrl_vec.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Agent'"):
        mtrl_vec.Agent  # noqa: B018
    assert imported_by("import mtrl_vec.envs", "mtrl_vec.train", "mtrl_vec.learn", "tensorboard") == []


def test_a_policy_is_loaded_and_used_without_any_simulator() -> None:
    code = "import mtrl_vec, numpy; mtrl_vec.load_policy('pretrained')(numpy.zeros(39), 'push')"
    assert imported_by(code, "mtrl_vec.sim", "mtrl_vec.envs", "metaworld") == []
    assert imported_by("import mtrl_vec.sim", "mtrl_vec.sim", "metaworld") != []  # it would be noticed


def imported_by(code: str, *modules: str) -> list[str]:
    """Which of the modules a process has imported that has run some code."""
    command = [sys.executable, "-c", f"{code}; import sys; print(*[m for m in {modules} if m in sys.modules])"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
