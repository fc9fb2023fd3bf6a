"""Task sampling: each method by hand, properties of all of them, and the simulators that follow."""

from __future__ import annotations

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from helpers import assert_same, make_policy, make_rollout, tiny_config
from mtrl_vec.commands.cli import main
from mtrl_vec.config import TrainConfig
from mtrl_vec.config.sampling import (
    CurriculumConfig,
    DifficultyConfig,
    MetaConfig,
    ProgressConfig,
    SuccessConfig,
    make_sampling_config,
)
from mtrl_vec.envs import make_env
from mtrl_vec.errors import InputError
from mtrl_vec.learn.loss import LEARNING_KEYS
from mtrl_vec.learn.ppo import PPO
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import MT3
from mtrl_vec.train import Trainer
from mtrl_vec.train.meta_sampling import MetaController
from mtrl_vec.train.resolve import resolve
from mtrl_vec.train.sampling_methods import METHODS, loss_weights, make_task_sampling
from mtrl_vec.train.task_sampling import TaskStatistics
from runs import resume, train_until_interrupted, whole_state

NAMES = list(METHODS)


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
        fast_success=np.array(fast),
        slow_success=np.array(slow),
        critic_loss=np.array(loss),
        frames=frames,
        episodes=np.full(3, episodes),
    )


def test_the_least_probability_fits_any_number_of_tasks() -> None:
    """As it was with three tasks; with more, all of them together keep three tenths."""
    names = {"curriculum": "min_task_prob", "difficulty": "min_task_weight"}
    for method in ("curriculum", "difficulty", "progress", "meta"):
        for tasks, expected in (("MT3", 0.1), ("MT10", 0.03), ("MT50", 0.006)):
            config = resolve(TrainConfig.of(tasks=[tasks], sampling=method))
            assert getattr(config.sampling, names.get(method, "min_task_prob")) == pytest.approx(expected)


def test_uniform_leaves_everything_as_it_is() -> None:
    method = make_task_sampling(tiny_config(sampling="uniform"))
    method.update(seen(1, 0, 0))
    assert method.task_probs is None
    np.testing.assert_allclose(method.task_weights, 1 / 3)


def test_by_success_tasks_are_practised_as_far_as_they_fail() -> None:
    method = make_task_sampling(tiny_config(sampling=SuccessConfig(min_task_prob=0.1)))
    np.testing.assert_allclose(method.task_probs, 1 / 3)
    method.update(seen(1.0, 0.8, 0.4))  # they fail as 0, 1 and 3 do, in what the floors leave
    np.testing.assert_allclose(method.task_probs, [0.1, 0.1 + 0.7 / 4, 0.1 + 0.7 * 3 / 4])
    method.update(seen(1.0, math.nan, 0.0))  # nothing is known yet
    np.testing.assert_allclose(method.task_probs, [0.1, 0.45, 0.45])
    method.update(seen(1.0, 1.0, 1.0))
    np.testing.assert_allclose(method.task_probs, 1 / 3)
    np.testing.assert_allclose(method.task_weights, 1 / 3)
    default = make_task_sampling(tiny_config(tasks=("MT10",)))
    default.update(dataclasses.replace(seen(0, 0, 0), success=np.array([0.0] + [1.0] * 9)))
    np.testing.assert_allclose(default.task_probs, [0.64] + [0.04] * 9)


def test_a_curriculum_advances_by_success_and_keeps_a_floor_for_what_is_done() -> None:
    method = make_task_sampling(tiny_config(sampling=CurriculumConfig(curriculum=("push", "reach", "pick-place"))))
    np.testing.assert_allclose(method.task_probs, [0, 1, 0])
    method.update(seen(math.nan, math.nan, math.nan))
    method.update(seen(1.0, 0.89, 1.0))  # that others are good does not matter
    np.testing.assert_allclose(method.task_probs, [0, 1, 0])
    method.update(seen(1.0, 1.0, 1.0, episodes=3))  # luck
    np.testing.assert_allclose(method.task_probs, [0, 1, 0])
    method.update(seen(0.2, 0.9, 0.0))
    np.testing.assert_allclose(method.task_probs, [0.9, 0.1, 0])
    method.update(seen(0.9, 0.1, 0.0))
    np.testing.assert_allclose(method.task_probs, [0.1, 0.1, 0.8])
    method.update(seen(0.9, 0.9, 0.95))
    np.testing.assert_allclose(method.task_probs, 1 / 3)
    method.update(seen(0.0, 0.0, 0.0))
    np.testing.assert_allclose(method.task_probs, 1 / 3)


