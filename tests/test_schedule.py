"""What is practised: each schedule by hand, properties of all of them, and the simulators that follow."""

from __future__ import annotations

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import tiny_config
from scipy.stats import chisquare
from test_resume import assert_same, resume, train_until_interrupted, whole_state

from mtrl_vec.cli import main
from mtrl_vec.envs import make_env
from mtrl_vec.errors import InputError
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.ppo import PPO
from mtrl_vec.schedule import SCHEDULES, MetaController, TaskStatistics, make_schedule
from mtrl_vec.sim import SawyerSim
from mtrl_vec.tasks import TASKS
from mtrl_vec.trainer import Trainer

NAMES = list(SCHEDULES)


def seen(
    *success: float,
    frames: int = 0,
    loss: tuple[float, ...] = (1.0, 1.0, 1.0),
    episodes: int = 50,
    fast: tuple[float, ...] = (0.0, 0.0, 0.0),
    slow: tuple[float, ...] = (0.0, 0.0, 0.0),
) -> TaskStatistics:
    return TaskStatistics(
        success=np.array(success),
        episode_return=np.zeros(3),
        fast_success=np.array(fast),
        slow_success=np.array(slow),
        loss=np.array(loss),
        gradient_norm=np.ones(3),
        gradient_cosine=np.eye(3),
        frames=frames,
        episodes=np.full(3, float(episodes)),
    )


def test_uniform_leaves_everything_as_it_is() -> None:
    schedule = make_schedule(tiny_config())
    schedule.update(seen(1, 0, 0))
    assert schedule.shares is None
    np.testing.assert_allclose(schedule.weights, 1 / 3)


def test_a_curriculum_goes_on_by_success_and_keeps_a_floor_for_what_is_done() -> None:
    schedule = make_schedule(tiny_config(schedule="curriculum", curriculum=("push", "reach", "pick-place")))
    np.testing.assert_allclose(schedule.shares, [0, 1, 0])
    schedule.update(seen(math.nan, math.nan, math.nan))
    schedule.update(seen(1.0, 0.89, 1.0))  # that others are good does not matter
    np.testing.assert_allclose(schedule.shares, [0, 1, 0])
    schedule.update(seen(1.0, 1.0, 1.0, episodes=3))  # luck
    np.testing.assert_allclose(schedule.shares, [0, 1, 0])
    schedule.update(seen(0.2, 0.9, 0.0))
    np.testing.assert_allclose(schedule.shares, [0.9, 0.1, 0])
    schedule.update(seen(0.9, 0.1, 0.0))
    np.testing.assert_allclose(schedule.shares, [0.1, 0.1, 0.8])
    schedule.update(seen(0.9, 0.9, 0.95))
    np.testing.assert_allclose(schedule.shares, 1 / 3)
    schedule.update(seen(0.0, 0.0, 0.0))
    np.testing.assert_allclose(schedule.shares, 1 / 3)


def test_a_curriculum_goes_on_by_frames_counted_from_the_beginning_of_each_task() -> None:
    schedule = make_schedule(tiny_config(schedule="curriculum", curriculum_frames=1000, share_floor=0.2))
    stages = []
    for frames in (500, 999, 1000, 1900, 2000, 2500, 3000):
        schedule.update(seen(0, 0, 0, frames=frames))
        stages.append(schedule.shares.round(6).tolist())
    first, second, third, end = [1, 0, 0], [0.2, 0.8, 0], [0.2, 0.2, 0.6], [0.333333] * 3
    assert stages == [first, first, second, second, third, third, end]


