"""Training runs of seconds, with real workers."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector

from helpers import assert_same, make_policy, tiny_config
from mtrl_vec.commands.parsing import parse_train
from mtrl_vec.config import PRESETS, TrainConfig
from mtrl_vec.envs import SimulatorPool, make_env
from mtrl_vec.errors import InputError
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.policy import load_policy
from mtrl_vec.policy.checkpoint import load_checkpoint
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import MT3
from mtrl_vec.timing import Timer
from mtrl_vec.train import Trainer
from mtrl_vec.train.progress import Progress
from mtrl_vec.train.recovery import Recovery
from mtrl_vec.train.resolve import resolve
from mtrl_vec.train.rollouts import Rollouts
from mtrl_vec.train.statistics import EpisodeStatistics


def train(run_dir, **changes) -> Trainer:
    trainer = Trainer(tiny_config(run_dir=run_dir, **changes))
    trainer.train()
    return trainer


def read_metrics(run_dir) -> list[dict[str, float]]:
    with (run_dir / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def comparable(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/")) and not math.isnan(v)} for row in rows
    ]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (("reach",), (360, 100, 2_000_000, 250_000, 60, 0.02, 0.5, 150_000, 128)),
        (("MT3",), (360, 100, 2_000_000, 250_000, 60, 0.02, 0.5, 150_000, 128)),
        (("MT3", "door-open"), (360, 150, 2_000_000, 250_000, 30, 0.02, 0.2, 0, 64)),
        (("MT10",), (720, 150, 3_600_000, 450_000, 30, 0.04, 0.2, 0, 64)),
        (("MT50",), (1440, 150, 25_000_000, 3_125_000, 30, 0.04, 0.2, 0, 64)),
    ],
)
def test_defaults_follow_the_number_of_tasks_and_give_way_to_settings(tasks, expected) -> None:
    names = ("num_envs", "max_episode_steps", "total_frames", "eval_interval", "eval_episodes")
    names += ("target_kl", "final_kl_fraction", "exploration_delay")
    for config in (TrainConfig.of(tasks=tasks), TrainConfig().replace(tasks=tasks), parse_train(["--tasks", *tasks])):
        assert tuple(getattr(config, name) for name in names) == expected[:-1]
        written = resolve(config).to_dict()
        written = written["environment"] | written["learner"] | written["runtime"] | written["policy"]
        assert tuple(written[name] for name in (*names, "head")) == expected
        assert make_policy(config).actor_heads[0].module.heads.bias1.shape == (config.num_tasks, expected[-1])
    given = {"num_envs": 90, "max_episode_steps": 7, "total_frames": 99, "eval_interval": 0, "eval_episodes": 3}
    given |= {"target_kl": 0.01, "final_kl_fraction": 0.0, "exploration_delay": 0}
    config = resolve(TrainConfig.of(tasks=tasks, head=48, **given))
    assert {name: getattr(config, name) for name in given} == given
    assert config.policy.head == 48


def test_each_task_explores_by_its_own_success(tmp_path) -> None:
    settings = {"noise_correlation": 0.6, "exploration_delay": 100, "sampling": "uniform"}
    config = tiny_config(run_dir=tmp_path, num_workers=1, **settings)
    trainer = Trainer(config)
    trainer.statistics.frames[:] = [1000, 1000, 150]
    for task, successes in enumerate(([True] * 8, [True, False, False, False], [])):
        trainer.statistics._recent[task].extend((success, 1.0, 5) for success in successes)
    with trainer.opened():
        trainer.iterate()
    torch.testing.assert_close(trainer.acting.noise.correlation, torch.tensor([0.0, 0.3, 0.3]))
    std = trainer.policy.action_std()
    assert (std[1:] >= 0.5).all()
    assert trainer.statistics.frames.tolist() == [1064, 1064, 214]  # 64 of 192 each


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="cpu"),
        pytest.param({"device": "cuda", "compile": "off", "eval_interval": 192}, id="cuda", marks=needs_cuda),
        pytest.param({"device": "cuda", "compile": "on", "eval_interval": 192}, id="cuda, compiled", marks=needs_cuda),
    ],
)
def test_one_iteration_changes_every_trainable_tensor(tmp_path, changes) -> None:
    config = tiny_config(**changes)
    torch.manual_seed(config.seed)
    before = dict(make_policy(config).named_parameters())
    trainer = train(tmp_path / "run", **changes)
    assert trainer.frames == 12 * 16
    after = dict(trainer.policy.named_parameters())
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        assert not torch.equal(parameter.cpu(), before[name]), name
        assert torch.isfinite(parameter).all(), name
    assert load_policy(tmp_path / "run").module.action_std().device.type == "cpu"


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (4, 3), (6, 5), (8, 7), (12, 11), (16, 15)])
def test_default_workers_use_the_cores(cores, expected, monkeypatch) -> None:
    monkeypatch.setattr("mtrl_vec.ranks.available_cores", lambda: cores)
    assert resolve(TrainConfig()).runtime.num_workers == expected
    assert resolve(TrainConfig.of(num_workers=4)).runtime.num_workers == 4
    assert resolve(TrainConfig.of(num_envs=6, num_steps=32)).runtime.num_workers == min(expected, 6)


def test_two_halves_have_twice_as_many_workers(monkeypatch) -> None:
    config = TrainConfig.of(double_buffer=True, device="cpu")
    for cores, expected in {16: 30, 3: 4, 2: 2}.items():
        monkeypatch.setattr("mtrl_vec.ranks.available_cores", lambda cores=cores: cores)
        assert resolve(config).runtime.num_workers == expected
    monkeypatch.setattr("mtrl_vec.ranks.available_cores", lambda: 16)
    assert resolve(config.replace(num_workers=6)).runtime.num_workers == 6
    with pytest.raises(InputError, match="num_workers is 1: double_buffer needs two simulator processes"):
        resolve(config.replace(num_workers=1))
    with pytest.raises(InputError, match="num_envs is 1: double_buffer needs two simulator processes"):
        resolve(config.replace(num_envs=1, num_steps=32))
    monkeypatch.setattr("mtrl_vec.train.resolve.resolve_device", lambda _: torch.device("cuda"))
    assert resolve(config).runtime.num_workers == 15


@pytest.mark.parametrize("overlap", [False, True])
def test_halves_in_turn_learn_the_same(tmp_path, overlap, monkeypatch) -> None:
    """To the last bit: with more than three environments of a task, products do not depend on how many there are."""
    collect, calls = SimulatorPool.collect, []
    monkeypatch.setattr(
        SimulatorPool,
        "collect",
        lambda pool, policies, steps: (calls.append(policies), collect(pool, policies, steps))[1],
    )
    settings = {"num_envs": 96, "num_steps": 4, "total_frames": 4 * 384, "num_workers": 2, "overlap": overlap}
    one, other = (train(tmp_path / f"{double}", double_buffer=double, **settings) for double in (False, True))
    assert [len(policies) for policies in calls] == [1] * 4 + [2] * 4
    assert_same(other.policy.state_dict(), one.policy.state_dict())


def pool_rollouts(env, acting) -> Iterator[TensorDictBase]:
    """As training collects them."""
    env.reset()
    while True:
        yield env.collect(acting, 16)


def rollouts_by_halves(env, acting) -> Iterator[TensorDictBase]:
    """As with --double-buffer."""
    env.reset()
    while True:
        yield env.collect(acting.in_turn(env.envs_per_group(2)), 16)


def collector_rollouts(env, acting) -> Iterator[TensorDictBase]:
    """As anyone can, with TorchRL's collector; without idle rows, of which it checks that they do nothing."""
    acting.rows = env.rows
    live = torch.arange(12) if env.rows is None else env.rows
    options = {"trust_policy": True, "use_buffers": False, "auto_register_policy_transforms": False}
    for rollout in Collector(env, acting, frames_per_batch=12 * 16, track_traj_ids=False, **options):
        everything = rollout.flatten(0, 1)
        idle = everything[len(live) :]
        assert not idle["action"].any() and not idle["next", "done"].any() and not idle["observation"].any()
        yield everything[live]