def test_a_curriculum_advances_by_frames_counted_from_the_beginning_of_each_task() -> None:
    method = make_task_sampling(tiny_config(sampling=CurriculumConfig(curriculum_frames=1000, min_task_prob=0.2)))
    stages = []
    for frames in (500, 999, 1000, 1900, 2000, 2500, 3000):
        method.update(seen(0, 0, 0, frames=frames))
        stages.append(method.task_probs.round(6).tolist())
    first, second, third, end = [1, 0, 0], [0.2, 0.8, 0], [0.2, 0.2, 0.6], [0.333333] * 3
    assert stages == [first, first, second, second, third, third, end]


def test_difficulty_by_success() -> None:
    method = make_task_sampling(tiny_config(sampling="difficulty"))
    method.update(seen(1.0, 0.75, 0.0))
    # 0, 1/4 and 1 in proportion: 0, 1/5, 4/5; then a tenth for each and 7/10 of that.
    np.testing.assert_allclose(method.task_weights, [0.1, 0.1 + 0.7 / 5, 0.1 + 0.7 * 4 / 5])
    assert method.task_probs is None
    method.update(seen(1.0, 1.0, 1.0))
    np.testing.assert_allclose(method.task_weights, 1 / 3)
    method.update(seen(math.nan, 0.0, 1.0))  # nothing known counts as nothing learned
    np.testing.assert_allclose(method.task_weights, [0.45, 0.45, 0.1])
    flat = make_task_sampling(tiny_config(sampling=DifficultyConfig(temperature=2.0, min_task_weight=0.0)))
    flat.update(seen(1.0, 0.75, 0.0))  # 0, 1/2 and 1
    np.testing.assert_allclose(flat.task_weights, [0, 1 / 3, 2 / 3])


def test_difficulty_by_the_decrease_of_the_loss() -> None:
    method = make_task_sampling(tiny_config(sampling=DifficultyConfig(difficulty_by="loss", min_task_weight=0.0)))
    method.update(seen(0, 0, 0, loss=(4.0, 2.0, 1.0)))
    np.testing.assert_allclose(method.task_weights, 1 / 3)
    method.update(seen(0, 0, 0, loss=(2.0, 2.0, 2.0)))  # ratios of 1/2, 1 and 2
    powers = [math.exp(0.5), math.exp(1), math.exp(2)]
    np.testing.assert_allclose(method.task_weights, [p / sum(powers) for p in powers])


def test_fixed_weights_times_those_of_the_method() -> None:
    difficulty = make_task_sampling(tiny_config(sampling=DifficultyConfig(min_task_weight=0.0)))
    fixed = (1.0, 3.0, 0.0)
    difficulty.update(seen(0.5, 0.5, 0.0))  # 1/4, 1/4, 1/2
    np.testing.assert_allclose(loss_weights(difficulty.task_weights, fixed), [0.25, 0.75, 0])
    np.testing.assert_allclose(loss_weights(difficulty.task_weights, None), [0.25, 0.25, 0.5])
    difficulty.update(seen(1.0, 1.0, 0.0))  # all for the task that is switched off
    np.testing.assert_allclose(loss_weights(difficulty.task_weights, fixed), [0.25, 0.75, 0])


def test_progress_is_the_difference_of_two_averages_up_or_down() -> None:
    method = make_task_sampling(tiny_config(sampling="progress"))
    np.testing.assert_allclose(method.task_probs, 1 / 3)
    method.update(seen(0.0, math.nan, 0.0))
    np.testing.assert_allclose(method.task_probs, 1 / 3)
    method.update(seen(1.0, 0.5, 0.0, fast=(0.3, 0.15, 0.0), slow=(0.1, 0.05, 0.0)))  # progress 0.2, 0.1, 0
    powers = np.array([math.e, math.exp(0.5), 1])  # in units of 0.2
    np.testing.assert_allclose(method.task_probs, 0.1 + 0.7 * powers / powers.sum())
    method.update(seen(0.0, 0.5, 0.0, fast=(0.5, 0.5, 0.0), slow=(0.9, 0.5, 0.0)))  # reach is forgotten
    powers = np.array([math.exp(2), 1, 1])
    np.testing.assert_allclose(method.task_probs, 0.1 + 0.7 * powers / powers.sum())
    method.update(seen(1.0, 1.0, 1.0, fast=(0.99, 1.0, 1.0), slow=(1.0, 1.0, 1.0)))  # an episode more or less
    np.testing.assert_allclose(method.task_probs, 1 / 3, atol=0.02)
    steep = make_task_sampling(tiny_config(sampling=ProgressConfig(temperature=1e-6)))
    steep.update(seen(1.0, 0.0, 0.0, fast=(0.4, 0.3, 0.0)))
    np.testing.assert_allclose(steep.task_probs, [0.8, 0.1, 0.1])
    flat = make_task_sampling(tiny_config(sampling=ProgressConfig(temperature=2.0, min_task_prob=0.0)))
    flat.update(seen(1.0, 0.0, 0.0, fast=(0.4, 0.0, 0.0)))
    np.testing.assert_allclose(flat.task_probs, np.array([math.e, 1, 1]) / (math.e + 2))


