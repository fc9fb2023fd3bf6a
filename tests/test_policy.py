"""The shared policy against a plain loop over tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import one_hot

from helpers import loop_over_rows, make_batch, make_policy, tiny_config
from mtrl_vec.policy.features import relative_features
from mtrl_vec.policy.modules import AlignedLinear
from mtrl_vec.policy.routing import TaskHeads
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.layout import layout_of
from mtrl_vec.tasks.suite import MT3, MT10, resolve_tasks


@pytest.mark.parametrize("way", ["split", "gathered", "grouped", "forward"])
@pytest.mark.parametrize("num_tasks", [1, 3, 50])  # of fifty some have no row
@pytest.mark.parametrize("in_order", [False, True])
def test_routing_equals_a_loop_over_rows_in_outputs_and_gradients(in_order: bool, num_tasks: int, way: str) -> None:
    torch.manual_seed(0)
    heads = TaskHeads(num_tasks, 16, 8, 4, 1.0)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(40, 16, requires_grad=True)
    task_idx = torch.randint(num_tasks, (40,))
    if in_order:
        task_idx = task_idx.sort().values
    weight = torch.randn(40, 4)
    variables = [x, *heads.parameters()]
    routed, looped = getattr(heads, way)(x, task_idx), loop_over_rows(heads, x, task_idx)
    tolerance = {"rtol": 0.02, "atol": 0.1} if way == "grouped" else {"rtol": 1e-4, "atol": 1e-5}  # bf16, numbers of 10
    torch.testing.assert_close(routed, looped, **tolerance)
    ours = torch.autograd.grad((routed * weight).sum(), variables)
    theirs = torch.autograd.grad((looped * weight).sum(), variables)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("way", ["split", "gathered", "grouped", "forward"])
def test_under_autocast_the_last_layer_stays_in_full_precision(way: str) -> None:
    heads = TaskHeads(3, 16, 8, 1, 1.0)
    torch.nn.init.zeros_(heads.weight2)
    torch.nn.init.constant_(heads.bias2, 10.03)  # in bf16 that would be 10, and a critic's errors of that size
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        routed = getattr(heads, way)(torch.randn(40, 16), torch.arange(40) % 3)
    torch.testing.assert_close(routed, torch.full((40, 1), 10.03))


def test_padded_inputs_change_nothing() -> None:
    layer = AlignedLinear(51, 16)
    x = torch.randn(5, 51, requires_grad=True)
    torch.testing.assert_close(layer.padded(x), layer(x))
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (layer.padded(x), layer(x))
    )
    torch.testing.assert_close(ours, theirs)


def test_relative_features_of_simulated_steps() -> None:
    """Against what consecutive frames of the simulator say, and nothing of the observation is lost."""
    sim = SimBatch(MT3, np.arange(6) % 3, seed=0)
    rng = np.random.default_rng(0)
    before = sim.reset()
    for _ in range(5):
        now = sim.step(rng.uniform(-1, 1, (6, 4)).astype(np.float32)).observation
        features = relative_features(torch.from_numpy(now)).numpy()
        hand, obj, goal = now[:, :3], now[:, 4:7], now[:, 36:]
        np.testing.assert_array_equal(features[:, 11:22], now[:, :11] - before[:, :11])
        np.testing.assert_array_equal(features[:, 25:], np.concatenate([obj - hand, goal - obj, goal - hand], axis=1))
        again = np.zeros((6, 39))
        again[:, :11], again[:, 18:29], again[:, 36:] = features[:, :11], features[:, :11] - features[:, 11:22], goal
        np.testing.assert_allclose(again, now, atol=1e-15)
        before = now


def test_a_task_with_a_second_object_shows_it_to_the_policy_and_others_keep_their_features() -> None:
    """Hammer and stick-pull beside reach, which leaves the second object's entries zero."""
    tasks = resolve_tasks(["hammer", "stick-pull", "reach"])
    layout = layout_of(tasks)
    sim, rng = SimBatch(tasks, [0, 1, 2], seed=0), np.random.default_rng(0)
    before = sim.reset()
    for _ in range(3):
        now = sim.step(rng.uniform(-1, 1, (3, 4)).astype(np.float32)).observation
        features = relative_features(torch.from_numpy(now), layout).numpy()
        hand, obj, second, goal = now[:, :3], now[:, 4:7], now[:, 11:14], now[:, 36:]
        expected = [now[:, :18], now[:, :18] - before[:, :18], goal]
        expected += [obj - hand, goal - obj, goal - hand, second - obj, goal - second]
        np.testing.assert_array_equal(features, np.concatenate(expected, axis=1))
        before = now
    assert (now[:2, 11:14] != 0).all() and (now[2, 11:18] == 0).all()
    sizes = [layout_of(some) for some in (MT3, MT10, resolve_tasks(["MT50"]))]
    assert [relative_features(torch.zeros(39), layout).numel() for layout in sizes] == [34, 34, 54]
    assert make_policy(tiny_config(tasks=("hammer", "reach"))).torso.module.features.size == 54


