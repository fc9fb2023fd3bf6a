"""Advantages and the update against hand arithmetic and plain loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import one_hot

from helpers import make_policy, make_rollout, tiny_config
from mtrl_vec.errors import Diverged
from mtrl_vec.learn.advantages import normalize_advantage
from mtrl_vec.learn.learning_rate import adapt_lr, annealed
from mtrl_vec.learn.loss import LEARNING_KEYS
from mtrl_vec.learn.minibatches import Minibatches
from mtrl_vec.learn.ppo import PPO
from mtrl_vec.ranks import Ranks


def test_gae_bootstraps_a_truncation_and_not_a_termination() -> None:
    """Three steps each, gamma 0.5, lambda 0.5, worked out by hand; advantages before their normalisation."""
    ppo = PPO(tiny_config(gamma=0.5, gae_lambda=0.5), make_policy(tiny_config()))
    column = lambda *rows: torch.tensor(rows)[..., None]  # noqa: E731
    false = torch.zeros(3, 3, 1, dtype=torch.bool)
    done, terminated = false.clone(), false.clone()
    done[0, 1], done[1, 1], terminated[1, 1] = True, True, True  # truncated, terminated, neither
    td = TensorDict(
        {
            "state_value": column([1.0, 2, 3], [1.0, 2, 3], [1.0, 2, 3]),
            "next": {
                # The true last observation of env 0 is worth 8, not the 3 of the observation after its reset.
                "state_value": column([2.0, 8, 4], [2.0, 8, 4], [2.0, 3, 4]),
                "reward": column([1.0, 1, 1], [1.0, 1, 1], [1.0, 1, 1]),
                "done": done,
                "terminated": terminated,
            },
        },
        (3, 3),
    )
    ppo.advantages.gae(td)
    # deltas: 1 + 0.5 * 2 - 1 = 1;  1 + 0.5 * 8 - 2 = 3 | 1 - 2 = -1 | 1 + 0.5 * 3 - 2 = 0.5;  1 + 0.5 * 4 - 3 = 0
    expected = column([1 + 0.25 * 3, 3.0, 0.0], [1 + 0.25 * -1, -1.0, 0.0], [1 + 0.25 * 0.5, 0.5, 0.0])
    torch.testing.assert_close(td["advantage"], expected)
    torch.testing.assert_close(td["value_target"], expected + td["state_value"])


def test_advantages_of_a_rollout_equal_a_plain_loop() -> None:
    """The whole path: success bonus, critic on root and next, reward scale, GAE, normalisation per task."""
    torch.manual_seed(0)
    config = tiny_config(num_envs=6, gamma=0.9, gae_lambda=0.8, success_bonus=2.5)
    policy = make_policy(config)
    ppo = PPO(config, policy)
    td = make_rollout(policy, 6, 16)
    td["next", "reward"] *= torch.tensor([1.0, 10, 100]).repeat(2)[:, None, None]
    td["next", "done"][:, 7] = td["next", "truncated"][:, 7] = True
    # Meta-World never terminates, but others' environments may: no value beyond an ending.
    td["next", "done"][4, 3] = td["next", "terminated"][4, 3] = True
    reward = td["next", "reward"].clone()
    ppo.add_advantages(td)
    assert torch.equal(td["next", "reward"], reward)

    with torch.no_grad():
        task = td["task_one_hot"], td["task_idx"]
        value, next_value = (policy.value(one["observation"], *task) for one in (td, td["next"]))
    scale = torch.rsqrt(ppo.reward_scale.var + 1e-8)
    raw = torch.zeros(6, 16)
    for env in range(6):
        running = 0.0
        for t in reversed(range(16)):
            terminated = (env, t) == (4, 3)
            if t == 7 or terminated:
                running = 0.0
            bonus = 2.5 if td["next", "success"][env, t, 0] else 0.0
            r = float((reward[env, t, 0] + bonus) * scale[env % 3])
            delta = r + 0.9 * float(next_value[env, t]) * (not terminated) - float(value[env, t])
            raw[env, t] = running = delta + 0.9 * 0.8 * running
    torch.testing.assert_close(td["value_target"].squeeze(-1), raw + value.squeeze(-1), rtol=1e-4, atol=1e-5)
    for k in range(3):
        rows = raw[k::3]
        expected = (rows - rows.mean()) / rows.std(correction=0)
        torch.testing.assert_close(td["advantage"].squeeze(-1)[k::3], expected, rtol=1e-3, atol=1e-4)


def test_normalisation_over_everything_and_with_an_empty_group() -> None:
    advantage = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    one = normalize_advantage(advantage, torch.ones(4, 1))
    torch.testing.assert_close(one, torch.tensor([[-3.0], [-1], [1], [3]]) / math.sqrt(5))
    two = normalize_advantage(advantage, one_hot(torch.tensor([0, 0, 2, 2]), 3).float())
    torch.testing.assert_close(two, torch.tensor([[-1.0], [1], [-1], [1]]))


def test_the_loss_is_ppos() -> None:
    """Clipped surrogate (Schulman et al. 2017, eq. 7) and squared critic error, written out."""
    torch.manual_seed(0)
    config = tiny_config(num_envs=6, clip_epsilon=0.1, critic_coeff=0.5, init_std=0.5, popart=False)
    policy = make_policy(config)
    ppo = PPO(config, policy)
    td = make_rollout(policy, 6, 16)
    ppo.add_advantages(td)
    batch = td.reshape(-1)
    batch["action_log_prob"] += torch.randn(96) * 0.3  # as if another policy had acted
    total, metrics = ppo.minibatch_loss(batch)

    loc, scale = policy.distribution(batch["observation"], batch["task_one_hot"], batch["task_idx"])
    log_prob = torch.distributions.Normal(loc, scale).log_prob(batch["action"]).sum(-1)
    ratio = (log_prob - batch["action_log_prob"]).exp()
    advantage = batch["advantage"].squeeze(-1)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage).mean()
    critic = (
        (policy.value(batch["observation"], batch["task_one_hot"], batch["task_idx"]) - batch["value_target"]) ** 2
    ).mean()
    torch.testing.assert_close(total, -surrogate + 0.5 * critic)
    torch.testing.assert_close(metrics["clip_fraction"], ((ratio < 0.9) | (ratio > 1.1)).float().mean())


def test_approx_kl_is_the_divergence_from_the_policy_that_acted() -> None:
    torch.manual_seed(0)
    config = tiny_config(num_envs=60, num_steps=200, init_std=0.5)
    policy = make_policy(config)
    ppo = PPO(config, policy)
    batch = make_rollout(policy, 60, 200).reshape(-1)
    batch["advantage"] = batch["value_target"] = torch.zeros(12000, 1)
    old = torch.distributions.Normal(batch["loc"], batch["scale"])
    for scale in (0.03, 0.3):  # a small and a large change of the policy
        with torch.no_grad():
            torch.nn.init.normal_(policy.actor_heads[0].module.heads.bias2, std=scale)
        loc, std = policy.distribution(batch["observation"], batch["task_one_hot"], batch["task_idx"])
        expected = torch.distributions.kl_divergence(old, torch.distributions.Normal(loc, std)).sum(-1).mean()
        _, metrics = ppo.minibatch_loss(batch)
        assert float(metrics["approx_kl"]) == pytest.approx(float(expected.detach()), rel=0.1)


def test_an_entropy_bonus_raises_the_std() -> None:
    torch.manual_seed(0)
    config = tiny_config(entropy_coeff=1.0, target_kl=None, lr=1e-2)
    policy = make_policy(config)
    policy.limit_std(10.0)
    before = policy.action_std()
    ppo = PPO(config, policy)
    td = make_rollout(policy, 12, 16)
    ppo.add_advantages(td)
    td["advantage"].zero_()
    ppo.update(td)
    assert (policy.action_std() > before + 0.01).all()


def test_an_update_makes_good_actions_likelier() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    policy = make_policy(config)
    ppo = PPO(config, policy)
    td = make_rollout(policy, 12, 16)
    ppo.add_advantages(td)
    td["advantage"] = torch.where(td["action"][..., :1] > 0, 1.0, -1.0)
    before = td["loc"][..., 0].mean()
    ppo.update(td)
    with torch.no_grad():
        after = policy.actor(td)["loc"][..., 0].mean()
    assert after > before + 0.001


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.02, 1.0), (0.08, 1 / 1.5), (0.0, 1.5), (0.0288, 1 / 1.2), (-0.001, 1.5), (math.nan, 1.0)]
)
def test_learning_rate_follows_the_kl(kl: float, factor: float) -> None:
    ppo = PPO(tiny_config(lr=1e-3), make_policy(tiny_config()))
    adapt_lr(ppo.lr, torch.tensor(kl), 0.02)
    assert float(ppo.lr) == pytest.approx(1e-3 * factor, rel=1e-4)
    assert ppo.optimizer.param_groups[0]["lr"] is ppo.lr


def test_learning_rate_stays_in_bounds_and_its_target_is_annealed() -> None:
    ppo = PPO(tiny_config(target_kl=0.02, final_kl_fraction=0.15), make_policy(tiny_config()))
    data = make_rollout(ppo.policy, 12, 16)
    for progress, target in ((0.0, 0.02), (0.45, 0.0115), (0.9, 0.003), (1.0, 0.003)):
        ppo.lr.fill_(1e-3)
        ppo.prepare_next(data, torch.tensor(1.44 * target), progress)
        assert float(ppo.lr) == pytest.approx(1e-3 / 1.2)
    for _ in range(30):
        adapt_lr(ppo.lr, torch.tensor(10.0), 0.02)
    assert float(ppo.lr) == pytest.approx(1e-5)
    assert [annealed(0.02, 0.003, p) for p in (0.0, 0.45, 0.9, 1.0)] == pytest.approx([0.02, 0.0115, 0.003, 0.003])
    assert [annealed(1, 0.3, p, 0.4) for p in (0.0, 0.4, 0.65, 0.9, 1.0)] == pytest.approx([1, 1, 0.65, 0.3, 0.3])


def test_the_update_uses_every_frame_once_per_epoch() -> None:
    torch.manual_seed(0)
    config = tiny_config(num_epochs=3, num_minibatches=4)
    ppo = PPO(config, make_policy(config))
    td = make_rollout(ppo.policy, 12, 16)
    ppo.add_advantages(td)
    seen: list[torch.Tensor] = []
    original = ppo.minibatches.current
    tasks: list[torch.Tensor] = []

    def minibatch_and_note():
        minibatch = original()
        seen.append(minibatch["action"][:, 0])
        tasks.append(minibatch["task_idx"])
        return minibatch

    ppo.minibatches.current = minibatch_and_note
    ppo.update(td)
    assert [len(s) for s in seen] == [48] * 12
    assert all((rows.diff() >= 0).all() and rows.unique().numel() == 3 for rows in tasks)  # as heads want them
    everything = td["action"][..., 0].flatten().sort().values
    for epoch in range(3):
        assert torch.equal(torch.cat(seen[4 * epoch : 4 * epoch + 4]).sort().values, everything)


def test_minibatches_that_do_not_divide_the_frames_leave_others_out_in_each_epoch() -> None:
    """192 frames in 5 minibatches of 38: two are left over."""
    torch.manual_seed(0)
    config = tiny_config(num_epochs=3, num_minibatches=5)
    assert config.minibatch_size == 38
    ppo = PPO(config, make_policy(config))
    td = make_rollout(ppo.policy, 12, 16)
    ppo.add_advantages(td)
    td["action"][..., 0] = torch.arange(192.0).view(12, 16) / 1000  # tells frames apart
    everything = frozenset(td["action"][..., 0].flatten().tolist())
    seen: list[list[float]] = []
    original = ppo.minibatches.current

    def minibatch_and_note():
        minibatch = original()
        seen.append(minibatch["action"][:, 0].tolist())
        return minibatch

    ppo.minibatches.current = minibatch_and_note
    metrics = ppo.update(td)
    assert [len(frames) for frames in seen] == [38] * 15
    epochs = [[frame for part in seen[5 * epoch : 5 * epoch + 5] for frame in part] for epoch in range(3)]
    left_out = [everything - frozenset(used) for used in epochs]
    assert [len(set(used)) for used in epochs] == [190] * 3 and [len(left) for left in left_out] == [2] * 3
    assert len(set(left_out)) == 3
    assert metrics["skipped_updates"] == 0 and torch.isfinite(metrics["approx_kl"])


def test_minibatches_of_three_ranks_add_up_to_those_of_one_process() -> None:
    """Two frames in a minibatch, so that a rank often has none of them."""
    config = tiny_config(num_envs=3, num_steps=4, num_minibatches=6)
    frames = TensorDict({"action": torch.arange(12.0), "task_idx": torch.arange(12) % 3}, [12])

    def cut(rank: int, size: int) -> Minibatches:
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        minibatches = Minibatches(config, torch.Generator().manual_seed(0), ranks, fixed_shapes=False)
        minibatches.take(frames[ranks.part(12)])
        minibatches.shuffle()
        return minibatches

    alone, several = cut(0, 1), [cut(rank, 3) for rank in range(3)]
    without, seen = 0, []
    for i in range(6):
        alone.choose(i)
        assert float(alone.share) == 1 and alone.current()["task_idx"].diff() >= 0
        found = []
        for minibatches in several:
            minibatches.choose(i)
            count = round(2 * float(minibatches.share))
            without += count == 0
            assert len(minibatches.current()) == max(count, 1)
            found += minibatches.current()["action"][:count].tolist()
        assert sorted(found) == sorted(alone.current()["action"].tolist())
        seen += found
    assert without > 6 and sorted(seen) == list(range(12))


def test_compiled_advantages_and_losses_equal_the_eager_ones() -> None:
    """In one graph each; inductor would take minutes here, and what it makes of a graph is not ours."""
    torch.manual_seed(0)
    config = tiny_config(normalize_reward=True)
    policy = make_policy(config)
    rollout = make_rollout(policy, 12, 16)
    eager, other = PPO(config, policy), PPO(config, policy)
    expected = eager.advantages(rollout)
    with torch.no_grad():
        got = torch.compile(other.advantages, fullgraph=True, backend="aot_eager")(rollout)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.detach(), rtol=1e-5, atol=1e-5, msg=name)
    for a, b in zip(other.reward_scale.buffers(), eager.reward_scale.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    rollout.update({name: got[name] for name in ("advantage", "value_target")})
    batch = rollout.reshape(-1)
    total, _ = eager.minibatch_loss(batch.clone())
    compiled, _ = torch.compile(other.minibatch_loss, fullgraph=True, backend="aot_eager")(batch.clone())
    torch.testing.assert_close(compiled, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"log_gradients": True}, {"gradient_method": "cagrad"}])
def test_learning_leaves_the_rollout_as_it_was_and_tells_finite_metrics(settings) -> None:
    """Those of the tasks' gradients where they are computed: to log them, or to combine them."""
    torch.manual_seed(0)
    config = tiny_config(**settings)
    rollout = make_rollout(make_policy(config), 12, 16)
    before = rollout.clone()
    metrics = PPO(config, make_policy(config)).learn(rollout, 0.0)
    assert (rollout == before).all() and set(rollout.keys(True)) == set(before.keys(True))
    assert all(isinstance(value, float) for value in metrics.values())
    missing = {name for name, value in metrics.items() if not math.isfinite(value)}
    by_task = {f"{task}/{name}" for task in config.tasks for name in ("grad_norm", "grad_cosine")}
    assert by_task < metrics.keys() and missing == (set() if settings else by_task)