def test_the_meta_controllers_gradient_and_what_it_comes_to() -> None:
    torch.manual_seed(0)
    controller = MetaController(9, 3)
    assert [tuple(p.shape) for p in controller.parameters()] == [(64, 9), (64,), (3, 64), (3,)]
    assert torch.softmax(controller(torch.randn(9)), 0).tolist() == pytest.approx([1 / 3] * 3)
    # The expected policy gradient over the logits is pi_k (r_k - r_mean): by hand against what one update follows.
    method = make_task_sampling(tiny_config(sampling="meta"))
    gradients = []
    method.optimizer.step = lambda: gradients.append(method.controller.layers[2].bias.grad.clone())
    method.update(seen(1.0, 0.5, 0.0, fast=(0.3, 0.0, 0.4), slow=(0.1, 0.1, 0.4)))
    # Progress of 0.2, -0.1 and 0: rewards 1, 1/2, 0; mean 1/2; all probabilities 1/3, where the entropy has no slope.
    assert (-gradients[0]).tolist() == pytest.approx([1 / 6, 0, -1 / 6], abs=1e-6)
    method = make_task_sampling(tiny_config(sampling=MetaConfig(min_task_prob=0.0, meta_lr=0.02, temperature=2.0)))
    for _ in range(300):
        method.update(seen(0.0, 0.0, 0.5, fast=(0.0, 0.2, 0.4)))
    powers = np.exp([0, 0.5, 1])  # progress in units of 0.2, by the temperature
    np.testing.assert_allclose(method.task_probs, powers / powers.sum(), atol=1e-3)
    for _ in range(300):
        method.update(seen(1.0, 1.0, 1.0, fast=(1.0, 1.0, 1.0), slow=(1.0, 1.0, 1.0)))  # nothing moves any more
    np.testing.assert_allclose(method.task_probs, 1 / 3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_always_on_the_simplex_above_the_floor_deterministic_and_resumable(name) -> None:
    settings = {"curriculum_frames": 5} if name == "curriculum" else {}
    if name not in ("uniform", "random"):
        settings["min_task_weight" if name == "difficulty" else "min_task_prob"] = 0.07
    config = tiny_config(sampling=make_sampling_config(name, **settings))
    one, same, resumed = (make_task_sampling(config) for _ in range(3))
    rng = np.random.default_rng(0)
    history = []
    for i in range(40):
        loss, fast, slow = rng.random((3, 3))
        history.append(seen(*rng.choice([*loss, math.nan], 3), frames=i, loss=loss, fast=fast, slow=slow))
    for i, statistics in enumerate(history):
        one.update(statistics)
        same.update(statistics)
        if i == 20:
            resumed.load_state_dict(one.state_dict())
        if i > 20:
            resumed.update(statistics)
            assert_same(resumed.state_dict(), one.state_dict())
        assert_same(same.state_dict(), one.state_dict())
        for vector in (one.task_weights, *([] if one.task_probs is None else [one.task_probs])):
            assert vector.sum() == pytest.approx(1) and (vector >= 0).all()
            floor = 0.0 if name == "curriculum" else 0.07
            assert (vector >= floor - 1e-12).all()


def test_episodes_follow_the_probabilities_and_the_one_hot_follows_the_simulated_task() -> None:
    probs = np.array([0.2, 0.0, 0.8])
    sim = SimBatch(MT3, np.arange(60) % 3, seed=1, max_episode_steps=1)
    sim.set_task_probs(probs)
    counts = np.zeros(3)
    for _ in range(40):
        sim.reset()
        counts += np.bincount(sim.task_idx, minlength=3)
    assert counts[1] == 0 and chisquare(counts[[0, 2]], [480, 1920]).pvalue > 0.01
    env = make_env(num_workers=2, envs_per_worker=30, seed=1, max_episode_steps=3, random_phase=False)
    try:
        before = env.reset()["task_idx"].clone()
        env.set_task_probs(probs)
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
    one, other = (SimBatch(MT3, np.arange(6) % 3, seed=1) for _ in range(2))
    other.set_task_probs(np.ones(3) / 3)
    other.set_task_probs(None)
    for _ in range(3):
        np.testing.assert_array_equal(one.reset(), other.reset())


def test_a_task_of_zero_weight_has_exactly_no_gradient_and_the_others_are_weighted() -> None:
    torch.manual_seed(0)
    config = tiny_config(entropy_coeff=0.1)
    policy = make_policy(config)
    ppo = PPO(config, policy)
    torch.manual_seed(0)
    td = make_rollout(policy, 12, 16)
    ppo.add_advantages(td)
    batch = td.select(*LEARNING_KEYS).reshape(-1)

    def gradients(*weights: float) -> list[torch.Tensor]:
        ppo.set_task_weights(weights)
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
        {"sampling": CurriculumConfig(curriculum_frames=2 * 192)},
        {"sampling": DifficultyConfig(difficulty_by="loss"), "overlap": True},
        {"sampling": ProgressConfig()},
        {"sampling": MetaConfig()},
    ],
    ids=lambda settings: settings["sampling"].name,
)
def test_a_run_with_task_sampling_resumes_in_the_middle_to_the_last_bit(tmp_path, monkeypatch, settings) -> None:
    statistics = Trainer.task_statistics

    def with_success(self, metrics):  # which untrained policies do not have
        seen = statistics(self, metrics)
        return dataclasses.replace(seen, fast_success=np.array([0.1, 0.2, 0.3 * np.sin(seen.frames)]))

    monkeypatch.setattr(Trainer, "task_statistics", with_success)
    settings, name = {**settings, "eval_interval": 0}, settings["sampling"].name
    run = Trainer(tiny_config(run_dir=tmp_path / "whole", total_frames=6 * 192, max_episode_steps=20, **settings))
    run.train()
    train_until_interrupted(tmp_path / "run", 3, **settings)
    resume(tmp_path / "run")
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "whole"))
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    fractions = np.array([[float(row[f"train/{task}/frame_fraction"]) for task in run.config.tasks] for row in rows])
    weights = np.array([[float(row[f"train/{task}/weight"]) for task in run.config.tasks] for row in rows])
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(fractions.sum(1), 1, atol=1e-5)
    moving = weights if name == "difficulty" else fractions
    assert (np.ptp(moving, axis=0) > 0.01).all()
    if name == "curriculum":
        assert fractions[0].tolist() == [1, 0, 0]  # from the very first episode on
        assert fractions[-1, 2] > 0.2 and fractions[1, 2] == 0