def test_difficulty_by_success() -> None:
    schedule = make_schedule(tiny_config(schedule="difficulty"))
    schedule.update(seen(1.0, 0.75, 0.0))
    # 0, 1/4 and 1 in proportion: 0, 1/5, 4/5; then a tenth for each and 7/10 of that.
    np.testing.assert_allclose(schedule.weights, [0.1, 0.1 + 0.7 / 5, 0.1 + 0.7 * 4 / 5])
    assert schedule.shares is None
    schedule.update(seen(1.0, 1.0, 1.0))
    np.testing.assert_allclose(schedule.weights, 1 / 3)
    schedule.update(seen(math.nan, 0.0, 1.0))  # nothing known counts as nothing learned
    np.testing.assert_allclose(schedule.weights, [0.45, 0.45, 0.1])
    flat = make_schedule(tiny_config(schedule="difficulty", temperature=2.0, share_floor=0.0))
    flat.update(seen(1.0, 0.75, 0.0))  # 0, 1/2 and 1
    np.testing.assert_allclose(flat.weights, [0, 1 / 3, 2 / 3])


def test_difficulty_by_the_decrease_of_the_loss() -> None:
    schedule = make_schedule(tiny_config(schedule="difficulty", difficulty_by="loss", share_floor=0.0))
    schedule.update(seen(0, 0, 0, loss=(4.0, 2.0, 1.0)))
    np.testing.assert_allclose(schedule.weights, 1 / 3)
    schedule.update(seen(0, 0, 0, loss=(2.0, 2.0, 2.0)))  # ratios of 1/2, 1 and 2
    powers = [math.exp(0.5), math.exp(1), math.exp(2)]
    np.testing.assert_allclose(schedule.weights, [p / sum(powers) for p in powers])


def test_fixed_weights_times_those_of_the_schedule() -> None:
    schedule = make_schedule(tiny_config(schedule="difficulty", share_floor=0.0, task_weights=(1.0, 3.0, 0.0)))
    schedule.update(seen(0.5, 0.5, 0.0))  # 1/4, 1/4, 1/2
    np.testing.assert_allclose(schedule.loss_weights(), [0.25, 0.75, 0])
    schedule.update(seen(1.0, 1.0, 0.0))  # all for the task that is switched off
    np.testing.assert_allclose(schedule.loss_weights(), [0.25, 0.75, 0])


def test_progress_is_the_difference_of_two_averages_up_or_down() -> None:
    schedule = make_schedule(tiny_config(schedule="progress"))
    np.testing.assert_allclose(schedule.shares, 1 / 3)
    schedule.update(seen(0.0, math.nan, 0.0))
    np.testing.assert_allclose(schedule.shares, 1 / 3)
    schedule.update(seen(1.0, 0.5, 0.0, fast=(0.3, 0.15, 0.0), slow=(0.1, 0.05, 0.0)))  # progress 0.2, 0.1, 0
    powers = np.array([math.e, math.exp(0.5), 1])  # in units of 0.2
    np.testing.assert_allclose(schedule.shares, 0.1 + 0.7 * powers / powers.sum())
    schedule.update(seen(0.0, 0.5, 0.0, fast=(0.5, 0.5, 0.0), slow=(0.9, 0.5, 0.0)))  # reach is forgotten
    powers = np.array([math.exp(2), 1, 1])
    np.testing.assert_allclose(schedule.shares, 0.1 + 0.7 * powers / powers.sum())
    schedule.update(seen(1.0, 1.0, 1.0, fast=(0.99, 1.0, 1.0), slow=(1.0, 1.0, 1.0)))  # an episode more or less
    np.testing.assert_allclose(schedule.shares, 1 / 3, atol=0.02)
    steep = make_schedule(tiny_config(schedule="progress", temperature=1e-6))
    steep.update(seen(1.0, 0.0, 0.0, fast=(0.4, 0.3, 0.0)))
    np.testing.assert_allclose(steep.shares, [0.8, 0.1, 0.1])
    flat = make_schedule(tiny_config(schedule="progress", temperature=2.0, share_floor=0.0))
    flat.update(seen(1.0, 0.0, 0.0, fast=(0.4, 0.0, 0.0)))
    np.testing.assert_allclose(flat.shares, np.array([math.e, 1, 1]) / (math.e + 2))