@pytest.mark.parametrize("rollouts", [pool_rollouts, rollouts_by_halves, collector_rollouts])
@pytest.mark.parametrize("num_envs", [12, 11], ids=["even", "with an idle row"])
def test_collected_data_equal_a_lone_simulator_fed_the_same_actions(num_envs, rollouts) -> None:
    """Workers and shared memory against `SimBatch`: root, next, and the log-probabilities."""
    torch.manual_seed(0)
    policy = make_policy(tiny_config())
    options = {"seed": 3, "max_episode_steps": 20, "random_phase": True}
    env = make_env(num_workers=2, num_envs=num_envs, **options)
    sim = SimBatch(MT3, np.arange(num_envs) % 3, **options)
    observation, truncations = sim.reset(), 0
    try:
        for _, td in zip(range(3), rollouts(env, ActingPolicy(policy, tiny_config(), Timer())), strict=False):
            assert td.shape == (num_envs, 16)
            torch.testing.assert_close(
                policy.actor.get_dist(td).log_prob(td["action"]), td["action_log_prob"], rtol=1e-5, atol=1e-5
            )
            for t in range(16):
                root, nxt = td[:, t], td[:, t]["next"]
                np.testing.assert_array_equal(root["observation"], observation.astype(np.float32))
                np.testing.assert_array_equal(root["task_idx"], sim.task_idx)
                np.testing.assert_array_equal(root["task_one_hot"], np.eye(3)[sim.task_idx])
                step = sim.step(root["action"].numpy())
                np.testing.assert_array_equal(nxt["observation"], step.observation.astype(np.float32))
                np.testing.assert_array_equal(nxt["reward"].squeeze(-1), step.reward.astype(np.float32))
                for name, expected in {
                    "truncated": step.truncated,
                    "done": step.truncated,
                    "success": step.success,
                    "unstable": step.unstable,
                    "terminated": np.zeros(num_envs, dtype=bool),
                }.items():
                    np.testing.assert_array_equal(nxt[name].squeeze(-1), expected, err_msg=name)
                observation = sim.reset(step.truncated)
                truncations += int(step.truncated.sum())
    finally:
        env.close(raise_if_closed=False)  # a collector has done so
    assert truncations > 12


