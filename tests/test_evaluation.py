"""The official protocol, run with Meta-World's own experts and with a policy that knows nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from helpers import make_policy, tiny_config
from metaworld_oracle import TASK_NAMES, expert
from mtrl_vec.commands.cli import main
from mtrl_vec.commands.evaluate import make_table, newer
from mtrl_vec.envs import make_env
from mtrl_vec.errors import InputError
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.policy import TrainedPolicy, load_policy
from mtrl_vec.policy.checkpoint import BEST_NAME, save_checkpoint
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks import official, suite
from mtrl_vec.tasks.suite import fixed_vectors, resolve_tasks
from mtrl_vec.timing import Timer
from mtrl_vec.train.evaluation import Evaluation, simulated_successes
from processes import at_ctrl_c, descendants, still_running, workers_of


class Experts:
    """Meta-World's scripted policies as one policy, and as an agent; it also notes every goal it is shown."""

    def __init__(self, tasks: list[str]) -> None:
        self.tasks = tuple(tasks)
        self.experts = [expert(task) for task in tasks]
        self.goals: list[list[tuple[float, ...]]] = [[] for _ in tasks]

    def act(self, observation: np.ndarray, task_idx: np.ndarray) -> np.ndarray:
        for k, goal in zip(task_idx.tolist(), map(tuple, observation[:, 36:39].tolist()), strict=True):
            if goal not in self.goals[k]:
                self.goals[k].append(goal)
        rows = zip(task_idx, observation, strict=True)
        return np.stack([np.clip(self.experts[k].get_action(row), -1, 1) for k, row in rows])

    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        return self.act(observations, np.arange(len(self.tasks))).astype(np.float64)  # as `evaluate` has them

    def reset(self, env_mask: np.ndarray) -> None:
        pass


@pytest.mark.slow
def test_experts_solve_every_goal_of_the_benchmark_seed_once() -> None:
    experts, calls = Experts(TASK_NAMES), []
    results = official.evaluate(experts, [3], progress=lambda *call: calls.append(call))
    said = [f"{task}, seed 3: success {results[f'eval/{task}/success_rate']:.3f}" for task in TASK_NAMES]
    assert calls == [(done, 3, result) for done, result in enumerate(["", *said])]
    assert results["eval/mean_success_rate"] >= 0.98
    for k, (task, seen) in enumerate(zip(resolve_tasks(TASK_NAMES), experts.goals, strict=True)):
        # Each of the fifty goals of the task's seed (in the plane: push's height is the puck's), and no other.
        fifty = {tuple(goal) for goal in np.round(fixed_vectors([task], 3 + k)[0][:, 3:5], 9).tolist()}
        assert {tuple(np.round(goal[:2], 9).tolist()) for goal in seen} == fifty and len(fifty) == official.NUM_GOALS
    # In lock step, as Meta-World itself evaluates, every number is the same.
    together = official.run_protocol(Experts(TASK_NAMES), TASK_NAMES, seed=3)
    values = (f"eval/{task}/{value}" for task in TASK_NAMES for value in ("success_rate", "return"))
    assert together == {name: results[name] for name in (*values, "eval/mean_success_rate")}


