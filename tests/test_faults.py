"""What a run survives: dead simulators, a full disk, numbers that are not finite. Real ones, as far as that goes."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from helpers import assert_same, make_policy, tiny_config
from mtrl_vec.config.sampling import CurriculumConfig, DifficultyConfig
from mtrl_vec.envs import make_env
from mtrl_vec.errors import Diverged, InputError, WorkerDied
from mtrl_vec.learn import diagnosis
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.checkpoint import checkpoints, load_checkpoint
from mtrl_vec.train import Trainer
from mtrl_vec.train.evaluation import Evaluation
from mtrl_vec.train.log import RunLog
from processes import (
    descendants,
    left,
    rows_of,
    shared_memory_of,
    start_training,
    still_running,
    wait_for,
    workers_of,
)
from runs import SETTINGS, metrics, train, whole_state


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": CurriculumConfig(curriculum_frames=384)},
        {"double_buffer": True},
        pytest.param({"sampling": DifficultyConfig(difficulty_by="loss"), "overlap": True}, marks=pytest.mark.slow),
        pytest.param({"num_envs": 13, "num_steps": 16, "total_frames": 6 * 13 * 16}, marks=pytest.mark.slow),
        pytest.param(
            {"tasks": ("MT10",), "num_envs": 20, "num_steps": 16, "total_frames": 6 * 320, "sampling": "random"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one after the other", "halves in turn", "overlap", "idle rows", "ten tasks"],
)
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_had_happened(tmp_path, settings) -> None:
    """Killed at three moments: in a rollout, right after one, and while its replacement starts."""
    train(tmp_path / "undisturbed", num_workers=2, **settings)
    run = Trainer(tiny_config(run_dir=tmp_path / "run", num_workers=2, **SETTINGS | settings))
    collect, start, calls = run.rollouts.collect, run.rollouts._start, []

    def kill_one() -> None:
        os.kill(run.rollouts.pids[1], signal.SIGKILL)

    def collect_with_losses(task_probs):
        calls.append("collect")
        if calls.count("collect") == 2:
            act = run.acting._outputs

            def act_once_more(*inputs):
                calls.append("step")
                if calls.count("step") == 5:
                    kill_one()
                    run.acting._outputs = act
                return act(*inputs)

            run.acting._outputs = act_once_more
        rollout = collect(task_probs)
        if calls.count("collect") == 5:
            kill_one()
        return rollout

    def start_with_a_loss(task_probs):
        calls.append("start")
        start(task_probs)
        if calls.count("start") == 3:
            kill_one()

    run.rollouts.collect, run.rollouts._start = collect_with_losses, start_with_a_loss
    run.train()
    assert (calls.count("collect"), calls.count("start"), calls.count("step")) == (6, 4, 5)
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "undisturbed"))
    rows, expected = metrics(tmp_path / "run"), metrics(tmp_path / "undisturbed")
    restarts = [int(row.pop("train/restarts")) for row in rows]
    assert restarts[-1] == 3 and restarts == sorted(restarts)
    assert rows == [{k: v for k, v in row.items() if k != "train/restarts"} for row in expected]
    events = (tmp_path / "run" / "events.log").read_text().splitlines()
    assert len(events) == 3
    assert all(
        "simulation worker 1" in event and f"restart {i} of at most 3" in event for i, event in enumerate(events, 1)
    )


@pytest.mark.parametrize("moment", ["before", "in the middle"])
def test_a_worker_of_the_evaluation_is_replaced_as_well(tmp_path, monkeypatch, moment) -> None:
    train(tmp_path / "undisturbed", num_workers=2)
    calls: list[str] = []

    class LosingEvaluation(Evaluation):
        def __call__(self):
            calls.append("evaluation")
            return super().__call__()

        def _attempt(self):
            calls.append("attempt")
            if calls.count("attempt") == 2:
                pool, step = self._pool, self._pool.step

                def step_once_more(td):
                    calls.append("step")
                    if calls.count("step") == 5:
                        os.kill(pool.pids[0], signal.SIGKILL)
                    return step(td)

                if moment == "before":
                    os.kill(pool.pids[0], signal.SIGKILL)
                    time.sleep(0.1)
                else:
                    pool.step = step_once_more
            return super()._attempt()

    monkeypatch.setattr("mtrl_vec.train.run.Evaluation", LosingEvaluation)
    train(tmp_path / "run", num_workers=2)
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "undisturbed"))
    rows, expected = metrics(tmp_path / "run"), metrics(tmp_path / "undisturbed")
    assert [int(row.pop("train/restarts")) for row in rows] == [0, 0, 0, 1, 1, 1]
    assert rows == [{k: v for k, v in row.items() if k != "train/restarts"} for row in expected]
    best = [load_checkpoint(tmp_path / name / "best.pt") for name in ("run", "undisturbed")]
    assert_same(best[0]["policy"], best[1]["policy"])
    assert best[0]["frames"] == best[1]["frames"]
    assert (calls.count("evaluation"), calls.count("attempt")) == (3, 4)
    events = (tmp_path / "run" / "events.log").read_text()
    assert "simulation worker 0" in events and "restart 1 of at most 3" in events


CALLS = ["snapshot", "set_seed", "reset", "step_and_maybe_reset", "set_task_probs", "restore", "collect"]


@pytest.mark.parametrize("call", CALLS)
def test_whatever_is_asked_of_a_pool_with_a_dead_worker_names_it(call) -> None:
    env = make_env(num_workers=2, envs_per_worker=3)
    try:
        td, snapshot = env.reset(), env.snapshot()
        td["action"] = torch.zeros(2, 3, 4)
        victim = env.pids[0]
        os.kill(victim, signal.SIGKILL)
        arguments = {"set_seed": (1,), "step_and_maybe_reset": (td,), "set_task_probs": (None,), "restore": (snapshot,)}
        arguments["collect"] = (lambda state: state, 4)
        with pytest.raises(WorkerDied, match=rf"worker 0 \(pid {victim}\) died with exit code -9"):
            getattr(env, call)(*arguments.get(call, ()))
    finally:
        env.close()


def test_the_loss_of_the_process_that_starts_the_others_is_survived(tmp_path) -> None:
    train(tmp_path / "undisturbed", num_workers=2)
    run = Trainer(tiny_config(run_dir=tmp_path / "run", num_workers=2, **SETTINGS))
    collect, calls, workers = run.rollouts.collect, [], []

    def collect_and_kill_the_server(task_probs):
        calls.append(1)
        if len(calls) == 3:
            workers.extend(psutil.Process(pid) for pid in run.rollouts.pids)
            workers[0].parent().kill()
            time.sleep(0.2)
        return collect(task_probs)

    run.rollouts.collect = collect_and_kill_the_server
    run.train()
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "undisturbed"))
    assert "the fork server of the simulation workers died" in (tmp_path / "run" / "events.log").read_text()
    assert len(workers) == 2 and not still_running(workers)


def test_more_losses_than_allowed_end_the_run_after_saving(tmp_path) -> None:
    run = Trainer(tiny_config(run_dir=tmp_path / "run", num_workers=2, max_restarts=1, **SETTINGS))
    collect, calls = run.rollouts.collect, []

    def collect_and_lose(task_probs):
        calls.append(1)
        if len(calls) in (2, 3):
            os.kill(run.rollouts.pids[0], signal.SIGKILL)
        return collect(task_probs)

    run.rollouts.collect = collect_and_lose
    with pytest.raises(WorkerDied, match=r"simulation worker 0 \(pid \d+\) died.*, and --max-restarts is 1$"):
        run.train()
    assert load_checkpoint(checkpoints(tmp_path / "run")[0])["frames"] == run.frames == 2 * 192


@pytest.mark.slow
def test_a_run_from_the_command_line_loses_a_worker_and_goes_on_and_leaves_nothing_behind(tmp_path) -> None:
    process, children = start_training(tmp_path / "run", "--total-frames", str(150 * 192))
    shared = shared_memory_of(children)
    victim = workers_of(children)[1]
    os.kill(victim, signal.SIGKILL)
    wait_for((tmp_path / "run" / "events.log").exists, process)
    rows = rows_of(tmp_path / "run")
    wait_for(lambda: rows_of(tmp_path / "run") > rows, process)  # by those that have taken their place
    replaced = descendants(process.pid)
    children, shared = children + replaced, shared | shared_memory_of(replaced)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert f"simulation worker 1 (pid {victim}) died" in err and "Traceback" not in err
    assert load_checkpoint(checkpoints(tmp_path / "run")[0])["frames"] == 150 * 192
    assert not still_running(children)
    assert not left(shared)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path) -> None:
    run = Trainer(tiny_config(run_dir=tmp_path / "run", checkpoint_seconds=0, **SETTINGS))
    learn, calls = run.learner.learn, []

    def fill_the_disk_for_the_second_iteration(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            for name in ("checkpoint-384.pt.tmp", "best.pt.tmp"):
                (tmp_path / "run" / name).symlink_to("/dev/full")
        return learn(*args, **options)

    run.learner.learn = fill_the_disk_for_the_second_iteration
    run.train()
    assert {path.name for path in checkpoints(tmp_path / "run")} == {f"checkpoint-{n * 192}.pt" for n in (4, 5, 6)}
    events = (tmp_path / "run" / "events.log").read_text()
    assert "checkpoint-384.pt (No space left on device): the checkpoints before it are still there" in events
    assert "cannot write best.pt" in events and load_checkpoint(tmp_path / "run" / "best.pt")["frames"] > 384
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk_costs_no_row_of_the_metrics_once_there_is_room_again(tmp_path) -> None:
    notes: list[str] = []
    log = RunLog(tmp_path, tiny_config(tasks=("push",)), 0, 0, notes.append)
    row = dict.fromkeys(log._columns, 0.5) | {"iteration": 1, "frames": 192}
    log.write(row)
    there = os.dup(log._file.fileno())
    full = os.open("/dev/full", os.O_WRONLY)
    for first in (2, 52):  # twice, for longer than any buffer would last
        os.dup2(full, log._file.fileno())
        for iteration in range(first, first + 49):
            log.write(row | {"iteration": iteration})
        os.dup2(there, log._file.fileno())
        log.write(row | {"iteration": first + 49})
    log.close()
    for descriptor in (there, full):
        os.close(descriptor)
    assert notes == [f"cannot write metrics to {tmp_path} (No space left on device): the run continues"] * 2
    assert [int(row["iteration"]) for row in metrics(tmp_path)] == list(range(1, 102))


def poison(run: Trainer, iterations: set[int], task: int, value: float = math.nan) -> None:
    """Spoil the advantages of a task in some iterations."""
    update, calls = run.learner.update, []

    def poisoned(data):
        calls.append(1)
        if len(calls) in iterations:
            data["advantage"][data["task_idx"] == task] = value
        return update(data)

    run.learner.update = poisoned


def test_updates_without_finite_numbers_are_skipped_and_counted(tmp_path) -> None:
    run = Trainer(tiny_config(run_dir=tmp_path / "run", **SETTINGS))
    poison(run, {2, 4}, task=1)
    run.train()
    assert [int(row["train/skipped_updates"]) for row in metrics(tmp_path / "run")] == [0, 4, 4, 8, 8, 8]
    assert all(torch.isfinite(tensor).all() for tensor in run.policy.state_dict().values())


@pytest.mark.parametrize("key", [("next", "reward"), "observation"])
def test_a_run_that_diverges_at_once_says_why_and_keeps_the_evidence(tmp_path, key) -> None:
    """From a simulator that returns what is not a number for one task: nothing but that task is blamed."""
    changes = {"max_skipped_updates": 4, "num_minibatches": 1, "sampling": "uniform"}
    run = Trainer(tiny_config(run_dir=tmp_path / "run", **SETTINGS | changes))
    collect = run.rollouts.collect

    def collect_nonsense(task_probs):
        rollout = collect(task_probs)
        rollout[key][rollout["task_idx"] == 2] = math.nan
        return rollout

    run.rollouts.collect = collect_nonsense
    what = "value_target" if key != "observation" else "observation"
    with pytest.raises(Diverged, match=rf"in iteration 2: not finite is {what} of pick-place-v3 \(64 of 64 frames\)"):
        run.train()
    assert diagnosis.reproduce(tmp_path / "run" / "diverged.pt") == f"{what} of pick-place-v3 (64 of 64 frames)"


def test_too_many_in_a_row_stop_the_run_with_a_diagnosis_that_can_be_reproduced(tmp_path) -> None:
    settings = SETTINGS | {"total_frames": 9 * 192, "max_skipped_updates": 10}
    run = Trainer(tiny_config(run_dir=tmp_path / "run", **settings))
    poison(run, {1, 3, 4, 5}, task=1)  # 4 updates each
    with pytest.raises(
        Diverged, match=r"in iteration 5: not finite is advantage of push-v3 \((\d+) of \1 frames\)"
    ) as e:
        run.train()
    assert "\n" not in str(e.value)
    content = load_checkpoint(checkpoints(tmp_path / "run")[0])
    assert content["progress"]["iteration"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in content["policy"].values())
    dump = tmp_path / "run" / "diverged.pt"
    assert str(dump) in str(e.value)
    assert diagnosis.reproduce(dump) in str(e.value)
    with pytest.raises(InputError, match="holds no minibatch"):
        diagnosis.reproduce(checkpoints(tmp_path / "run")[0])


def minibatch(policy: SharedPolicy) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    task_idx = torch.arange(12) % 3
    one_hot = torch.nn.functional.one_hot(task_idx, 3).float()
    normal = {"observation": (39,), "action": (4,), "action_log_prob": (), "advantage": (1,), "value_target": (1,)}
    return {k: torch.randn(12, *shape) for k, shape in normal.items()} | {"task_one_hot": one_hot, "task_idx": task_idx}


@pytest.mark.parametrize(
    ("key", "row", "expected"),
    [
        ("observation", 0, "observation of reach-v3 (1 of 4 frames)"),
        ("action", 2, "action of pick-place-v3 (1 of 4 frames)"),
        ("value_target", 1, "value_target of push-v3 (1 of 4 frames)"),
    ],
)
def test_a_diagnosis_names_task_and_tensor(key, row, expected) -> None:
    policy = make_policy(tiny_config())
    batch = minibatch(policy)
    assert diagnosis.diagnose(tiny_config(), policy.state_dict(), batch).startswith("nothing")
    batch[key][row] = math.inf
    assert diagnosis.diagnose(tiny_config(), policy.state_dict(), batch) == expected


def test_a_diagnosis_looks_inside_the_policy_and_its_gradients() -> None:
    policy = make_policy(tiny_config())
    batch = minibatch(policy)
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    state["torso.module.layers.0.weight"][0, 0] = math.nan
    assert diagnosis.diagnose(tiny_config(), state, batch) == "torso.module.layers.0.weight of the policy"
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    state["critic_heads.module.heads.bias1"][1] = 1e30  # finite; what comes of it is not
    state["critic_heads.module.heads.weight2"][1] = 1e30
    assert diagnosis.diagnose(tiny_config(), state, batch) == "state_value of push-v3 (4 of 4 frames)"
    batch["value_target"][2] = 1e30  # its square is more than float32 holds
    assert diagnosis.diagnose(tiny_config(), policy.state_dict(), batch) == "loss_critic"