def test_with_overlap_a_rollout_is_collected_by_the_policy_before_the_last_update(tmp_path) -> None:
    """Told by the log-probabilities of its actions, under every policy that there was."""
    trainer = Trainer(tiny_config(run_dir=tmp_path / "run", total_frames=5 * 192, overlap=True))
    policies, rollouts, original = [copy.deepcopy(trainer.policy)], [], trainer.learner.learn
    _, behaviour = trainer.learner.advantages._policies  # what a GPU would take for the policy that acted

    def learn_and_note(rollout, progress):
        loc, scale = behaviour.distribution(rollout["observation"], rollout["task_one_hot"], rollout["task_idx"])
        log_prob = torch.distributions.Normal(loc, scale).log_prob(rollout["action"]).sum(-1)
        torch.testing.assert_close(log_prob, rollout["action_log_prob"], rtol=1e-4, atol=1e-4)
        metrics = original(rollout, progress)
        rollouts.append(rollout.clone())
        policies.append(copy.deepcopy(trainer.policy))
        return metrics

    trainer.learner.learn = learn_and_note
    trainer.train()
    assert trainer.frames == 5 * 192 and len(rollouts) == 5
    for iteration, td in enumerate(rollouts):
        with torch.no_grad():
            matching = [
                policy
                for policy, candidate in enumerate(policies)
                if torch.allclose(candidate.actor.get_dist(td).log_prob(td["action"]), td["action_log_prob"], atol=1e-5)
            ]
        assert matching == [max(0, iteration - 1)]
        loc, _ = policies[matching[0]].distribution(td["observation"], td["task_one_hot"], td["task_idx"])
        assert ((td["action"] - loc).abs().amax(-1) > 1e-3).all()  # none is the mean, whatever the learner is at
    # And it continues from where it was: no step is lost or simulated twice.
    for before, after in itertools.pairwise(rollouts):
        not_done = ~before["next", "done"][:, -1, 0]
        assert not_done.any()
        torch.testing.assert_close(
            before["next", "observation"][not_done, -1], after["observation"][not_done, 0], rtol=0, atol=0
        )


