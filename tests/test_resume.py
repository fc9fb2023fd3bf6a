"""Continuing after an interruption: exactly, and in spite of damaged files."""

from __future__ import annotations

import copy
import itertools
import json
import math
import signal
from pathlib import Path

import pytest
import torch

from helpers import assert_same, make_policy, tiny_config
from mtrl_vec.commands.cli import main
from mtrl_vec.commands.parsing import parse_train
from mtrl_vec.config.sampling import CurriculumConfig, MetaConfig
from mtrl_vec.errors import InputError
from mtrl_vec.learn.ppo import PPO
from mtrl_vec.policy import load_policy
from mtrl_vec.policy.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mtrl_vec.train import Trainer
from mtrl_vec.train.evaluation import Evaluation
from processes import left, shared_memory_of, start_training, still_running, wait_for
from runs import PARTS, metrics, resume, train, train_until_interrupted, whole_state


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run_dir, num_workers=2)
    return run_dir


@pytest.mark.parametrize(("after", "workers"), [(1, 2), (3, 1), (4, 2)])
def test_an_interrupted_run_ends_as_one_that_went_through(tmp_path, undisturbed, after, workers) -> None:
    run_dir = tmp_path / "run"
    train_until_interrupted(run_dir, after, num_workers=2)
    assert load_checkpoint(checkpoints(run_dir)[0])["progress"]["iteration"] == after
    resume(run_dir, num_workers=workers)
    assert_same(whole_state(run_dir), whole_state(undisturbed))
    assert metrics(run_dir) == metrics(undisturbed)
    assert [row["iteration"] for row in metrics(run_dir)] == [str(i) for i in range(1, 7)]
    best = [load_checkpoint(folder / "best.pt") for folder in (run_dir, undisturbed)]
    assert_same(best[0]["policy"], best[1]["policy"])
    assert best[0]["frames"] == best[1]["frames"]


@pytest.mark.parametrize("double_buffer", [False, True], ids=["", "by halves"])
def test_so_does_one_whose_rollouts_overlap_with_learning(tmp_path, double_buffer) -> None:
    settings = {"overlap": True, "double_buffer": double_buffer, "num_workers": 2}
    train(tmp_path / "whole", **settings)
    train_until_interrupted(tmp_path / "run", 3, **settings)
    trainer = resume(tmp_path / "run")
    assert trainer.progress.iteration == 6
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "whole"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_so_does_one_of_ten_tasks_with_other_workers(tmp_path) -> None:
    """Eight models in each worker, whose simulations change task and model as they go."""
    settings = {"tasks": ("MT10",), "num_envs": 20, "num_steps": 16, "total_frames": 6 * 320, "eval_episodes": 1}
    train(tmp_path / "whole", num_workers=2, sampling="random", **settings)
    train_until_interrupted(tmp_path / "run", 3, num_workers=2, sampling="random", **settings)
    resume(tmp_path / "run", num_workers=1)
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "whole"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    simulators = load_checkpoint(checkpoints(tmp_path / "run")[0])["rollouts"]["simulators"]
    assert not torch.equal(simulators["task_idx"], torch.arange(20) % 10)


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
    about = {"format", "version", "config", "versions", "frames", "seconds"}
    assert content.keys() == about | set(PARTS)
    assert content["acting"]["noise"]["last"].shape == (12, 4)
    assert content["acting"]["noise"]["generator"].dtype == content["learner"]["minibatch_order"].dtype == torch.uint8
    slots = content["rollouts"]["simulators"]
    assert slots["state"].shape == (12, 56) and slots["rng"].shape == (12, 6) and slots["elapsed"].shape == (12,)
    assert content["versions"]["mujoco"] and content["config"]["seed"] == 1
    assert (content["format"], content["version"]) == ("mtrl_vec checkpoint", 6)


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
        only_policy / "checkpoint-1.pt", {k: content[k] for k in ("config", "versions", "frames", "policy")}
    )
    older = tmp_path / "older"
    older.mkdir()
    statistics = {k: v for k, v in content["statistics"].items() if k != "fast_success"}
    save_checkpoint(older / "checkpoint-192.pt", content | {"statistics": statistics})
    other = tmp_path / "other"
    other.mkdir()
    policy = {k: v[..., :1] if v.dim() else v for k, v in content["policy"].items()}
    save_checkpoint(other / "checkpoint-192.pt", content | {"policy": policy})
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "checkpoint-5.pt").write_bytes(b"PK torn")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for arguments, message in [
        (["--resume"], "Missing value for argument '--resume'"),
        (["--resume", str(tmp_path / "missing")], "no checkpoint to resume from in"),
        (["--resume", str(damaged)], "none of the 1 checkpoints"),
        (
            ["--resume", str(only_policy), "--total-frames", "999"],
            f"{only_policy} holds a policy, but not the state of a run",
        ),
        (
            ["--resume", str(older), "--total-frames", "999"],
            f"the run in {older} is from another version ('fast_success')",
        ),
        (["--resume", str(other), "--total-frames", "999"], f"the run in {other} is from another version (Error"),
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
    assert not list(run_dir.glob("*.tmp"))


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
    rows = metrics(tmp_path / "run")
    assert [int(row["iteration"]) for row in rows] == list(range(1, trainer.progress.iteration + 1))


def test_an_interruption_of_an_evaluation(tmp_path, undisturbed, monkeypatch) -> None:
    """Its iteration is done again: the policy that might be the best one is still to be compared."""

    class Interrupted(Evaluation):
        def __call__(self):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mtrl_vec.train.run.Evaluation", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", num_workers=2)
    assert load_checkpoint(checkpoints(tmp_path / "run")[0])["progress"]["iteration"] == 1
    resume(tmp_path / "run", num_workers=2)
    assert_same(whole_state(tmp_path / "run"), whole_state(undisturbed))
    assert metrics(tmp_path / "run") == metrics(undisturbed)
    best = [load_checkpoint(folder / "best.pt")["frames"] for folder in (tmp_path / "run", undisturbed)]
    assert best[0] == best[1]


