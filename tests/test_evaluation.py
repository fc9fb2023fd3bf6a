"""The official protocol, run with Meta-World's own experts and with a policy that knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from metaworld_oracle import TASK_NAMES, expert

from mtrl_vec import evaluation
from mtrl_vec.acting import ActingPolicy
from mtrl_vec.checkpoint import load_policy, save_checkpoint
from mtrl_vec.cli import main
from mtrl_vec.envs import make_env
from mtrl_vec.errors import InputError
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.sim import SawyerSim
from mtrl_vec.tasks import resolve_tasks
from mtrl_vec.timing import Timer


class ExpertAgent:
    """Meta-World's scripted policies; it also notes every goal it is shown."""

    def __init__(self, tasks: list[str]) -> None:
        self.experts = [expert(task) for task in tasks]
        self.goals: list[list[tuple[float, ...]]] = [[] for _ in tasks]
        self.episodes = 0

    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        for seen, observation in zip(self.goals, observations, strict=True):
            goal = tuple(observation[36:39].tolist())
            if goal not in seen:
                seen.append(goal)
        return np.stack([np.clip(e.get_action(o), -1, 1) for e, o in zip(self.experts, observations, strict=True)])

    def reset(self, env_mask: np.ndarray) -> None:
        self.episodes += int(env_mask.sum())


def test_experts_solve_every_goal_of_the_benchmark_seed_once() -> None:
    agent = ExpertAgent(TASK_NAMES)
    results = evaluation.run_protocol(agent, TASK_NAMES, seed=3)
    assert set(results) == {
        *(f"eval/{task}/{value}" for task in TASK_NAMES for value in ("success_rate", "return")),
        "eval/mean_success_rate",
    }
    assert results["eval/mean_success_rate"] >= 0.98
    assert results["eval/mean_success_rate"] == pytest.approx(
        np.mean([results[f"eval/{task}/success_rate"] for task in TASK_NAMES])
    )
    for k, (task, seen) in enumerate(zip(resolve_tasks(TASK_NAMES), agent.goals, strict=True)):
        # Each of the fifty goals of the task's seed (in the plane: push's height is the puck's), and no other.
        fifty = {tuple(goal) for goal in np.round(task.benchmark_vectors(3 + k)[:, 3:5], 9).tolist()}
        assert {tuple(np.round(goal[:2], 9).tolist()) for goal in seen} == fifty


def test_a_policy_that_knows_nothing_fails_and_the_command_writes_what_it_prints(tmp_path, capsys) -> None:
    config = tiny_config(tasks=("pick-place",))
    torch.manual_seed(0)
    content = {"config": config.to_dict(), "policy": SharedPolicy(config).state_dict(), "frames": 1234}
    save_checkpoint(tmp_path / "checkpoint.pt", content)
    assert main(["eval", str(tmp_path), "--seed", "2", "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["eval/pick-place-v3/success_rate"] == 0.0
    assert 0 < results["eval/pick-place-v3/return"] < 500
    assert (results["checkpoint"], results["frames"], results["seed"]) == ("checkpoint.pt", 1234, 2)
    out = capsys.readouterr().out
    assert "0.00" in out and "checkpoint.pt, trained for 1,234 frames" in out


def test_simulated_success_equals_a_plain_loop_over_steps() -> None:
    """The pretrained policy, cut off early: some environments have succeeded by then and some have not."""
    policy, config = load_policy(Path("pretrained"))
    steps = 45
    env = make_env(config.tasks, num_workers=2, envs_per_worker=18, seed=5, random_phase=False, rest_after_success=True)
    try:
        rates = evaluation.simulated_success_rates(ActingPolicy(policy, config, Timer(), mean=True), env, 3, steps)
    finally:
        env.close()
    task_idx = np.arange(36) % 3
    sim = SawyerSim(resolve_tasks(config.tasks), task_idx, seed=5)
    observation, success = sim.reset(), np.zeros(36, dtype=bool)
    for _ in range(steps):
        step = sim.step(evaluation.mean_action(policy, observation, torch.from_numpy(task_idx)))
        observation, success = step.observation, success | step.success
    assert rates == pytest.approx([success[task_idx == k].mean() for k in range(3)])
    assert 0 < np.mean(rates) < 1


def test_the_pretrained_policy_solves_the_tasks(tmp_path) -> None:
    """Under the official protocol, on goals of a seed that chose nothing."""
    assert main(["eval", "pretrained", "--seed", "7", "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert min(results[f"eval/{task}/success_rate"] for task in TASK_NAMES) >= 0.9
    assert results["checkpoint"] == "pretrained.pt"


def test_the_agents_action_is_the_clipped_mean_of_its_tasks_head() -> None:
    torch.manual_seed(0)
    policy = SharedPolicy(tiny_config())
    torch.nn.init.normal_(policy.actor_heads[0].module.heads.weight2)
    observations = np.random.default_rng(0).normal(size=(3, 39))
    actions = evaluation.OfficialAgent(policy, 3).eval_action(observations)
    assert np.abs(actions).max() == 1.0
    for k in range(3):
        row = torch.tensor(observations[k], dtype=torch.float32)[None]
        loc, _ = policy.distribution(row, torch.eye(3)[k][None], torch.tensor([k]))
        np.testing.assert_allclose(actions[k], loc.detach().clamp(-1, 1)[0].numpy(), rtol=1e-5)


def test_seed_zero_is_refused() -> None:
    """Meta-World would take it for no seed, and evaluate on other goals every time."""
    with pytest.raises(InputError, match="seed is 0"):
        evaluation.make_official_envs(TASK_NAMES, 0)