def test_the_meta_controllers_gradient_and_what_it_comes_to() -> None:
    torch.manual_seed(0)
    controller = MetaController(9, 3)
    assert [tuple(p.shape) for p in controller.parameters()] == [(64, 9), (64,), (3, 64), (3,)]
    assert torch.softmax(controller(torch.randn(9)), 0).tolist() == pytest.approx([1 / 3] * 3)
    # The expected policy gradient over the logits is pi_k (r_k - r_mean): by hand against what one update follows.
    schedule = make_schedule(tiny_config(schedule="meta"))
    gradients = []
    schedule.optimizer.step = lambda: gradients.append(schedule.controller.layers[2].bias.grad.clone())
    schedule.update(seen(1.0, 0.5, 0.0, fast=(0.3, 0.0, 0.4), slow=(0.1, 0.1, 0.4)))
    # Progress of 0.2, -0.1 and 0: rewards 1, 1/2, 0; mean 1/2; shares of a third, where the entropy has no slope.
    assert (-gradients[0]).tolist() == pytest.approx([1 / 6, 0, -1 / 6], abs=1e-6)
    schedule = make_schedule(tiny_config(schedule="meta", share_floor=0.0, meta_lr=0.02, temperature=2.0))
    for _ in range(300):
        schedule.update(seen(0.0, 0.0, 0.5, fast=(0.0, 0.2, 0.4)))
    powers = np.exp([0, 0.5, 1])  # progress in units of 0.2, by the temperature
    np.testing.assert_allclose(schedule.shares, powers / powers.sum(), atol=1e-3)
    for _ in range(300):
        schedule.update(seen(1.0, 1.0, 1.0, fast=(1.0, 1.0, 1.0), slow=(1.0, 1.0, 1.0)))  # nothing moves any more
    np.testing.assert_allclose(schedule.shares, 1 / 3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_always_on_the_simplex_above_the_floor_deterministic_and_resumable(name) -> None:
    if name == "curriculum":
        config = tiny_config(schedule=name, share_floor=0.07, curriculum_frames=5)
    else:
        config = tiny_config(schedule=name, **{} if name in ("uniform", "random") else {"share_floor": 0.07})
    one, same, resumed = (make_schedule(config) for _ in range(3))
    rng = np.random.default_rng(0)
    history = []
    for i in range(40):
        loss, fast, slow = rng.random((3, 3))
        history.append(seen(*rng.choice([*loss, math.nan], 3), frames=i, loss=loss, fast=fast, slow=slow))
    for i, statistics in enumerate(history):
        one.update(statistics)
        same.update(statistics)
        if i == 20:
            resumed.restore(one.state())
        if i > 20:
            resumed.update(statistics)
            assert_same(resumed.state(), one.state())
        assert_same(same.state(), one.state())
        for vector in (one.weights, *([] if one.shares is None else [one.shares])):
            assert vector.sum() == pytest.approx(1) and (vector >= 0).all()
            floor = 0.0 if name == "curriculum" else 0.07
            assert (vector >= floor - 1e-12).all()


def test_episodes_follow_the_shares_and_the_one_hot_follows_the_simulated_task() -> None:
    shares = np.array([0.2, 0.0, 0.8])
    sim = SawyerSim(TASKS, np.arange(60) % 3, seed=1, max_episode_steps=1)
    sim.set_shares(shares)
    counts = np.zeros(3)
    for _ in range(40):
        sim.reset()
        counts += np.bincount(sim.task_idx, minlength=3)
    assert counts[1] == 0 and chisquare(counts[[0, 2]], [480, 1920]).pvalue > 0.01
    env = make_env(num_workers=2, envs_per_worker=30, seed=1, max_episode_steps=3, random_phase=False)
    try:
        before = env.reset()["task_idx"].clone()
        env.set_shares(shares)
        td, started = env.reset(), []
        td["action"] = torch.zeros(2, 30, 4)
        for step in range(30):
            out, td = env.step_and_maybe_reset(td)
            td["action"] = torch.zeros(2, 30, 4)
            assert torch.equal(td["task_one_hot"].argmax(-1), td["task_idx"])
            if step % 3 == 2:  # all episodes end at once
                assert out["next", "done"].all()
                started.append(td["task_idx"].flatten())
                # A task shows in the simulation: goals of push lie on the table, those of the others never do.
                assert ((td["observation"][..., 38] < 0.03) == (td["task_idx"] == 1)).all()
        assert (before == 1).any()
        counts = torch.bincount(torch.cat(started), minlength=3).numpy()
        assert counts[1] == 0 and chisquare(counts[[0, 2]], [120, 480]).pvalue > 0.01
    finally:
        env.close()


def test_uniform_draws_nothing_so_that_slots_keep_their_tasks_and_streams() -> None:
    one, other = (SawyerSim(TASKS, np.arange(6) % 3, seed=1) for _ in range(2))
    other.set_shares(np.ones(3) / 3)
    other.set_shares(None)
    for _ in range(3):
        np.testing.assert_array_equal(one.reset(), other.reset())


def rollout_of(policy: SharedPolicy):
    from test_ppo import make_rollout

    torch.manual_seed(0)
    return make_rollout(policy, 12, 16)


def test_a_task_of_zero_weight_has_exactly_no_gradient_and_the_others_are_weighted() -> None:
    torch.manual_seed(0)
    config = tiny_config(entropy_coeff=0.1)
    policy = SharedPolicy(config)
    ppo = PPO(config, policy)
    td = rollout_of(policy)
    ppo.add_advantages(td)
    batch = td.select(
        "observation", "task_one_hot", "task_idx", "action", "action_log_prob", "advantage", "value_target"
    )
    batch = batch.reshape(-1)

    def gradients(*weights: float) -> list[torch.Tensor]:
        ppo.weigh(weights)
        total, _ = ppo.minibatch_loss(batch)
        return torch.autograd.grad(total, ppo.params)

    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    for name, gradient in zip(names, gradients(1.0, 0.0, 2.0), strict=True):
        if "heads" in name or "log_std" in name:  # stacked by task
            assert (gradient[1] == 0).all() and (gradient[0] != 0).any() and (gradient[2] != 0).any(), name
    # Weights are in proportion, 1 on average; and gradients are linear in them.
    for one, two, three, mixed in zip(
        gradients(1, 0, 0), gradients(0, 1, 0), gradients(0, 0, 1), gradients(2, 3, 5), strict=True
    ):
        torch.testing.assert_close(mixed, 0.2 * one + 0.3 * two + 0.5 * three, rtol=1e-4, atol=1e-6)
    for equal, plain in zip(gradients(1, 1, 1), gradients(0.2, 0.2, 0.2), strict=True):
        assert torch.equal(equal, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "curriculum", "curriculum_frames": 2 * 192},
        {"schedule": "difficulty", "difficulty_by": "loss", "overlap": True},
        {"schedule": "progress"},
        {"schedule": "meta"},
    ],
    ids=lambda settings: settings["schedule"],
)
def test_a_run_with_a_schedule_resumes_in_the_middle_to_the_last_bit(tmp_path, monkeypatch, settings) -> None:
    statistics = Trainer._statistics

    def with_success(self, metrics):  # which untrained policies do not have
        seen = statistics(self, metrics)
        return dataclasses.replace(seen, fast_success=np.array([0.1, 0.2, 0.3 * np.sin(seen.frames)]))

    monkeypatch.setattr(Trainer, "_statistics", with_success)
    settings, name = {**settings, "eval_interval": 0}, settings["schedule"]
    np.random.seed(0)
    run = Trainer(tiny_config(run_dir=tmp_path / "whole", total_frames=6 * 192, max_episode_steps=20, **settings))
    run.train()
    train_until_interrupted(tmp_path / "run", 3, **settings)
    resume(tmp_path / "run")
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "whole"))
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    shares = np.array([[float(row[f"train/{task}/share"]) for task in run.config.tasks] for row in rows])
    weights = np.array([[float(row[f"train/{task}/weight"]) for task in run.config.tasks] for row in rows])
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    moving = weights if name == "difficulty" else shares
    assert (np.ptp(moving, axis=0) > 0.01).all()
    if name == "curriculum":
        assert shares[0].tolist() == [1, 0, 0]  # from the very first episode on
        assert shares[-1, 2] > 0.2 and shares[1, 2] == 0