def test_two_processes_do_not_share_a_run(tmp_path, capsys) -> None:
    process, _ = start_training(tmp_path / "run", "--total-frames", str(9000 * 192), "--checkpoint-seconds", "0")
    try:
        wait_for(lambda: bool(checkpoints(tmp_path / "run")), process)
        process.send_signal(signal.SIGSTOP)  # it keeps its lock, and its checkpoints are not replaced meanwhile
        for arguments in (["--resume", str(tmp_path / "run")], ["--run-dir", str(tmp_path / "run"), "--overwrite"]):
            assert main(["train", *arguments]) == 2
            assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'run'} is in use by another process")
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
    ppo = PPO(config, make_policy(config))
    state = ppo.state_dict()
    state["optimizer"]["param_groups"][0] |= {"capturable": True, "eps": 0.5}
    other = PPO(config, make_policy(config))
    other.load_state_dict(state)
    group = other.optimizer.param_groups[0]
    assert (group["capturable"], group["eps"]) == (False, 1e-5) and group["lr"] is other.lr


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("uneven") / "run"
    train(run_dir, num_envs=13, num_minibatches=5, num_workers=1, **UNEVEN)
    return run_dir


UNEVEN = {"total_frames": 6 * 13 * 16, "eval_interval": 3 * 13 * 16, "eval_episodes": 3}
"""13 environments: neither three tasks nor two or three workers divide them; nor five minibatches their 208 frames."""


@pytest.mark.parametrize("workers", [2, 3])
def test_environments_that_nothing_divides_give_the_same_numbers_with_any_workers(tmp_path, uneven, workers) -> None:
    train(tmp_path / "run", num_envs=13, num_minibatches=5, num_workers=workers, **UNEVEN)
    assert_same(whole_state(tmp_path / "run"), whole_state(uneven))
    assert metrics(tmp_path / "run") == metrics(uneven)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
def test_so_they_do_when_interrupted_and_resumed_with_other_workers(tmp_path, uneven, before, after) -> None:
    train_until_interrupted(tmp_path / "run", 4, num_envs=13, num_minibatches=5, num_workers=before, **UNEVEN)
    trainer = resume(tmp_path / "run", num_workers=after)
    assert (trainer.frames, trainer.config.runtime.num_workers) == (6 * 13 * 16, after)
    assert_same(whole_state(tmp_path / "run"), whole_state(uneven))
    assert metrics(tmp_path / "run") == metrics(uneven)
    best = [load_checkpoint(folder / "best.pt") for folder in (tmp_path / "run", uneven)]
    assert best[0]["frames"] == best[1]["frames"]
    assert_same(best[0]["policy"], best[1]["policy"])


