"""What a run survives: dead simulators, a full disk, numbers that are not finite. Real ones, as far as that goes."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from test_cli import descendants, start_training, still_running, workers_of
from test_resume import SETTINGS, assert_same, metrics, train, whole_state

from mtrl_vec import diagnosis, trainer
from mtrl_vec.checkpoint import checkpoints, load_checkpoint
from mtrl_vec.errors import Diverged, InputError, WorkerDied
from mtrl_vec.evaluation import Evaluation
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.runs import RunLog
from mtrl_vec.trainer import Trainer


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_had_happened(tmp_path, overlap) -> None:
    """Killed at three moments: in a rollout, right after one, and while its replacement starts."""
    train(tmp_path / "undisturbed", num_workers=2, overlap=overlap)
    run = Trainer(tiny_config(run_dir=tmp_path / "run", num_workers=2, overlap=overlap, **SETTINGS))
    collect, start, calls = run.collection.collect, run.collection.start, []

    def kill_one() -> None:
        os.kill(run.collection.workers[1], signal.SIGKILL)

    def collect_with_losses():
        calls.append("collect")
        if calls.count("collect") == 2:
            env, step = run.collection._env, run.collection._env.step_and_maybe_reset

            def step_once_more(td):
                calls.append("step")
                if calls.count("step") == 5:
                    kill_one()
                return step(td)

            env.step_and_maybe_reset = step_once_more
        rollout = collect()
        if calls.count("collect") == 5:
            kill_one()
        return rollout

    def start_with_a_loss(*args):
        calls.append("start")
        start(*args)
        if calls.count("start") == 3:
            kill_one()

    run.collection.collect, run.collection.start = collect_with_losses, start_with_a_loss
    run.train()
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


def test_a_worker_of_the_evaluation_is_replaced_as_well(tmp_path, monkeypatch) -> None:
    train(tmp_path / "undisturbed", num_workers=2)
    calls = []

    class LosingEvaluation(Evaluation):
        def __call__(self):
            calls.append(1)
            if len(calls) == 2:
                os.kill(self._pool._workers[0].pid, signal.SIGKILL)
                time.sleep(0.1)
            return super().__call__()

    monkeypatch.setattr(trainer, "Evaluation", LosingEvaluation)
    train(tmp_path / "run", num_workers=2)
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "undisturbed"))
    assert len(calls) == 4 and "restart 1 of at most 3" in (tmp_path / "run" / "events.log").read_text()


def test_more_losses_than_allowed_end_the_run_after_saving(tmp_path) -> None:
    run = Trainer(tiny_config(run_dir=tmp_path / "run", num_workers=2, max_restarts=1, **SETTINGS))
    collect, calls = run.collection.collect, []

    def collect_and_lose():
        calls.append(1)
        if len(calls) in (2, 4):
            os.kill(run.collection.workers[0], signal.SIGKILL)
        return collect()

    run.collection.collect = collect_and_lose
    with pytest.raises(WorkerDied, match="simulation worker 0"):
        run.train()
    assert load_checkpoint(checkpoints(tmp_path / "run")[0])["frames"] == run.frames == 2 * 192


def test_a_run_from_the_command_line_loses_a_worker_and_goes_on_and_leaves_nothing_behind(tmp_path) -> None:
    before = shared_memory()
    process, children = start_training(tmp_path / "run", "--total-frames", str(60 * 192))
    victim = workers_of(children)[1]
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "events.log").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    while len(workers_of(descendants(process.pid))) < 2:  # those that take their place
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children += descendants(process.pid)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"simulation worker 1 (pid {victim}) died" in err and "Traceback" not in err
    assert load_checkpoint(checkpoints(tmp_path / "run")[0])["frames"] == 60 * 192
    assert not still_running(children)
    assert shared_memory() <= before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path) -> None:
    run = Trainer(tiny_config(run_dir=tmp_path / "run", checkpoint_seconds=0, **SETTINGS))
    learn, calls = run.ppo.learn, []

    def fill_the_disk_for_the_second_iteration(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            for name in ("checkpoint-384.tmp", "best.tmp"):
                (tmp_path / "run" / name).symlink_to("/dev/full")
        return learn(*args, **options)

    run.ppo.learn = fill_the_disk_for_the_second_iteration
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
    target = os.dup(log._file.fileno())
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file.fileno())
    log.write(row | {"iteration": 2})
    log.write(row | {"iteration": 3})
    os.dup2(target, log._file.fileno())
    log.write(row | {"iteration": 4})
    log.close()
    for fd in (target, full):
        os.close(fd)
    assert notes == [f"cannot write metrics to {tmp_path} (No space left on device): the run goes on"]
    assert [row["iteration"] for row in metrics(tmp_path)] == ["1", "2", "3", "4"]


def poison(run: Trainer, iterations: set[int], task: int, value: float = math.nan) -> None:
    """Spoil the advantages of a task in some iterations."""
    update, calls = run.ppo.update, []

    def poisoned(data):
        calls.append(1)
        if len(calls) in iterations:
            data["advantage"][data["task_idx"] == task] = value
        return update(data)

    run.ppo.update = poisoned


def test_updates_without_finite_numbers_are_skipped_and_counted(tmp_path) -> None:
    run = Trainer(tiny_config(run_dir=tmp_path / "run", **SETTINGS))
    poison(run, {2, 4}, task=1)
    run.train()
    assert [int(row["train/skipped_updates"]) for row in metrics(tmp_path / "run")] == [0, 4, 4, 8, 8, 8]
    assert all(torch.isfinite(tensor).all() for tensor in run.policy.state_dict().values())


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
    assert content["iteration"] == 4
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
    policy = SharedPolicy(tiny_config())
    batch = minibatch(policy)
    assert diagnosis.diagnose(tiny_config(), policy.state_dict(), batch).startswith("nothing")
    batch[key][row] = math.inf
    assert diagnosis.diagnose(tiny_config(), policy.state_dict(), batch) == expected


def test_a_diagnosis_looks_inside_the_policy_and_its_gradients() -> None:
    policy = SharedPolicy(tiny_config())
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
