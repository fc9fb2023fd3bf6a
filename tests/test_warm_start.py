"""Starting a run from a trained policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import SMALL, assert_same, tiny_config
from mtrl_vec import Trainer, load_policy
from mtrl_vec.commands.cli import main
from mtrl_vec.policy.checkpoint import load_checkpoint, save_checkpoint
from runs import metrics, resume, train, train_until_interrupted, whole_state

EVALUATED = {"eval_interval": 192, "eval_episodes": 2, "max_episode_steps": 20}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run on push and reach that has learned a little, with statistics of its own."""
    folder = tmp_path_factory.mktemp("source") / "run"
    settings = {"tasks": ("push", "reach"), "total_frames": 3 * 192, "direct_features": True}
    Trainer(tiny_config(run_dir=folder, **settings, **EVALUATED)).train()
    return folder


def test_a_policy_file_carries_all_that_a_warm_start_needs(source) -> None:
    content = load_checkpoint(source / "best.pt")
    assert content["reward_scale"]["var"].shape == (2,) and content["reward_scale"]["count"].sum() == content["frames"]
    assert content["policy"]["torso.module.features.observation_norm.count"].sum() == content["frames"]
    assert content["config"]["environment"]["tasks"] == ["push-v3", "reach-v3"]


def test_known_tasks_act_and_judge_as_before_and_new_ones_get_fresh_heads(source, tmp_path) -> None:
    """The other order of tasks, and one that the policy does not know."""
    tasks = ("reach", "pick-place", "push")
    settings = {"tasks": tasks, "seed": 5, "direct_features": True}
    warm = Trainer(tiny_config(run_dir=tmp_path / "warm", init_from=source, **settings))
    cold = Trainer(tiny_config(run_dir=tmp_path / "cold", **settings))
    old, content = load_policy(source).module, load_checkpoint(source / "best.pt")
    observation = torch.randn(40, 39)
    for task, old_index, new_index in (("reach-v3", 1, 0), ("push-v3", 0, 2)):
        ours = [torch.full((40,), new_index), torch.eye(3)[new_index].expand(40, 3)]
        theirs = [torch.full((40,), old_index), torch.eye(2)[old_index].expand(40, 2)]
        for method in ("distribution", "value"):
            with torch.no_grad():
                got = getattr(warm.policy, method)(observation, ours[1], ours[0])
                expected = getattr(old, method)(observation, theirs[1], theirs[0])
            torch.testing.assert_close(got, expected, msg=f"{task} {method}")
        for name in ("mean", "var", "count"):
            state = warm.learner.reward_scale.state_dict()
            assert state[name][new_index] == content["reward_scale"][name][old_index]
    for heads in ("actor_heads.module.0.module.heads.weight1", "critic_heads.module.heads.weight2"):
        fresh, kept = warm.policy.state_dict()[heads], cold.policy.state_dict()[heads]
        assert torch.equal(fresh[1], kept[1]) and not torch.equal(fresh[0], kept[0])
    norm = warm.policy.torso.module.features.own_norm
    assert norm.count.flatten().gt(0).tolist() == [True, False, True] and norm.mean[1].eq(0).all()
    assert warm.learner.reward_scale.var[1] == 1 and warm.learner.reward_scale.count[1] == 0
    # What is known need not be looked for again, until a success rate says otherwise.
    for trainer in (cold, warm):
        trainer.statistics.frames[:] = 10**6
    cold.explore(cold.exploration())
    assert cold.policy.action_std().eq(1.0).all() and cold.acting.noise.correlation.eq(0.85).all()
    warm.explore(warm.exploration())
    torch.testing.assert_close(warm.policy.action_std()[[0, 2]], old.action_std()[[1, 0]])
    torch.testing.assert_close(warm.acting.noise.correlation, torch.tensor([0.0, 0.85, 0.0]))
    cold.statistics.load_state_dict(warm.statistics.state_dict())  # as a resumed run does
    assert cold.statistics.untrained.tolist() == [0.0, 1.0, 0.0]
    warm.train()
    events = (tmp_path / "warm" / "events.log").read_text()
    assert "heads of reach-v3, push-v3; fresh heads for pick-place-v3" in events


def test_a_policy_without_a_critic_starts_a_run_with_a_fresh_one(source, tmp_path) -> None:
    content = load_checkpoint(source / "best.pt")
    content["policy"] = {
        name: t.half() for name, t in content["policy"].items() if not name.startswith("critic_heads.")
    }
    save_checkpoint(tmp_path / "acting.pt", content)
    settings = {"tasks": ("push", "reach"), "seed": 5, "direct_features": True}
    warm = Trainer(tiny_config(run_dir=tmp_path / "warm", init_from=tmp_path / "acting.pt", **settings))
    cold = Trainer(tiny_config(run_dir=tmp_path / "cold", **settings))
    for name, tensor in warm.policy.state_dict().items():
        if name.startswith("critic_heads."):
            assert torch.equal(tensor, cold.policy.state_dict()[name]), name
        elif name.endswith("weight"):
            torch.testing.assert_close(tensor, content["policy"][name].float()), name
    warm.train()
    assert "it has no critic, so that one is fresh" in (tmp_path / "warm" / "events.log").read_text()