def test_environments_that_nothing_divides_with_overlap_and_drawn_tasks(tmp_path) -> None:
    """Where idle rows would show most: tasks change, and rollouts wait for their turn."""
    settings = UNEVEN | {"num_envs": 13, "num_minibatches": 5, "overlap": True, "sampling": "random"}
    train(tmp_path / "whole", num_workers=1, **settings)
    train_until_interrupted(tmp_path / "run", 3, num_workers=3, **settings)
    resume(tmp_path / "run", num_workers=2)
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "whole"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.fixture(scope="module")
def intricate(tmp_path_factory) -> Path:
    """A run that was interrupted in the middle, with all that has a state."""
    run_dir = tmp_path_factory.mktemp("intricate") / "run"
    train_until_interrupted(run_dir, 4, sampling="meta", popart=True, overlap=True)
    return run_dir


def test_every_part_takes_its_state_and_gives_it_again(intricate) -> None:
    content = load_checkpoint(checkpoints(intricate)[0])
    original = copy.deepcopy(content)
    run = Trainer(tiny_config(run_dir=intricate.parent / "other", sampling="meta", popart=True, overlap=True, seed=9))
    assert content["pipeline"]["ahead"] is not None and content["evaluation"]["best_success"] >= 0
    for name in PARTS:
        part = getattr(run, name)
        with pytest.raises(AssertionError):
            assert_same(part.state_dict(), original[name], name)
        part.load_state_dict(content[name])
        assert_same(part.state_dict(), original[name], name)
        part.load_state_dict(copy.deepcopy(part.state_dict()))  # twice is as good as once
        assert_same(part.state_dict(), original[name], name)
    run.rollouts.close()