def test_same_seed_same_numbers_twice_and_with_one_or_two_workers(tmp_path) -> None:
    settings = {"total_frames": 3 * 12 * 16, "max_episode_steps": 20}
    runs = {
        "first": {"num_workers": 2, "seed": 1},
        "again": {"num_workers": 2, "seed": 1},
        "one worker": {"num_workers": 1, "seed": 1},
        "other seed": {"num_workers": 2, "seed": 2},
    }
    policies = {n: train(tmp_path / n, **settings, **r).policy.state_dict() for n, r in runs.items()}
    rows = {n: comparable(read_metrics(tmp_path / n)) for n in runs}
    assert len(rows["first"]) == 3
    assert rows["first"] == rows["again"] == rows["one worker"] != rows["other seed"]
    for name, tensor in policies["first"].items():
        assert torch.equal(tensor, policies["again"][name]), name
        assert torch.equal(tensor, policies["one worker"][name]), name


def test_a_run_leaves_config_metrics_events_and_a_checkpoint(tmp_path) -> None:
    trainer = train(tmp_path / "run", tasks=("push",), total_frames=300, max_episode_steps=10, random_phase=False)
    folder = tmp_path / "run"
    assert TrainConfig.from_dict(json.loads((folder / "config.json").read_text())) == trainer.config
    rows = read_metrics(folder)
    assert [row["frames"] for row in rows] == [192, 384]
    assert rows[-1]["train/push-v3/return"] > 0
    assert rows[-1]["train/push-v3/success_rate"] == 0
    assert any((folder / "tensorboard").iterdir())
    policy = load_policy(folder)
    assert (policy.config, policy.tasks, policy.frames) == (trainer.config, ("push-v3",), 384)
    for name, tensor in trainer.policy.state_dict().items():
        assert torch.equal(tensor, policy.module.state_dict()[name])
    content = load_checkpoint(folder)
    assert content["frames"] == 384 and torch.__version__.startswith(content["versions"]["torch"])
    assert torch.equal(content["learner"]["reward_scale"]["var"], trainer.learner.reward_scale.var)


def test_evaluations_come_at_their_interval_and_at_the_end(tmp_path) -> None:
    settings = {"total_frames": 5 * 192, "eval_interval": 384, "eval_episodes": 2, "max_episode_steps": 20}
    train(tmp_path / "run", **settings, num_workers=2)
    rows = read_metrics(tmp_path / "run")
    assert [row["frames"] for row in rows if not math.isnan(row["eval/mean_success_rate"])] == [384, 768, 960]
    train(tmp_path / "without", **settings | {"eval_interval": 0}, num_workers=2)
    assert not (tmp_path / "without" / "best.pt").exists()
    # Looking does not touch: the run is the same without.
    for seen, unseen in zip(rows, read_metrics(tmp_path / "without"), strict=True):
        assert {k: v for k, v in seen.items() if k.startswith("train/") and not math.isnan(v)} == {
            k: v for k, v in unseen.items() if k.startswith("train/") and not math.isnan(v)
        }


def test_the_best_policy_is_kept_and_of_equals_the_later(tmp_path, monkeypatch) -> None:
    successes = iter([[0, 5, 1], [10, 5, 3], [3, 10, 5], [10, 0, 0]])
    counts = lambda *_: torch.tensor([next(successes), [10, 10, 10]])  # noqa: E731
    monkeypatch.setattr("mtrl_vec.train.evaluation.simulated_successes", counts)
    trainer = Trainer(tiny_config(run_dir=tmp_path / "run", total_frames=4 * 192, eval_interval=192))
    learn, policies = trainer.learner.learn, []

    def learn_and_note(*args, **kwargs):
        metrics = learn(*args, **kwargs)
        policies.append(copy.deepcopy(trainer.policy.state_dict()))
        return metrics

    trainer.learner.learn = learn_and_note
    trainer.train()
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["frames"] == 3 * 192
    assert best["evaluation"]["eval/push-v3/success_rate"] == 1.0
    assert best["evaluation"]["eval/mean_success_rate"] == pytest.approx(0.6)
    # A run's folder stands for its best policy; the latest is a file away.
    for name, tensor in load_policy(tmp_path / "run").module.state_dict().items():
        assert torch.equal(tensor, policies[2][name]), name
    assert load_checkpoint(tmp_path / "run" / "checkpoint-768.pt")["progress"]["iteration"] == 4