def test_a_schedule_sees_what_is_logged(tmp_path) -> None:
    run = Trainer(tiny_config(run_dir=tmp_path / "run", total_frames=4 * 192, max_episode_steps=20))
    seen: list[TaskStatistics] = []
    run.schedule.update = seen.append
    run.train()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, statistics in zip(rows, seen, strict=True):
        for column, values in {
            "success_rate": statistics.success,
            "return": statistics.episode_return,
            "progress": statistics.progress,
            "loss_critic": statistics.loss,
            "grad_norm": statistics.gradient_norm,
        }.items():
            logged = [float(row[f"train/{task}/{column}"]) for task in run.config.tasks]
            np.testing.assert_allclose(values, logged, rtol=1e-4, err_msg=column)
        assert statistics.frames == int(row["frames"])
        # The cosine with the sum of the others, from the norms and the cosines of the pairs.
        norms, products = (
            statistics.gradient_norm,
            statistics.gradient_cosine * np.outer(*[statistics.gradient_norm] * 2),
        )
        for i, task in enumerate(run.config.tasks):
            others = [j for j in range(3) if j != i]
            cosine = products[i, others].sum() / (norms[i] * np.sqrt(products[np.ix_(others, others)].sum()))
            assert float(row[f"train/{task}/grad_cosine"]) == pytest.approx(cosine, abs=1e-3)
    assert len({tuple(statistics.gradient_norm) for statistics in seen}) == len(rows) == 4
    assert seen[-1].episodes.min() > 0 and not np.isnan(seen[-1].episode_return).any()


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.5, 0.6, -0.1], [1, 1, 1], [math.nan, 0.5, 0.5]])
def test_shares_that_are_none_are_refused(shares) -> None:
    env = make_env(num_workers=1, envs_per_worker=3)
    with pytest.raises(InputError, match="give 3 numbers that are not negative, and 1 in sum"):
        env.set_shares(np.array(shares))
    assert env.is_closed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--curriculum-frames", "5"], "curriculum_frames is 5: it must stay as it is without --schedule curriculum"),
        (
            ["--schedule", "random", "--temperature", "2"],
            "temperature is 2.0: it must stay as it is without --schedule d",
        ),
        (
            ["--schedule", "curriculum", "--task-weights", "0", "1", "1"],
            "task_weights is (0.0, 1.0, 1.0): it must be p",
        ),
        (["--schedule", "best"], "invalid choice 'best' for argument '--schedule'"),
        (["--share-floor", "0.4"], "share_floor is 0.4: it must be at most 1/3"),
        (["--share-floor", "-0.1"], "share_floor is -0.1: it must be between 0 and 1"),
        (
            ["--tasks", "reach", "push", "--curriculum", "reach", "pick-place"],
            "curriculum is reach-v3, pick-place-v3: it",
        ),
        (["--curriculum", "reach", "fly"], "unknown task 'fly'"),
        (
            ["--curriculum", "reach", "push"],
            "curriculum is reach-v3, push-v3: it must be an order of reach-v3, push-v3, p",
        ),
        (["--curriculum-frames", "0"], "curriculum_frames is 0: it must be positive"),
        (["--temperature", "0"], "temperature is 0.0: it must be positive"),
        (["--task-weights", "1", "2"], "task_weights is (1.0, 2.0): it must be 3 numbers"),
        (["--task-weights", "1", "2", "-1"], "task_weights is (1.0, 2.0, -1.0): it must not be negative"),
        (
            ["--task-weights", "0", "0", "0"],
            "task_weights is (0.0, 0.0, 0.0): it must not be negative, and not all zero",
        ),
    ],
)
def test_bad_schedules_are_one_line_before_anything_starts(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
