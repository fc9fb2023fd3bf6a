"""Checkpoints of older versions of the file format: what their policies did, they still do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import assert_same, make_policy, tiny_config
from mtrl_vec.commands.cli import main
from mtrl_vec.config.sampling import CurriculumConfig, DifficultyConfig, MetaConfig, ProgressConfig
from mtrl_vec.errors import InputError
from mtrl_vec.policy import load_policy
from mtrl_vec.policy.checkpoint import load_checkpoint
from mtrl_vec.policy.migrations import STATISTICS
from mtrl_vec.policy.normalization import ObservationNorm
from mtrl_vec.train import Trainer

FLAT = {
    "tasks": ["push-v3", "reach-v3"],
    "total_frames": 1000,
    "seed": 5,
    "device": "auto",
    "compile": "auto",
    "cuda_graphs": True,
    "precision": "auto",
    "overlap": False,
    "run_dir": "runs/old",
    "overwrite": False,
    "quiet": True,
    "wandb": False,
    "checkpoint_seconds": 30.0,
    "max_restarts": 3,
    "max_skipped_updates": 36,
    "num_envs": 12,
    "num_workers": 2,
    "max_episode_steps": 50,
    "goals_seed": None,
    "random_phase": True,
    "torso": [32, 32],
    "head": 16,
    "init_std": 1.0,
    "final_std": 0.3,
    "learn_std": True,
    "num_steps": 16,
    "num_epochs": 2,
    "num_minibatches": 2,
    "lr": 0.001,
    "target_kl": None,
    "final_kl_fraction": 0.2,
    "eval_interval": 0,
    "eval_episodes": 60,
    "schedule": "uniform",
    "share_floor": 0.1,
    "temperature": 1.0,
    "curriculum": None,
    "curriculum_success": 0.9,
    "curriculum_frames": None,
    "difficulty_by": "success",
    "meta_lr": 0.01,
    "balance": "pcgrad",
    "task_weights": [1.0, 3.0],
    "success_bonus": 5.0,
    "gamma": 0.9,
    "gae_lambda": 0.97,
    "clip_epsilon": 0.2,
    "entropy_coeff": 0.0,
    "critic_coeff": 0.5,
    "max_grad_norm": 1.0,
    "relative_inputs": False,
    "normalize_observation": True,
    "normalize_reward": True,
    "popart": False,
    "per_task_advantage": True,
}
"""All settings as version 1 wrote them."""

ACTOR = "actor_heads.module.0.module."


def _moments(norm: ObservationNorm) -> dict[str, torch.Tensor]:
    """Without the dimension of the groups, as versions before 6 had them."""
    return {"mean": norm.mean, "var": norm.var, "count": norm.count[0]}


def save_version_1(path: Path, **changes: object) -> dict[str, torch.Tensor]:
    """A checkpoint as version 1 wrote it, also with much that no longer exists. Returns the policy's state."""
    torch.manual_seed(0)
    settings = {"relative_features": False, "popart": False, "direct_features": False}
    policy = make_policy(tiny_config(tasks=("push", "reach"), **settings))
    norm = policy.torso.module.features.observation_norm
    norm.update(torch.randn(50, 39))
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = policy.state_dict()
    # Limited when it was read: some of what had been learned is above.
    state[f"{ACTOR}log_std"] = torch.tensor([[0.5, -2.0, -1.0, 0.0], [-3.0, 1.0, -1.3, -1.4]])
    state[f"{ACTOR}std_limit"] = torch.tensor(0.3)
    content = {
        "format": "mtrl_vec checkpoint 1",
        "config": FLAT | changes,
        "iteration": 3,
        "frames": 576,
        "policy": state
        | {f"{STATISTICS}observation_norm.{name}": moment[0] for name, moment in _moments(norm).items()},
        "ppo": {"lr": torch.tensor(0.001), "reward_scale": {"mean": torch.ones(2)}},
        "episodes": {"success": [0.5, 0.5]},
    }
    torch.save(content, path)
    return state


