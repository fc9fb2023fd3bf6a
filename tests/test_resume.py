"""Going on after an interruption: exactly, and in spite of damaged files."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_cli import left, shared_memory_of, start_training, still_running, wait_for

from mtrl_vec.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mtrl_vec.cli import main
from mtrl_vec.errors import InputError
from mtrl_vec.evaluation import Evaluation
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.ppo import PPO
from mtrl_vec.trainer import Trainer

# Short episodes and evaluations, so that resets, statistics of episodes and best.pt are part of what is compared.
SETTINGS = {"total_frames": 6 * 192, "max_episode_steps": 20, "eval_interval": 384, "eval_episodes": 2}


def train(run_dir: Path, **changes: object) -> Trainer:
    np.random.seed(0)  # nothing draws from it, but it is part of the state
    trainer = Trainer(tiny_config(run_dir=run_dir, **SETTINGS | changes))
    trainer.train()
    return trainer


def train_until_interrupted(run_dir: Path, after: int, **changes: object) -> None:
    """Ctrl-C in the middle of iteration ``after + 1``, when its rollout has been collected."""
    np.random.seed(0)
    trainer = Trainer(tiny_config(run_dir=run_dir, **SETTINGS | changes))
    learn, calls = trainer.ppo.learn, []

    def learn_or_interrupt(*args, **options):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return learn(*args, **options)

    trainer.ppo.learn = learn_or_interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def resume(run_dir: Path, **changes: object) -> Trainer:
    # Nothing of the process that was interrupted may be needed.
    torch.manual_seed(12345)
    np.random.seed(12345)
    trainer = Trainer.resume(run_dir, **changes)
    trainer.train()
    return trainer


def metrics(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def assert_same(one: object, other: object, where: str = "") -> None:
    """Equal to the last bit, whatever is nested how."""
    if isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), where
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        assert one == other or (one != one and other != other), where


def whole_state(run_dir: Path) -> dict[str, object]:
    """Of the newest checkpoint, but for what says where and how long."""
    content = load_checkpoint(checkpoints(run_dir)[0])
    return {k: v for k, v in content.items() if k not in ("config", "elapsed", "seconds", "counts")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run_dir, num_workers=2)
    return run_dir


@pytest.mark.parametrize(("after", "workers"), [(1, 2), (3, 1), (4, 2)])
def test_an_interrupted_run_ends_as_one_that_went_through(tmp_path, undisturbed, after, workers) -> None:
    run_dir = tmp_path / "run"
    train_until_interrupted(run_dir, after, num_workers=2)
    assert load_checkpoint(checkpoints(run_dir)[0])["iteration"] == after
    resume(run_dir, num_workers=workers)
    assert_same(whole_state(run_dir), whole_state(undisturbed))
    assert metrics(run_dir) == metrics(undisturbed)
    assert [row["iteration"] for row in metrics(run_dir)] == [str(i) for i in range(1, 7)]
    best = [load_checkpoint(folder / "best.pt") for folder in (run_dir, undisturbed)]
    assert_same(best[0]["policy"], best[1]["policy"])
    assert best[0]["frames"] == best[1]["frames"]


def test_so_does_one_whose_rollouts_overlap_with_learning(tmp_path) -> None:
    train(tmp_path / "whole", overlap=True)
    train_until_interrupted(tmp_path / "run", 3, overlap=True)
    trainer = resume(tmp_path / "run")
    assert trainer.iteration == 6
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "whole"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(tmp_path, undisturbed) -> None:
    run_dir = tmp_path / "run"
    train_until_interrupted(run_dir, 4, checkpoint_seconds=0, num_workers=2)
    newest, before, oldest = checkpoints(run_dir)
    assert [path.name for path in (newest, before, oldest)] == [f"checkpoint-{n * 192}.pt" for n in (4, 3, 2)]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])  # torn
    data = bytearray(before.read_bytes())
    data[len(data) // 2] ^= 1  # one bit of a tensor
    before.write_bytes(data)
    with pytest.warns(UserWarning) as warned:
        resume(run_dir)
    assert [str(w.message).split(" is not")[0] for w in warned.list if "checkpoint" in str(w.message)] == [
        str(newest),
        str(before),
    ]
    assert_same(whole_state(run_dir), whole_state(undisturbed))
    assert metrics(run_dir) == metrics(undisturbed)
    assert len(list(run_dir.glob("*.damaged"))) == 2


def test_the_last_three_checkpoints_and_the_best_are_kept(tmp_path) -> None:
    train(tmp_path / "run", checkpoint_seconds=0)
    names = {path.name for path in (tmp_path / "run").glob("*.pt")}
    assert names == {"checkpoint-768.pt", "checkpoint-960.pt", "checkpoint-1152.pt", "best.pt"}
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_nothing_random_is_left_out(undisturbed) -> None:
    """And everything that the file holds is a plain tensor or value: `load_checkpoint` takes nothing else."""
    content = load_checkpoint(checkpoints(undisturbed)[0])
    assert content["random"].keys() == {"torch", "cuda", "numpy"}
    assert content["ppo"]["minibatch_order"].dtype == torch.uint8
    slots = content["simulators"]
    assert slots["state"].shape == (12, 56) and slots["rng"].shape == (12, 6) and slots["elapsed"].shape == (12,)
    assert content["versions"]["mujoco"] and content["config"]["seed"] == 1


def test_a_run_that_is_complete_goes_on_with_more_frames(tmp_path) -> None:
    train(tmp_path / "run", total_frames=2 * 192)
    with pytest.raises(InputError, match=r"total_frames is 384.*has them already \(384\)"):
        Trainer.resume(tmp_path / "run")
    trainer = resume(tmp_path / "run", total_frames=4 * 192)
    assert trainer.frames == 4 * 192 and len(metrics(tmp_path / "run")) == 4
    assert "resumed after 384 frames" in (tmp_path / "run" / "events.log").read_text()


def test_what_cannot_be_resumed_is_one_line_and_nothing_changes(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    train(run, total_frames=192, eval_interval=0)
    only_policy = tmp_path / "only-policy"
    only_policy.mkdir()
    content = load_checkpoint(run)
    save_checkpoint(
        only_policy / "checkpoint-1.pt", {k: content[k] for k in ("config", "iteration", "frames", "policy")}
    )
    older = tmp_path / "older"
    older.mkdir()
    episodes = {k: v for k, v in content["episodes"].items() if k != "fast_success"}
    save_checkpoint(
        older / "checkpoint-1.pt", {k: v for k, v in content.items() if k != "format"} | {"episodes": episodes}
    )
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "checkpoint-5.pt").write_bytes(b"PK torn")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for arguments, message in [
        (["--resume"], "--resume needs the folder of a run"),
        (["--resume", str(tmp_path / "missing")], "no checkpoint to resume from in"),
        (["--resume", str(damaged)], "none of the 1 checkpoints"),
        (
            ["--resume", str(only_policy), "--total-frames", "999"],
            f"{only_policy} holds a policy, but not the state of a run",
        ),
        (
            ["--resume", str(older), "--total-frames", "999"],
            f"{older} is from another version (there is no fast_success)",
        ),
        (["--resume", str(run)], "total_frames is 192"),
        (["--resume", str(run), "--lr", "1"], "lr is 1.0: the run in"),
        (["--resume", str(run), "--torso", "64", "64"], "torso is (64, 64): the run in"),
        (["--resume", str(run), "--seed", "5"], "seed is 5: the run in"),
        (["--resume", str(run), "--overlap"], "overlap is True: the run in"),
        (["--resume", str(run), "--preset", "cpu"], "--preset does not go with --resume"),
        (["--resume", str(run), "--overwrite"], "--overwrite does not go with --resume"),
        (["--resume", str(run), "--run-dir", "elsewhere"], "--run-dir does not go with --resume"),
    ]:
        assert main(["train", *arguments]) == 2, arguments
        err = capsys.readouterr().err
        last = err.splitlines()[-1]
        assert last.startswith(f"error: {message}"), arguments
        assert err.count("\n") == 1 + err.count("warning: "), arguments
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_an_interruption_between_metrics_and_checkpoint_leaves_no_row_twice(tmp_path, undisturbed) -> None:
    """Metrics are written every iteration, checkpoints once a minute: a run that was killed has rows to take back."""
    run_dir = tmp_path / "run"
    train_until_interrupted(run_dir, 4, checkpoint_seconds=0, num_workers=2)
    checkpoints(run_dir)[0].unlink()
    with (run_dir / "metrics.csv").open("a") as file:
        file.write("1")  # torn, of an 11, say
    resume(run_dir)
    assert metrics(run_dir) == metrics(undisturbed)
    assert all(math.isfinite(float(row["train/lr"])) for row in metrics(run_dir))
    assert not (run_dir / "metrics.tmp").exists()


def test_a_run_that_was_killed_leaves_no_process_and_goes_on(tmp_path) -> None:
    """SIGKILL of the run itself, as by a machine that runs out of memory: no time to save or to end anything."""
    process, children = start_training(tmp_path / "run", "--total-frames", str(3000 * 192), "--checkpoint-seconds", "0")
    shared = shared_memory_of(children)
    process.kill()
    process.wait()
    assert not still_running(children)
    assert not left(shared)
    frames = load_checkpoint(checkpoints(tmp_path / "run")[0])["frames"]
    trainer = resume(tmp_path / "run", total_frames=frames + 192, num_workers=1)
    assert trainer.frames == frames + 192
    assert [int(row["iteration"]) for row in metrics(tmp_path / "run")] == list(range(1, trainer.iteration + 1))


def test_an_interruption_of_an_evaluation(tmp_path, undisturbed, monkeypatch) -> None:
    """Its iteration is done again: the policy that might be the best one is still to be compared."""

    class Interrupted(Evaluation):
        def __call__(self):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mtrl_vec.trainer.Evaluation", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", num_workers=2)
    assert load_checkpoint(checkpoints(tmp_path / "run")[0])["iteration"] == 1
    resume(tmp_path / "run", num_workers=2)
    assert_same(whole_state(tmp_path / "run"), whole_state(undisturbed))
    assert metrics(tmp_path / "run") == metrics(undisturbed)
    best = [load_checkpoint(folder / "best.pt")["frames"] for folder in (tmp_path / "run", undisturbed)]
    assert best[0] == best[1]


def test_two_processes_do_not_share_a_run(tmp_path) -> None:
    # Seldom enough that the second process, which looks at checkpoints first, does not see them replaced meanwhile.
    process, _ = start_training(tmp_path / "run", "--total-frames", str(9000 * 192), "--checkpoint-seconds", "5")
    try:
        wait_for(lambda: bool(checkpoints(tmp_path / "run")), process)
        for arguments in (["--resume", str(tmp_path / "run")], ["--run-dir", str(tmp_path / "run"), "--overwrite"]):
            command = [sys.executable, "-m", "mtrl_vec", "train", *arguments]
            second = subprocess.run(command, capture_output=True, text=True, timeout=180)
            assert second.returncode == 2
            assert second.stderr.startswith(f"error: {tmp_path / 'run'} is in use by another process")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_lost_metrics_do_not_keep_a_run_from_going_on(tmp_path) -> None:
    train_until_interrupted(tmp_path / "run", 2, eval_interval=0)
    (tmp_path / "run" / "metrics.csv").unlink()
    resume(tmp_path / "run")
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == ["3", "4", "5", "6"]


def test_a_checkpoint_of_the_cpu_does_not_bring_its_optimisers_settings(tmp_path) -> None:
    """A GPU's optimiser has to be capturable; that is not the checkpoint's to decide."""
    config = tiny_config()
    torch.manual_seed(0)
    ppo = PPO(config, SharedPolicy(config))
    state = ppo.state()
    state["optimizer"]["param_groups"][0] |= {"capturable": True, "eps": 0.5}
    other = PPO(config, SharedPolicy(config))
    other.restore(state)
    group = other.optimizer.param_groups[0]
    assert (group["capturable"], group["eps"]) == (False, 1e-5) and group["lr"] is other.lr