@pytest.mark.slow
def test_results_do_not_depend_on_processes_or_order(monkeypatch) -> None:
    monkeypatch.setattr(official, "NUM_GOALS", 1)  # whose full number is tested above
    torch.manual_seed(0)
    config = tiny_config(tasks=("push", "drawer-open", "hammer"))
    module = make_policy(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    policy = TrainedPolicy(module, config, 0, Path("nowhere"))
    alone = official.evaluate(policy, [5])
    calls: list[tuple[int, int, str]] = []
    assert official.evaluate(policy, [5], num_workers=2, progress=lambda *call: calls.append(call)) == alone
    assert [call[:2] for call in calls] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert sorted(call[2].split(",")[0] for call in calls[1:]) == sorted(policy.tasks)
    some = official.evaluate(policy, [5], tasks=("hammer-v3", "push-v3"))
    assert {name: alone[name] for name in some if "mean" not in name} == {
        name: value for name, value in some.items() if "mean" not in name
    }
    assert some.keys() < alone.keys() and not any("drawer" in name for name in some)
    again = official.run_unit(policy, official.Unit(0, 5, 1))  # after others, in this process
    assert again == {name: alone[name] for name in again} and len(again) == 2
    assert len({alone[f"eval/{task}/return"] for task in policy.tasks}) == 3


def test_evaluation_leaves_torchs_threads_as_they_were(monkeypatch) -> None:
    seen = []

    class Watching(Experts):
        def act(self, observation: np.ndarray, task_idx: np.ndarray) -> np.ndarray:
            seen.append(torch.get_num_threads())
            return super().act(observation, task_idx)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        official.run_unit(Watching(["reach-v3"]), official.Unit(0, 1, 1))
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def hopeless_checkpoint(path: Path) -> Path:
    """Of a policy whose episodes run to the time limit."""
    torch.manual_seed(0)
    config = tiny_config(tasks=("pick-place", "assembly"))
    content = {"config": config.to_dict(), "policy": make_policy(config).state_dict(), "frames": 5}
    save_checkpoint(path, content)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a worker is killed", "Ctrl-C", "the command is killed"])
def test_processes_end_with_the_evaluation(what, tmp_path) -> None:
    checkpoint, log = hopeless_checkpoint(tmp_path / "hopeless.pt"), tmp_path / "stderr"
    command = [sys.executable, "-m", "mtrl_vec", "eval", str(checkpoint), "--num-workers", "2", "--seeds", "1", "2"]
    with log.open("w") as stderr:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": stderr, "text": True}
        process = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=at_ctrl_c)
    deadline = time.monotonic() + 120
    while len(workers := workers_of(descendants(process.pid))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    processes = descendants(process.pid)
    if what == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        os.kill(workers[0] if what == "a worker is killed" else process.pid, signal.SIGKILL)
    code = {"Ctrl-C": 130, "a worker is killed": 1, "the command is killed": -signal.SIGKILL}[what]
    assert process.wait(timeout=60) == code
    assert still_running(processes) == []
    said = log.read_text().splitlines()
    assert said[0] == "50 episodes each; failures take all 500 steps"
    if what == "a worker is killed":
        (line,) = said[1:]
        assert line.startswith("error: an evaluation process died, 4 of 4 tasks and seeds left")
    elif what == "Ctrl-C":
        assert said[1:] == []


def test_tasks_that_metaworld_does_not_have_are_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(suite, "_KNOWN", dict(suite._KNOWN))
    suite.register_task(dataclasses.replace(suite.MT3[1], name="my-push"))
    config = tiny_config(tasks=("reach", "my-push"))
    content = {"config": config.to_dict(), "policy": make_policy(config).state_dict(), "frames": 5}
    save_checkpoint(tmp_path / "mine.pt", content)
    assert main(["eval", str(tmp_path / "mine.pt")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: task 'my-push' is not one of Meta-World's") and err.count("\n") == 1
    with pytest.raises(InputError, match="task 'my-push' is not one of Meta-World's"):
        official.evaluate(load_policy(tmp_path / "mine.pt"), [1])
    monkeypatch.setattr(official, "NUM_GOALS", 1)
    results = official.evaluate(load_policy(tmp_path / "mine.pt"), [1], tasks=["reach-v3"])
    assert [name for name in results if name.endswith("/return")] == ["eval/reach-v3/return"]
    with pytest.raises(InputError, match="task is 'door-open-v3': this policy has reach-v3, my-push"):
        official.evaluate(load_policy(tmp_path / "mine.pt"), [1], tasks=["door-open-v3"])


def test_a_policy_that_knows_nothing_fails_and_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(official, "NUM_GOALS", 4)  # whose full number is tested above
    config = tiny_config(tasks=("pick-place",))
    torch.manual_seed(0)
    content = {"config": config.to_dict(), "policy": make_policy(config).state_dict(), "frames": 1234}
    save_checkpoint(tmp_path / "checkpoint-1234.pt", content)
    assert main(["eval", str(tmp_path), "--seeds", "2", "--json", str(tmp_path / "out.json")]) == 0
    (results,) = json.loads((tmp_path / "out.json").read_text())
    assert results["eval/pick-place-v3/success_rate"] == 0.0
    assert 0 < results["eval/pick-place-v3/return"] < 500
    # Wilson's interval for 0 of 4 by hand: from 0 to z^2 / (4 + z^2) with z = 1.96.
    assert results["eval/pick-place-v3/success_low"] == 0.0
    assert results["eval/pick-place-v3/success_high"] == pytest.approx(1.96**2 / (4 + 1.96**2), abs=1e-4)
    checkpoint = str(tmp_path / "checkpoint-1234.pt")
    assert (results["checkpoint"], results["frames"], results["seeds"]) == (checkpoint, 1234, [2])
    out, err = capsys.readouterr()
    assert err.splitlines()[1:] == ["1 of 1 done: pick-place-v3, seed 2: success 0.000"]
    assert "0.000" in out and "0.00-0.49" in out and "checkpoint-1234.pt, trained for 1,234 frames" in out


def test_a_policy_older_than_its_run_is_said_to_be(tmp_path) -> None:
    for frames in (5, 12):
        (tmp_path / f"checkpoint-{frames}.pt").touch()
    assert newer(tmp_path / BEST_NAME, 5) == " (the newest is checkpoint-12.pt)"
    assert newer(tmp_path / BEST_NAME, 12) == newer(tmp_path / "checkpoint-5.pt", 5) == ""


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
        successes, episodes = simulated_successes(acting, env, 3, steps)
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
    assert successes.tolist() == [success[task_idx == k].sum() for k in range(3)] and episodes.tolist() == [12] * 3
    assert 0 < successes.sum() < 36


@pytest.mark.slow
def test_the_pretrained_policy_solves_the_tasks(tmp_path) -> None:
    """Under the official protocol, on goals of a seed that chose nothing."""
    assert main(["eval", "pretrained", "--seeds", "7", "--json", str(tmp_path / "out.json")]) == 0
    (results,) = json.loads((tmp_path / "out.json").read_text())
    assert min(results[f"eval/{task}/success_rate"] for task in TASK_NAMES) >= 0.9
    assert results["checkpoint"].endswith("pretrained.pt")


def test_the_agents_action_is_the_clipped_mean_of_its_tasks_head() -> None:
    torch.manual_seed(0)
    config = tiny_config(bounded_mean=False)  # so that there is something to clip
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

    def run_unit(policy, unit):  # the protocol itself is tested above, at length
        task = policy.tasks[unit.task_idx]
        rate = {"reach-v3": 1.0, "push-v3": unit.seed / 10}[task]
        return {f"eval/{task}/success_rate": rate, f"eval/{task}/return": 100.0 * unit.seed}

    monkeypatch.setattr(official, "run_unit", run_unit)
    quietly = ["--quiet", "--num-workers", "1"]
    files = [str(tmp_path / "one.pt"), str(tmp_path / "both.pt")]
    assert main(["eval", *files, "--seeds", "2", "6", "--json", str(tmp_path / "out.json"), *quietly]) == 0
    one, both = json.loads((tmp_path / "out.json").read_text())
    assert one["eval/push-v3/success_rate"] == both["eval/push-v3/success_rate"] == pytest.approx(0.4)
    assert both["eval/mean_success_rate"] == pytest.approx(0.7) and one["eval/push-v3/return"] == 400
    assert one["eval/push-v3/success_low"] == pytest.approx(0.309, abs=1e-3)  # of 40 in 100
    out, err = capsys.readouterr()
    assert out.count("push-v3") == 2 and out.count("reach-v3") == 1 and err == ""
    assert main(["eval", *files, "--tasks", "push", "--seeds", "2", *quietly]) == 0
    out = capsys.readouterr().out
    assert out.count("push-v3") == out.count("mean") == 2 and "reach-v3" not in out
    assert main(["eval", *files, "--tasks", "reach", *quietly]) == 2
    assert capsys.readouterr().err == "error: task is 'reach-v3': this policy was trained on push-v3\n"


def test_the_table_of_fifty_tasks_fits_a_terminal_with_a_row_each() -> None:
    tasks = [task.name for task in suite.MT50]
    about = {"success_rate": 0.5, "return": 123456.0, "success_low": 0.36, "success_high": 0.64}
    scores = {f"eval/{task}/{name}": value for task in tasks for name, value in about.items()}
    mean = {"eval/mean_success_rate": 0.25, "eval/mean_success_low": 0.2, "eval/mean_success_high": 0.3}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(make_table(scores | mean, tasks, [100, 200]))
    rows = [line.replace("│", " ").split() for line in capture.get().splitlines() if line.startswith("│")]
    assert rows[:50] == [[task, "0.500", "0.36-0.64", "123,456"] for task in tasks]
    assert rows[50:] == [["mean", "0.250", "0.20-0.30"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no checkpoint given"),
        (["pretrained", "--seeds", "0"], "seed is 0"),
        (["pretrained", "--num-workers", "0"], "num_workers is 0: give 1 or more"),
        (["pretrained", "--seeds", str(2**32 - 49)], "seed is 4294967247"),
        (["pretrained", "--seeds", "3", "3"], "seeds are 3, 3: give one or more, each once"),
    ],
)
def test_bad_evaluations_are_one_line(arguments, message, capsys) -> None:
    assert main(["eval", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_evaluations_while_training_compile_nothing(tmp_path, monkeypatch) -> None:
    """They have other numbers of rows than training, for which everything would be compiled again."""
    settings = []
    monkeypatch.setattr(
        "mtrl_vec.train.evaluation.ActingPolicy", lambda policy, config, *_, **__: settings.append(config)
    )
    config = tiny_config(compile="on")
    Evaluation(config, tmp_path, make_policy(config), recovery=None)
    assert [config.runtime.compile for config in settings] == ["off"]