def test_a_policy_of_version_1_acts_as_it_did(tmp_path) -> None:
    state = save_version_1(tmp_path / "old.pt")
    policy = load_policy(tmp_path / "old.pt")
    assert policy.tasks == ("push-v3", "reach-v3") and policy.frames == 576
    expected = torch.minimum(state[f"{ACTOR}log_std"].exp(), torch.tensor(0.3))
    assert (expected == 0.3).sum() == 4 and (expected < 0.3).sum() == 4
    torch.testing.assert_close(policy.module.action_std(), expected)
    # Everything else is as it was.
    loaded = policy.module.state_dict()
    assert loaded.keys() == state.keys()
    assert_same(*({k: v for k, v in one.items() if k != f"{ACTOR}log_std"} for one in (loaded, state)))
    torch.manual_seed(0)
    observation = np.random.default_rng(0).normal(size=39)
    draws = policy(np.tile(observation, (20_000, 1)), "push", sample=True)
    mean = policy(observation, "push")
    inside = np.abs(mean) + 2 * expected[0].numpy() < 1  # hardly anything is clipped there
    assert inside.any()
    np.testing.assert_allclose(draws.std(0)[inside], expected[0].numpy()[inside], rtol=0.05)


def test_settings_of_version_1_have_their_names_of_today(tmp_path) -> None:
    save_version_1(tmp_path / "old.pt")
    config = load_policy(tmp_path / "old.pt").config
    assert config.seed == 5 and config.tasks == ("push-v3", "reach-v3")
    assert config.policy.relative_features is False and config.policy.torso == (32, 32)
    assert config.policy.bounded_mean is False  # as it always was
    assert (config.learner.noise_correlation, config.learner.hold_std) == (0.0, False)
    assert config.learner.gradient_method == "pcgrad" and config.learner.task_weights == (1.0, 3.0)
    assert (config.learner.gamma, config.learner.target_kl, config.environment.max_episode_steps) == (0.9, None, 50)
    assert (config.runtime.compile, config.runtime.precision) == ("off", "fp32")
    assert config.runtime.run_dir == Path("runs/old") and config.sampling.name == "uniform"
    kept = load_checkpoint(tmp_path / "old.pt")["reward_scale"]  # in which its critic tells values
    assert_same(kept, {"mean": torch.ones(2)})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"schedule": "curriculum", "curriculum": ["reach-v3", "push-v3"], "curriculum_frames": 9},
            CurriculumConfig(("reach-v3", "push-v3"), 0.9, 9, 0.2),
        ),
        ({"schedule": "difficulty", "difficulty_by": "loss", "temperature": 2.0}, DifficultyConfig("loss", 2.0, 0.2)),
        ({"schedule": "progress", "temperature": 0.5}, ProgressConfig(0.5, 0.2)),
        ({"schedule": "meta", "meta_lr": 0.1}, MetaConfig(1.0, 0.2, 0.1)),
    ],
    ids=lambda value: value.get("schedule") if isinstance(value, dict) else "",
)
def test_schedules_of_version_1_are_methods_of_task_sampling(tmp_path, changes, expected) -> None:
    save_version_1(tmp_path / "old.pt", share_floor=0.2, **changes)
    assert load_policy(tmp_path / "old.pt").config.sampling == expected


def test_a_run_of_version_1_cannot_be_resumed(tmp_path) -> None:
    save_version_1(tmp_path / "checkpoint-576.pt")
    with pytest.raises(InputError, match="is from an older version of mtrl_vec") as raised:
        Trainer.resume(tmp_path, total_frames=5000)
    assert "\n" not in str(raised.value)


def test_a_version_that_is_not_known_is_one_clear_line(tmp_path, capsys) -> None:
    path = tmp_path / "new.pt"
    save_version_1(path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format": "mtrl_vec checkpoint", "version": 7}, path)
    with pytest.raises(InputError, match="it has version 7 of the format, and this package reads up to 6"):
        load_policy(path)
    assert main(["eval", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path} does not fit this version of mtrl_vec") and err.count("\n") == 1
    assert "version 7" in err


@pytest.mark.parametrize("mark", [{}, {"version": None}, {"version": "2"}, {"format": "mtrl_vec checkpoint 2"}])
def test_what_has_no_version_is_no_checkpoint(tmp_path, mark) -> None:
    torch.save({"format": "mtrl_vec checkpoint", "config": {}, **mark}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match="not a checkpoint of this package"):
        load_checkpoint(tmp_path / "odd.pt")
