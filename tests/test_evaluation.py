"""The official protocol, run with Meta-World's own experts and with a policy that knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import make_policy, tiny_config
from metaworld_oracle import TASK_NAMES, expert
from mtrl_vec.commands.cli import main
from mtrl_vec.envs import make_env
from mtrl_vec.errors import InputError
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.policy import TrainedPolicy, load_policy
from mtrl_vec.policy.checkpoint import save_checkpoint
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks import official
from mtrl_vec.tasks.suite import resolve_tasks
from mtrl_vec.timing import Timer
from mtrl_vec.train.evaluation import simulated_success_rates


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
    results = official.run_protocol(agent, TASK_NAMES, seed=3)
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
        fifty = {tuple(goal) for goal in np.round(task.draw.benchmark_vectors(3 + k)[:, 3:5], 9).tolist()}
        assert {tuple(np.round(goal[:2], 9).tolist()) for goal in seen} == fifty


def test_a_policy_that_knows_nothing_fails_and_the_command_writes_what_it_prints(tmp_path, capsys) -> None:
    config = tiny_config(tasks=("pick-place",))
    torch.manual_seed(0)
    content = {"config": config.to_dict(), "policy": make_policy(config).state_dict(), "frames": 1234}
    save_checkpoint(tmp_path / "checkpoint-1234.pt", content)
    assert main(["eval", str(tmp_path), "--seeds", "2", "--json", str(tmp_path / "out.json")]) == 0
    (results,) = json.loads((tmp_path / "out.json").read_text())
    assert results["eval/pick-place-v3/success_rate"] == 0.0
    assert 0 < results["eval/pick-place-v3/return"] < 500
    # Wilson's interval for 0 of 50 by hand: from 0 to z^2 / (50 + z^2) with z = 1.96.
    assert results["eval/pick-place-v3/success_low"] == 0.0
    assert results["eval/pick-place-v3/success_high"] == pytest.approx(1.96**2 / (50 + 1.96**2), abs=1e-4)
    checkpoint = str(tmp_path / "checkpoint-1234.pt")
    assert (results["checkpoint"], results["frames"], results["seeds"]) == (checkpoint, 1234, [2])
    out = capsys.readouterr().out
    assert "0.000" in out and "0.00-0.07" in out and "checkpoint-1234.pt, trained for 1,234 frames" in out


@pytest.mark.parametrize("workers", [2, 5])  # which share 36 environments evenly, and not
def test_simulated_success_equals_a_plain_loop_over_steps(workers) -> None:
    """The pretrained policy, cut off early: some environments have succeeded by then and some have not."""
    policy = load_policy("pretrained")
    steps, config = 45, policy.config
    options = {"seed": 5, "random_phase": False, "rest_after_success": True}
    env = make_env(config.tasks, num_workers=workers, num_envs=36, **options)
    try:
        acting = ActingPolicy(policy.module, config, Timer(), mean=True)
        acting.rows = env.rows
        assert (env.rows is None) == (36 % workers == 0)
        rates = simulated_success_rates(acting, env, 3, steps)
    finally:
        env.close()
    task_idx = np.arange(36) % 3
    sim = SimBatch(resolve_tasks(config.tasks), task_idx, seed=5)
    observation, success = sim.reset(), np.zeros(36, dtype=bool)
    for _ in range(steps):
        action = np.zeros((36, 4), np.float32)
        for k, task in enumerate(policy.tasks):
            action[task_idx == k] = policy(observation[task_idx == k], task)
        step = sim.step(action)
        observation, success = step.observation, success | step.success
    assert rates == pytest.approx([success[task_idx == k].mean() for k in range(3)])
    assert 0 < np.mean(rates) < 1


def test_the_pretrained_policy_solves_the_tasks(tmp_path) -> None:
    """Under the official protocol, on goals of a seed that chose nothing."""
    assert main(["eval", "pretrained", "--seeds", "7", "--json", str(tmp_path / "out.json")]) == 0
    (results,) = json.loads((tmp_path / "out.json").read_text())
    assert min(results[f"eval/{task}/success_rate"] for task in TASK_NAMES) >= 0.9
    assert results["checkpoint"].endswith("pretrained.pt")


def test_the_agents_action_is_the_clipped_mean_of_its_tasks_head() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    policy = make_policy(config)
    torch.nn.init.normal_(policy.actor_heads[0].module.heads.weight2)
    observations = np.random.default_rng(0).normal(size=(3, 39))
    agent = official.OfficialAgent(TrainedPolicy(policy, config, 0, Path("nowhere")))
    actions = agent.eval_action(observations)
    assert np.abs(actions).max() == 1.0
    for k in range(3):
        row = torch.tensor(observations[k], dtype=torch.float32)[None]
        loc, _ = policy.distribution(row, torch.eye(3)[k][None], torch.tensor([k]))
        np.testing.assert_allclose(actions[k], loc.detach().clamp(-1, 1)[0].numpy(), rtol=1e-5)


def test_seed_zero_is_refused() -> None:
    """Meta-World would take it for no seed, and evaluate on other goals every time."""
    with pytest.raises(InputError, match="seed is 0"):
        official.make_official_envs(TASK_NAMES, 0)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(8, 10, 0.490, 0.943), (150, 150, 0.975, 1.0), (146, 150, 0.934, 0.990)],  # tables, or the formula by hand
)
def test_wilson_intervals(successes: int, episodes: int, low: float, high: float) -> None:
    assert official.wilson_interval(successes / episodes, episodes) == pytest.approx((low, high), abs=1e-3)


def test_several_checkpoints_and_seeds_in_one_table(tmp_path, capsys, monkeypatch) -> None:
    """Means over the seeds; a checkpoint that was trained on fewer tasks has fewer rows."""
    for name, tasks in {"one.pt": ("push",), "both.pt": ("reach", "push")}.items():
        config = tiny_config(tasks=tasks)
        content = {"config": config.to_dict(), "policy": make_policy(config).state_dict(), "frames": 5}
        save_checkpoint(tmp_path / name, content)

    def protocol(agent, tasks, seed):  # the protocol itself is tested above, at length
        rates = {f"eval/{task}/success_rate": {"reach-v3": 1.0, "push-v3": seed / 10}[task] for task in tasks}
        returns = {f"eval/{task}/return": 100.0 * seed for task in tasks}
        return rates | returns | {"eval/mean_success_rate": sum(rates.values()) / len(rates)}

    monkeypatch.setattr(official, "run_protocol", protocol)
    files = [str(tmp_path / "one.pt"), str(tmp_path / "both.pt")]
    assert main(["eval", *files, "--seeds", "2", "6", "--json", str(tmp_path / "out.json"), "--quiet"]) == 0
    one, both = json.loads((tmp_path / "out.json").read_text())
    assert one["eval/push-v3/success_rate"] == both["eval/push-v3/success_rate"] == pytest.approx(0.4)
    assert both["eval/mean_success_rate"] == pytest.approx(0.7) and one["eval/push-v3/return"] == 400
    assert one["eval/push-v3/success_low"] == pytest.approx(0.309, abs=1e-3)  # of 40 in 100
    out = capsys.readouterr().out
    assert out.count("push-v3") == 2 and out.count("reach-v3") == 1 and "evaluating" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no checkpoint given"),
        (["pretrained", "--seeds", "0"], "seed is 0"),
        (["pretrained", "--seeds", "3", "3"], "seeds are 3, 3: give one or more, each once"),
    ],
)
def test_bad_evaluations_are_one_line(arguments, message, capsys) -> None:
    assert main(["eval", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