def inputs(td: TensorDict) -> tuple[torch.Tensor, ...]:
    return td["observation"], td["task_one_hot"], td["task_idx"]


def test_gradients_reach_only_the_heads_of_tasks_in_the_batch() -> None:
    torch.manual_seed(0)
    policy = make_policy(tiny_config())
    td = make_batch(policy, 20, task=1)
    log_prob = policy.actor.get_dist(td).log_prob(torch.randn(20, 4))
    (log_prob.sum() + policy.value(*inputs(td)).sum()).backward()
    per_task = {name: p for name, p in policy.named_parameters() if "heads" in name or "log_std" in name}
    assert len(per_task) == 9
    for name, parameter in per_task.items():
        assert parameter.grad[1].abs().sum() > 0, name
        assert parameter.grad[0].abs().sum() == 0 and parameter.grad[2].abs().sum() == 0, name
    assert all(p.grad.abs().sum() > 0 for name, p in policy.named_parameters() if "torso" in name)


def test_any_batch_shape_gives_the_rows_of_a_flat_batch() -> None:
    torch.manual_seed(0)
    policy = make_policy(tiny_config())
    td = make_batch(policy, 2, 6, 5)
    with torch.no_grad():
        nested, flat = policy.actor(td.clone()), policy.actor(td.reshape(-1))
        for one in (nested, flat):
            one["state_value"] = policy.value(*inputs(one))
    for key in ("loc", "scale", "state_value"):
        torch.testing.assert_close(nested[key].flatten(0, 2), flat[key])
    assert nested["action"].shape == (2, 6, 5, 4)
    assert nested["action_log_prob"].shape == (2, 6, 5)


def test_the_log_probability_is_that_of_the_sampled_action() -> None:
    torch.manual_seed(0)
    policy = make_policy(tiny_config(init_std=0.5))
    td = policy.actor(make_batch(policy, 30))
    expected = torch.distributions.Normal(td["loc"], torch.full((30, 4), 0.5)).log_prob(td["action"]).sum(-1)
    torch.testing.assert_close(td["action_log_prob"], expected)
    assert (td["action"] - td["loc"]).abs().min() > 0


def test_compiles_into_one_graph() -> None:
    policy = make_policy(tiny_config())
    td = make_batch(policy, 16)
    compiled = torch.compile(policy.distribution, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs(td)), policy.distribution(*inputs(td)), strict=True):
        torch.testing.assert_close(a, b)


def test_fixed_std_is_not_trained() -> None:
    policy = make_policy(tiny_config(learn_std=False, init_std=0.7))
    assert not policy.actor_heads[0].module.log_std.requires_grad
    torch.testing.assert_close(policy.action_std(), torch.full((3, 4), 0.7))


def test_the_limit_of_the_std_holds_for_what_is_learned() -> None:
    policy = make_policy(tiny_config(init_std=0.5))
    with torch.no_grad():
        policy.actor_heads[0].module.log_std[1, 2] = -3.0
    policy.limit_std(0.3)
    expected = torch.full((3, 4), 0.3)
    expected[1, 2] = torch.tensor(-3.0).exp()
    torch.testing.assert_close(policy.action_std(), expected)
    td = policy.actor(make_batch(policy, 30))
    torch.testing.assert_close(td["scale"], expected[td["task_idx"]])