def test_an_interrupted_one_ends_as_one_that_went_through(source, tmp_path) -> None:
    """Interrupted before any episode has ended, when all that is known of a task is that the first policy knew it."""
    settings = {"tasks": ("reach", "pick-place", "push"), "init_from": source, "max_episode_steps": 50}
    settings["direct_features"] = True
    train(tmp_path / "whole", **settings)
    train_until_interrupted(tmp_path / "run", 1, **settings)
    resume(tmp_path / "run")
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "whole"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_heads_get_the_width_of_the_policy_also_when_the_run_is_started_again(source, tmp_path) -> None:
    """As torchrun does after a fault: with the same flags, and the checkpoint of the run."""
    settings = {"tasks": ("MT10",), "direct_features": True, "init_from": source, "num_envs": 20, "head": None}
    config = tiny_config(run_dir=tmp_path / "warm", total_frames=320, **settings)
    warm = Trainer(config)
    assert warm.policy.actor_heads[0].module.heads.bias1.shape == (10, 16)
    warm.train()
    checkpoint = load_checkpoint(tmp_path / "warm" / "checkpoint-320.pt")
    again = Trainer(config.replace(total_frames=640), checkpoint=checkpoint)
    assert again.config.policy.head == 16
    again.train()


def test_a_whole_checkpoint_serves_too_and_a_resumed_run_does_not_start_again(source, tmp_path) -> None:
    (checkpoint,) = source.glob("checkpoint-576.pt")
    settings = {"tasks": ("push",), "total_frames": 192, "direct_features": True}
    run = Trainer(tiny_config(run_dir=tmp_path / "run", init_from=checkpoint, **settings))
    run.train()
    checkpoint_of_run = load_checkpoint(tmp_path / "run" / "checkpoint-192.pt")
    resumed = Trainer.resume(tmp_path / "run", total_frames=384)
    for name, tensor in resumed.policy.state_dict().items():
        assert torch.equal(tensor, checkpoint_of_run["policy"][name]), name
    resumed.lock.release()
    assert "started from" in (tmp_path / "run" / "events.log").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "its head is 16, this run's is 32: make them equal"),
        (["--head", "16", "--no-relative-features"], "its relative_features is True, this run's is False"),
        (["--head", "16", "--no-direct-features"], "its direct_features is True, this run's is False"),
        (["--head", "16", "--no-popart"], "its popart is True, this run's is False"),
        (["--head", "16", "--no-normalize-reward"], "its normalize_reward is True, this run's is False"),
        (["--head", "16", "--success-bonus", "0"], "its success_bonus is 5.0, this run's is 0.0"),
        (
            ["--head", "16", "--tasks", "push", "hammer"],
            "of its tasks and this run's, only one list has tasks with a second object",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_starts(source, tmp_path, capsys, flags, message) -> None:
    sizes = [*SMALL, "--head", "32", "--direct-features", *flags, "--run-dir", str(tmp_path / "run")]
    assert main(["train", *sizes, "--init-from", str(source)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith(f"error: init_from is {source / 'best.pt'}: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_files_that_hold_no_policy_to_start_from(source, tmp_path, capsys) -> None:
    content = load_checkpoint(source / "best.pt")
    content.pop("reward_scale")
    save_checkpoint(tmp_path / "old.pt", content)
    for path, message in (
        (tmp_path / "old.pt", "it holds no policy with the scale of its rewards"),
        (tmp_path / "missing.pt", "no checkpoint at"),
    ):
        flags = [*SMALL, "--direct-features", "--run-dir", str(tmp_path / "run"), "--init-from", str(path)]
        assert main(["train", *flags]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_a_run_whose_best_policy_has_no_reward_scale_starts_others_from_its_latest_state(source, tmp_path) -> None:
    """As those of version 1."""
    old = tmp_path / "old"
    old.mkdir()
    content = load_checkpoint(source / "best.pt")
    content.pop("reward_scale")
    save_checkpoint(old / "best.pt", content)
    save_checkpoint(old / "checkpoint-576.pt", load_checkpoint(source / "checkpoint-576.pt"))
    settings = {"tasks": ("push", "reach"), "popart": True, "direct_features": True}
    run = Trainer(tiny_config(run_dir=tmp_path / "run", init_from=old, **settings))
    run.lock.release()
    kept = load_checkpoint(source / "checkpoint-576.pt")["learner"]["reward_scale"]
    assert torch.equal(run.learner.reward_scale.var, kept["var"])