def test_a_step_without_finite_numbers_changes_nothing_and_is_counted() -> None:
    torch.manual_seed(0)
    config = tiny_config(num_epochs=1, num_minibatches=4)
    ppo = PPO(config, make_policy(config))
    td = make_rollout(ppo.policy, 12, 16)
    ppo.add_advantages(td)
    assert ppo.update(td)["skipped_updates"] == 0
    before = copy.deepcopy((ppo.policy.state_dict(), ppo.optimizer.state_dict()["state"]))
    broken = td.clone()
    broken["value_target"][:] = math.inf  # the loss is infinite, and its gradients are not numbers
    values = ppo.update(broken)
    assert (values["skipped_updates"], values["skipped_in_a_row"]) == (4, 4)
    assert math.isnan(values["loss_critic"])
    torch.testing.assert_close((ppo.policy.state_dict(), ppo.optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    # One bad frame spoils one of four minibatches; the metrics are those of the other three.
    broken = td.clone()
    broken["advantage"][0, 0] = math.nan
    values = ppo.update(broken)
    assert values["skipped_updates"] == 1 and values["skipped_in_a_row"] in (0, 1)
    assert all(math.isfinite(values[name]) for name in ("loss_policy", "loss_critic", "approx_kl", "grad_norm"))
    ppo.prepare_next(td, torch.tensor(0.02), 0.0)
    assert all(torch.isfinite(tensor).all() for tensor in ppo.policy.state_dict().values())


def test_skipped_steps_are_counted_over_updates_until_they_are_too_many() -> None:
    torch.manual_seed(0)
    config = tiny_config(max_skipped_updates=7)  # 4 steps an update
    ppo = PPO(config, make_policy(config))
    td = make_rollout(ppo.policy, 12, 16)
    td["next", "reward"][td["task_idx"] == 1] = math.nan
    assert ppo.learn(td, 0.0)["skipped_updates"] == 4
    assert torch.isfinite(ppo.reward_scale.var).all() and torch.isfinite(ppo.reward_scale.returns).all()
    with pytest.raises(Diverged):
        ppo.learn(td, 0.0)


def test_with_popart_a_task_weighs_alike_whatever_the_scale_of_its_values() -> None:
    """The critic's loss and its gradient over the torso, for targets of 1 and of 100."""
    results = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        config = tiny_config(popart=True)
        ppo = PPO(config, make_policy(config))
        td = make_rollout(ppo.policy, 12, 16)
        ppo.add_advantages(td)  # sets the scale from the rollout
        critic = ppo.policy.critic_heads.module
        critic.value_mean.mul_(scale)
        critic.value_std.mul_(scale)
        td["value_target"] *= scale
        td["advantage"].zero_()
        total, metrics = ppo.minibatch_loss(td.select(*LEARNING_KEYS).reshape(-1))
        total.backward()
        results.append((float(metrics["loss_critic"]), ppo.policy.torso.module.layers[0].weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4) and 0.1 < results[0][0] < 10
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)