def test_the_tutorial_preset_trains(tmp_path) -> None:
    small = {"num_envs": 12, "num_steps": 16, "num_minibatches": 2, "total_frames": 192, "quiet": True}
    small["eval_interval"] = 0
    config = PRESETS["tutorial"].replace(**small, run_dir=tmp_path / "run", device="cpu")
    assert (config.policy.torso, config.policy.head) == ((512, 512), 128)
    assert (config.learner.gae_lambda, config.learner.max_grad_norm) == (0.95, 0.5)
    assert PRESETS["tutorial"].minibatch_size == 512
    trainer = Trainer(config)
    trainer.train()
    assert torch.equal(trainer.policy.action_std(), torch.ones(3, 4))
    assert torch.equal(trainer.policy.torso.module.features.observation_norm.mean, torch.zeros(1, 39))


def rollout(reward, success, done, task_idx) -> TensorDict:
    column = lambda rows, dtype: torch.tensor(rows, dtype=dtype)[..., None]  # noqa: E731
    shape = (len(reward), len(reward[0]))
    done = column(done, torch.bool)
    nxt = {"reward": column(reward, torch.float32), "success": column(success, torch.bool), "done": done}
    nxt["unstable"] = torch.zeros_like(done)
    index = torch.tensor(task_idx)[:, None].expand(shape)
    return TensorDict({"task_idx": index, "next": TensorDict(nxt, shape)}, shape)


def test_episode_statistics_by_hand() -> None:
    """An episode runs over two rollouts; one that did not start at its first step does not count."""
    first = rollout([[1, 2], [5, 5]], [[1, 0], [0, 0]], [[0, 0], [0, 1]], [0, 1])
    second = rollout([[3, 4], [6, 6]], [[0, 0], [0, 1]], [[1, 0], [0, 1]], [0, 1])
    whole, phased = (EpisodeStatistics(["a", "b"], 2, whole=w) for w in (True, False))
    for statistics in (whole, phased):
        statistics.update(first)
        statistics.update(second)
    assert whole.summary() == {
        "train/a/success_rate": 1.0,
        "train/a/return": 6.0,
        "train/a/episode_length": 3.0,
        "train/a/frame_fraction": 0.5,
        "train/a/learning_progress": pytest.approx(0.3 - 0.1),  # nothing has ended in the first rollout
        "train/b/success_rate": 0.5,
        "train/b/return": 11.0,
        "train/b/episode_length": 2.0,
        "train/b/frame_fraction": 0.5,
        "train/b/learning_progress": pytest.approx(0.3 * 0.5 - 0.1 * 0.5),
    }
    assert phased.summary()["train/b/return"] == 12.0
    assert math.isnan(phased.summary()["train/a/return"])


def test_unstable_episodes_are_counted_and_left_out() -> None:
    td = rollout([[1, 1]], [[0, 1]], [[0, 1]], [0])
    td["next", "unstable"][0, 1] = True
    statistics = EpisodeStatistics(["a"], 1, whole=True)
    statistics.update(td)
    assert statistics.unstable_episodes == 1
    assert math.isnan(statistics.summary()["train/a/return"])


def test_rollouts_are_pinned_where_the_policy_is_on_a_gpu(monkeypatch) -> None:
    registered: list[int] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda pointer, size, flags: registered.append(pointer) or 0,
        cudaHostUnregister=lambda pointer: registered.remove(pointer) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    config = tiny_config(num_workers=1)
    acting = ActingPolicy(make_policy(config), config, Timer())
    monkeypatch.setattr(acting, "_act_on_gpu", lambda noise, observation, one_hot: torch.zeros(len(observation), 4))
    for device in ("cpu", "cuda"):
        acting.device = torch.device(device)
        rollouts = Rollouts(config, acting, Recovery(0, Progress(frames_per_batch=192, num_iterations=1)), Timer())
        try:
            rollout = rollouts.collect(None)
            places = {t.data_ptr() for t in rollout.values(include_nested=True, leaves_only=True)}
            assert len(places) > 10 and (places <= set(registered) if device == "cuda" else not registered)
        finally:
            rollouts.close()
    del rollouts, rollout
    assert not registered