def test_a_method_sees_what_is_logged(tmp_path) -> None:
    """And the norms and cosines of the tasks' gradients in the log are those of the learner."""
    settings = {"total_frames": 4 * 192, "max_episode_steps": 20, "log_gradients": True}
    run = Trainer(tiny_config(run_dir=tmp_path / "run", **settings))
    seen: list[TaskStatistics] = []
    grams: list[np.ndarray] = []

    def note(statistics: TaskStatistics) -> None:
        seen.append(statistics)
        grams.append(run.learner.gram.double().numpy().copy())

    run.task_sampling.update = note
    run.train()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, statistics, gram in zip(rows, seen, grams, strict=True):
        norms = np.sqrt(gram.diagonal())
        for column, values in {
            "success_rate": statistics.success,
            "learning_progress": statistics.learning_progress,
            "loss_critic": statistics.critic_loss,
            "grad_norm": norms,
        }.items():
            logged = [float(row[f"train/{task}/{column}"]) for task in run.config.tasks]
            np.testing.assert_allclose(values, logged, rtol=1e-4, err_msg=column)
        assert statistics.frames == int(row["frames"])
        # The cosine with the sum of the others, from the products of the pairs.
        for i, task in enumerate(run.config.tasks):
            others = [j for j in range(3) if j != i]
            cosine = gram[i, others].sum() / (norms[i] * np.sqrt(gram[np.ix_(others, others)].sum()))
            assert float(row[f"train/{task}/grad_cosine"]) == pytest.approx(cosine, abs=1e-3)
    assert len({tuple(gram.ravel()) for gram in grams}) == len(rows) == 4
    assert len({tuple(statistics.critic_loss) for statistics in seen}) == 4
    assert seen[-1].episodes.min() > 0 and not np.isnan(seen[-1].success).any()
    returns = [float(rows[-1][f"train/{task}/return"]) for task in run.config.tasks]
    assert not np.isnan(returns).any()