def test_a_run_does_not_change_the_checkpoint_that_it_continues_from(intricate) -> None:
    content = load_checkpoint(checkpoints(intricate)[0])
    original = copy.deepcopy(content)
    run = Trainer.resume(intricate)
    run.checkpoints.restore(content)
    run.train()
    assert_same(content, original)


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict[str, Path]:
    """The folders of runs of one iteration by their task sampling, which could all continue."""
    runs = {
        "uniform": {"sampling": "uniform"},
        "curriculum": {"sampling": CurriculumConfig(curriculum_success=0.8)},
        "meta": {"sampling": MetaConfig(meta_lr=0.02), "task_weights": (1.0, 2.0, 3.0)},
    }
    folders = {name: tmp_path_factory.mktemp("started") / name for name in runs}
    for name, settings in runs.items():
        train(folders[name], total_frames=192, eval_interval=0, **settings)
    return folders


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("uniform", "--seed 5", "seed is 5: the run in {run} was started with 1"),
        (
            "uniform",
            "--tasks push reach",
            "tasks is ('push-v3', 'reach-v3'): the run in {run} was started with ('reach",
        ),
        ("uniform", "--num-envs 13", "num_envs is 13: the run in {run} was started with 12"),
        ("uniform", "--max-episode-steps 21", "max_episode_steps is 21: the run in {run} was started with 20"),
        ("uniform", "--goals-seed 1", "goals_seed is 1: the run in {run} was started with None"),
        ("uniform", "--no-random-phase", "random_phase is False: the run in {run} was started with True"),
        ("uniform", "--torso 64 64", "torso is (64, 64): the run in {run} was started with (32, 32)"),
        ("uniform", "--no-popart", "popart is False: the run in {run} was started with True"),
        ("uniform", "--no-relative-features", "relative_features is False: the run in {run} was started with True"),
        ("uniform", "--lr 1", "lr is 1.0: the run in {run} was started with 0.0003"),
        ("uniform", "--num-minibatches 3", "num_minibatches is 3: the run in {run} was started with 2"),
        ("uniform", "--overlap", "overlap is True: the run in {run} was started with False"),
        ("uniform", "--gradient-method pcgrad", "gradient_method is pcgrad: the run in {run} was started with none"),
        ("uniform", "--task-weights 1 1 2", "task_weights is (1.0, 1.0, 2.0): the run in {run} was started with (1.0,"),
        ("uniform", "--task-sampling meta", "task_sampling is meta: the run in {run} was started with uniform"),
        ("uniform", "--task-sampling curriculum", "task_sampling is curriculum: the run in {run} was started with uni"),
        ("uniform", "--init-from pretrained", "init_from is pretrained: the run in {run} was started with None"),
        ("meta", "--meta-lr 0.03", "meta_lr is 0.03: the run in {run} was started with 0.02"),
        ("meta", "--temperature 2", "temperature is 2.0: the run in {run} was started with 1.0"),
        ("meta", "--min-task-prob 0.2", "min_task_prob is 0.2: the run in {run} was started with 0.1"),
        ("meta", "--task-sampling progress", "task_sampling is progress: the run in {run} was started with meta"),
        ("meta", "--task-sampling uniform", "task_sampling is uniform: the run in {run} was started with meta"),
        ("curriculum", "--task-sampling random", "task_sampling is random: the run in {run} was started with curri"),
        ("curriculum", "--curriculum-success 0.9", "curriculum_success is 0.9: the run in {run} was started with 0.8"),
        ("curriculum", "--curriculum push reach pick-place", "curriculum is ('push-v3', 'reach-v3', 'pick-place-v3'):"),
    ],
)
def test_what_a_run_learns_is_not_changed_when_it_is_resumed(started, capsys, run, flags, message) -> None:
    folder = started[run]
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(["train", "--resume", str(folder), "--total-frames", "999", *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message.format(run=folder)}") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_how_a_run_executes_may_change_when_it_is_resumed(started) -> None:
    changes = {
        "total_frames": 384,
        "num_workers": 1,
        "checkpoint_seconds": 0.0,
        "eval_interval": 192,
        "eval_episodes": 1,
        "max_restarts": 0,
        "max_skipped_updates": 1,
        "log_gradients": True,
    }
    runtime = resume(started["uniform"], **changes).config.runtime
    assert {name: getattr(runtime, name) for name in changes} == changes
    written = json.loads((started["uniform"] / "config.json").read_text())["runtime"]
    assert {name: written[name] for name in changes} == changes


def test_flags_that_say_what_is_so_already_are_no_change(started) -> None:
    folder = started["meta"]
    flags = (
        "--seed 1 --torso 32 32 --task-sampling meta --meta-lr 0.02 --task-weights 1 2 3 --tasks reach push pick-place"
    )
    assert main(["train", "--resume", str(folder), "--total-frames", "384", *flags.split()]) == 0
    assert load_checkpoint(checkpoints(folder)[0])["frames"] == 384


def test_settings_are_written_as_what_they_came_to(tmp_path, monkeypatch) -> None:
    """Defaults that stand for something else, and ``auto``, are replaced in config.json and in all checkpoints."""
    monkeypatch.chdir(tmp_path)
    sizes = (
        "--num-envs 3 --num-steps 16 --num-minibatches 1 --num-epochs 1 --torso 32 32 --head 16 --max-episode-steps 20"
    )
    config = parse_train([*sizes.split(), "--total-frames", "48", "--eval-interval", "48", "--eval-episodes", "1"])
    assert config.runtime.device == "auto" and config.runtime.num_workers is config.runtime.run_dir is None
    run = Trainer(config)
    run.train()
    (folder,) = (tmp_path / "runs").iterdir()
    written = [json.loads((folder / "config.json").read_text())]
    written += [load_checkpoint(path)["config"] for path in (folder / "best.pt", folder / "checkpoint-48.pt")]
    for values in written:
        assert values == written[0] == run.config.to_dict()
        assert "auto" not in itertools.chain(*(group.values() for group in values.values() if isinstance(group, dict)))
        assert values["runtime"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
        assert type(values["runtime"]["num_workers"]) is int and 1 <= values["runtime"]["num_workers"] <= 3
        assert (tmp_path / values["runtime"]["run_dir"]).samefile(folder)
        assert values["learner"]["task_weights"] == [1.0, 1.0, 1.0]
    many = Trainer(tiny_config(run_dir=tmp_path / "many", num_envs=3, num_minibatches=1, num_workers=50))
    assert json.loads((tmp_path / "many" / "config.json").read_text())["runtime"]["num_workers"] == 3
    many.lock.release()


FLAT = {
    "tasks": ["reach-v3", "push-v3", "pick-place-v3"],
    "total_frames": 2000000,
    "seed": 1,
    "device": "auto",
    "compile": "auto",
    "cuda_graphs": True,
    "precision": "auto",
    "overlap": False,
    "run_dir": None,
    "overwrite": False,
    "quiet": False,
    "wandb": False,
    "checkpoint_seconds": 60.0,
    "max_restarts": 3,
    "max_skipped_updates": 36,
    "num_envs": 360,
    "num_workers": None,
    "max_episode_steps": 100,
    "goals_seed": None,
    "random_phase": True,
    "torso": [256, 256],
    "head": 128,
    "init_std": 1.0,
    "final_std": 0.3,
    "learn_std": True,
    "num_steps": 32,
    "num_epochs": 6,
    "num_minibatches": 6,
    "lr": 0.0003,
    "target_kl": 0.02,
    "final_kl_fraction": 0.2,
    "eval_interval": 250000,
    "eval_episodes": 60,
    "schedule": "uniform",
    "share_floor": 0.1,
    "temperature": 1.0,
    "curriculum": None,
    "curriculum_success": 0.9,
    "curriculum_frames": None,
    "difficulty_by": "success",
    "meta_lr": 0.01,
    "balance": "none",
    "task_weights": None,
    "success_bonus": 5.0,
    "gamma": 0.99,
    "gae_lambda": 0.97,
    "clip_epsilon": 0.2,
    "entropy_coeff": 0.0,
    "critic_coeff": 0.5,
    "max_grad_norm": 1.0,
    "relative_inputs": True,
    "normalize_observation": True,
    "normalize_reward": True,
    "popart": False,
    "per_task_advantage": True,
}
"""The settings of a run of version 1, as it wrote them."""


@pytest.mark.parametrize("method", ["uniform", "curriculum", "meta"])
def test_a_run_of_version_1_is_one_line_that_says_what_to_do(tmp_path, capsys, method) -> None:
    run = tmp_path / "run"
    run.mkdir()
    flat = FLAT | {"schedule": method, "run_dir": str(run), "torso": [32, 32], "head": 16}
    config = tiny_config(popart=False, direct_features=False)
    policy = make_policy(config)
    with torch.no_grad():  # the limit was applied when the standard deviation was read
        policy.actor_heads[0].module.log_std[0] = 0.5
        policy.actor_heads[0].module.std_limit.fill_(0.8)
    learner = PPO(config, policy)
    content = {
        "format": "mtrl_vec checkpoint 1",
        "config": flat,
        "iteration": 2,
        "frames": 23040,
        "versions": {"torch": "2.11.0"},
        "policy": policy.state_dict(),
        "ppo": learner.state_dict(),
        "simulators": {"state": torch.zeros(360, 56)},
    }
    torch.save(content, run / "checkpoint-23040.pt")
    (run / "config.json").write_text(json.dumps(flat))
    before = {path: path.read_bytes() for path in run.iterdir()}
    for flags in ([], ["--total-frames", "9000000"], ["--quiet"], ["--seed", "3"]):
        assert main(["train", "--resume", str(run), *flags]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: the run in {run} is from an older version") and err.count("\n") == 1
        assert "it cannot be resumed" in err and "can be evaluated" in err and f"--init-from {run}" in err
    with pytest.raises(InputError, match=r"is from an older version.*cannot be resumed"):
        Trainer.resume(run)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    # What it says to do can be done.
    trained = load_policy(run)
    assert (trained.frames, trained.config.sampling.name, trained.config.policy.torso) == (23040, method, (32, 32))
    torch.testing.assert_close(trained.module.action_std()[0], torch.full((4,), 0.8))
    sizes = ["--init-from", str(run), "--torso", "32", "32", "--head", "16", "--num-envs", "3", "--num-steps", "16"]
    sizes += ["--no-bounded-mean", "--no-popart", "--no-direct-features"]  # as they were
    more = ["--num-minibatches", "1", "--total-frames", "48", "--eval-interval", "0", "--device", "cpu", "--quiet"]
    assert main(["train", *sizes, *more, "--run-dir", str(tmp_path / "new")]) == 0
    assert load_checkpoint(checkpoints(tmp_path / "new")[0])["frames"] == 48
    assert main(["train", *more, *sizes[2:], "--run-dir", str(run), "--overwrite"]) == 0  # it is the folder of a run