def test_popart_follows_the_targets_and_changes_no_output() -> None:
    torch.manual_seed(0)
    policy = make_policy(tiny_config(popart=True))
    critic = policy.critic_heads.module
    torch.nn.init.normal_(critic.heads.bias2)
    task_idx = torch.arange(60) % 2  # none of the third
    inputs = torch.randn(60, 39), one_hot(task_idx, 3).float(), task_idx
    before = policy.value(*inputs)
    target = (
        torch.where(task_idx == 0, 100.0, 3.0)[:, None] + torch.randn(60, 1) * torch.tensor([[20.0], [0.1]])[task_idx]
    )
    critic.adapt(target, inputs[1], 0.1)
    for k in range(2):  # the first rollout counts as a whole
        torch.testing.assert_close(critic.value_mean[k], target[task_idx == k].mean())
        torch.testing.assert_close(critic.value_std[k], target[task_idx == k].std(correction=0), rtol=1e-3, atol=1e-4)
    assert (critic.value_mean[2], critic.value_std[2]) == (0, 1)
    torch.testing.assert_close(policy.value(*inputs), before, rtol=1e-3, atol=1e-3)
    mean, std = critic.value_mean.clone(), critic.value_std.clone()
    critic.adapt(target + 10, inputs[1], 0.1)
    torch.testing.assert_close(critic.value_mean[:2], mean[:2] + 1)
    square = 0.9 * (std**2 + mean**2) + 0.1 * (std**2 + (mean + 10) ** 2)
    torch.testing.assert_close(critic.value_std[:2], (square - (mean + 1) ** 2).sqrt()[:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(policy.value(*inputs), before, rtol=1e-3, atol=1e-3)
    broken = target.clone()
    broken[0] = torch.nan
    mean = critic.value_mean.clone()
    critic.adapt(broken, inputs[1], 0.1)  # of the first task
    assert critic.value_mean[0] == mean[0] and critic.value_mean[1] != mean[1]
    assert all(torch.isfinite(tensor).all() for tensor in critic.state_dict().values())


@pytest.mark.parametrize("by_task", [False, True])
def test_heads_also_see_features_normalised_over_their_own_task(by_task: bool) -> None:
    """Against NumPy; the torso sees them normalised over all tasks."""
    policy = make_policy(tiny_config(tasks=("push", "reach", "pick-place"), direct_features=True))
    torso = policy.torso.module
    rows = make_batch(policy, 300)
    rows["observation"] = rows["observation"] * (1 + rows["task_idx"][:, None]) + 5.0 * rows["task_idx"][:, None]
    torso.features.update(rows["observation"], rows["task_one_hot"])
    inputs = rows["observation"], rows["task_one_hot"]
    with torch.no_grad():
        hidden = torso.forward_by_task(*inputs, rows["task_idx"], torso.copies()) if by_task else torso(*inputs)
        shared, _ = torso.features(*inputs)
        torch.testing.assert_close(hidden[:, :32], torso.layers(shared), rtol=1e-4, atol=1e-5)
    assert hidden.shape == (300, 32 + 40)  # 34 features and zeros
    features, task = relative_features(rows["observation"]).double().numpy(), rows["task_idx"].numpy()
    of_all = (features - features.mean(0)) / features.std(0)
    np.testing.assert_allclose(shared[:, :34], of_all.clip(-10, 10), atol=1e-3)
    for k in range(3):
        own = features[task == k]
        expected = ((own - own.mean(0)) / own.std(0)).clip(-10, 10)
        np.testing.assert_allclose(hidden[task == k, 32:66], expected, atol=1e-3)
    assert hidden[:, 66:].eq(0).all()


def test_without_direct_features_the_heads_see_the_torsos_output_only() -> None:
    policy = make_policy(tiny_config(direct_features=False))
    rows = make_batch(policy, 5)
    assert policy.torso.module(rows["observation"], rows["task_one_hot"]).shape == (5, 32)
    assert not any("own_norm" in name for name in policy.state_dict())