def test_gradients_are_logged_only_where_they_are_asked_for_or_combined(tmp_path) -> None:
    for name, settings in (
        ("plain", {}),
        ("logged", {"log_gradients": True}),
        ("pcgrad", {"gradient_method": "pcgrad"}),
    ):
        Trainer(tiny_config(run_dir=tmp_path / name, **settings)).train()
        with (tmp_path / name / "metrics.csv").open() as file:
            (row,) = csv.DictReader(file)
        columns = [float(row[f"train/{t}/{c}"]) for t in ("reach-v3", "push-v3") for c in ("grad_norm", "grad_cosine")]
        assert np.isnan(columns).all() if name == "plain" else np.isfinite(columns).all(), name


@pytest.mark.parametrize("probs", [[0.5, 0.5], [0.5, 0.6, -0.1], [1, 1, 1], [math.nan, 0.5, 0.5]])
def test_what_is_no_probability_distribution_is_refused(probs) -> None:
    env = make_env(num_workers=1, envs_per_worker=3)
    with pytest.raises(InputError, match=r"task_probs is .*: give 3 non-negative numbers that sum to 1"):
        env.set_task_probs(np.array(probs))
    assert env.is_closed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--curriculum-frames", "5"], "curriculum_frames is 5: it is only read with --task-sampling curriculum"),
        (
            ["--task-sampling", "random", "--temperature", "2"],
            "temperature is 2.0: it is only read with --task-sampling difficulty or progress or meta",
        ),
        (
            ["--task-sampling", "difficulty", "--min-task-prob", "0.2"],
            "min_task_prob is 0.2: it is only read with --task-sampling success or curriculum or progress or meta",
        ),
        (
            ["--task-sampling", "meta", "--min-task-weight", "0.2"],
            "min_task_weight is 0.2: it is only read with --task-sampling difficulty",
        ),
        (
            ["--task-sampling", "curriculum", "--task-weights", "0", "1", "1"],
            "task_weights is (0.0, 1.0, 1.0): it must be p",
        ),
        (["--task-sampling", "best"], "invalid choice 'best' for argument '--task-sampling'"),
        (["--task-sampling", "progress", "--min-task-prob", "0.4"], "min_task_prob is 0.4: it must be at most 1/3"),
        (["--task-sampling", "meta", "--min-task-prob", "0.4"], "min_task_prob is 0.4: it must be at most 1/3"),
        (["--task-sampling", "curriculum", "--min-task-prob", "0.4"], "min_task_prob is 0.4: it must be at most 1/3"),
        (
            ["--task-sampling", "difficulty", "--min-task-weight", "0.4"],
            "min_task_weight is 0.4: it must be at most 1/3",
        ),
        (
            ["--task-sampling", "progress", "--min-task-prob", "-0.1"],
            "min_task_prob is -0.1: it must be between 0 and 1",
        ),
        (
            ["--task-sampling", "difficulty", "--min-task-weight", "-0.1"],
            "min_task_weight is -0.1: it must be between 0 and 1",
        ),
        (
            ["--tasks", "reach", "push", "--task-sampling", "curriculum", "--curriculum", "reach", "pick-place"],
            "curriculum is reach-v3, pick-place-v3: it must be an order of reach-v3, push-v3",
        ),
        (["--task-sampling", "curriculum", "--curriculum", "reach", "fly"], "unknown task 'fly'"),
        (
            ["--task-sampling", "curriculum", "--curriculum", "reach", "push"],
            "curriculum is reach-v3, push-v3: it must be an order of reach-v3, push-v3, p",
        ),
        (
            ["--task-sampling", "curriculum", "--curriculum-frames", "0"],
            "curriculum_frames is 0: it must be positive",
        ),
        (["--task-sampling", "progress", "--temperature", "0"], "temperature is 0.0: it must be positive"),
        (["--task-sampling", "meta", "--meta-lr", "0"], "meta_lr is 0.0: it must be positive"),
        (["--task-weights", "1", "2"], "task_weights is (1.0, 2.0): it must be 3 numbers"),
        (["--task-weights", "1", "2", "-1"], "task_weights is (1.0, 2.0, -1.0): it must not be negative"),
        (
            ["--task-weights", "0", "0", "0"],
            "task_weights is (0.0, 0.0, 0.0): it must not be negative, and not all zero",
        ),
    ],
)
def test_bad_task_sampling_is_one_line_before_anything_starts(
    arguments, message, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
