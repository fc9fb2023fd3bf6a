"""Acting: what the simulators are told to do, against the policy itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from helpers import assert_same, make_batch, make_policy, tiny_config
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.timing import Timer


def test_it_acts_as_the_policy_does_and_tells_the_log_probability() -> None:
    torch.manual_seed(0)
    policy, timer = make_policy(tiny_config(init_std=0.5)), Timer()
    state = make_batch(policy, 2, 6)
    loc, scale = policy.distribution(state["observation"], state["task_one_hot"], state["task_idx"])
    torch.manual_seed(1)
    acting = ActingPolicy(policy, tiny_config(), timer)  # goes on with torch's own stream
    expected = torch.normal(loc, scale)
    out = acting(state.clone())
    torch.testing.assert_close(out["action"], expected)
    expected = torch.distributions.Normal(loc, scale).log_prob(out["action"]).sum(-1)
    torch.testing.assert_close(out["action_log_prob"], expected)
    torch.testing.assert_close(ActingPolicy(policy, tiny_config(), timer, mean=True)(state.clone())["action"], loc)
    assert timer.seconds["infer"] > 0


def test_its_noise_has_a_stream_of_its_own_that_goes_on_from_a_state() -> None:
    """What else draws random numbers changes no action, and acting changes nothing that they are drawn for."""
    torch.manual_seed(0)
    policy = make_policy(tiny_config())
    state = make_batch(policy, 6)
    acting = ActingPolicy(policy, tiny_config(), Timer())
    acting.noise.set_correlation(np.array([0.0, 0.5, 0.9]))
    acting(state.clone())
    saved, of_torch = acting.state_dict(), torch.get_rng_state()
    expected = [acting(state.clone())["action"] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), of_torch) and not torch.equal(*expected)
    torch.manual_seed(99)
    other = ActingPolicy(policy, tiny_config(), Timer())
    other.noise.set_correlation(np.array([0.0, 0.5, 0.9]))
    other.load_state_dict(saved)
    for actions in expected:
        torch.rand(3)
        assert torch.equal(other(state.clone())["action"], actions)
    assert_same(other.noise.state_dict(), acting.noise.state_dict())


@pytest.mark.parametrize("sizes", [[8], [5, 3], [2, 5, 1]])
def test_groups_that_act_in_turn_act_as_all_at_once_do(sizes) -> None:
    torch.manual_seed(0)
    policy = make_policy(tiny_config(init_std=0.5))
    whole, parts = (ActingPolicy(policy, tiny_config(), Timer()) for _ in range(2))
    for acting in (whole, parts):
        acting.noise.set_correlation(np.array([0.0, 0.5, 0.9]))
    policies = parts.in_turn(sizes)
    for _ in range(3):
        state = make_batch(policy, 8)
        expected = whole(state.clone())
        groups = [act(group.clone()) for act, group in zip(policies, state.split(sizes), strict=True)]
        for name in ("action", "action_log_prob"):
            torch.testing.assert_close(torch.cat([group[name] for group in groups]), expected[name])
        assert_same(parts.noise.state_dict(), whole.noise.state_dict())  # to the last bit


def test_a_lagging_one_acts_as_before_until_it_catches_up() -> None:
    torch.manual_seed(0)
    policy = make_policy(tiny_config())
    state = make_batch(policy, 8)
    prompt = ActingPolicy(policy, tiny_config(), Timer(), mean=True)
    lagging = ActingPolicy(policy, tiny_config(), Timer(), mean=True, lagging=True)
    inputs = state["observation"], state["task_one_hot"], state["task_idx"]
    with torch.no_grad():
        old = prompt(state.clone())["action"]
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))
        policy.torso.module.features.observation_norm.mean.fill_(0.5)
        new = prompt(state.clone())["action"]
        assert not torch.allclose(old, new)
        torch.testing.assert_close(lagging(state.clone())["action"], old)
        lagging.catch_up()
        torch.testing.assert_close(lagging(state.clone())["action"], new)
        torch.testing.assert_close(lagging.previous.distribution(*inputs)[0], old)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((2, 4), [0, 1, 2, 3, 4, 5, 6]),
        ((3, 3), [0, 1, 2, 3, 4, 6, 7]),
        ((9,), [0, 1, 2, 3, 4, 6, 7]),
    ],
)
@pytest.mark.parametrize("mean", [False, True])
def test_idle_rows_change_nothing_and_are_told_to_do_nothing(shape, rows, mean) -> None:
    """In the other rows the actions, to the last bit, of a batch without idle rows; no noise is drawn for idle ones."""
    torch.manual_seed(0)
    policy = make_policy(tiny_config(init_std=0.5))
    torch.manual_seed(1)
    flat, padded = (ActingPolicy(policy, tiny_config(), Timer(), mean=mean) for _ in range(2))
    padded.rows = torch.tensor(rows)
    for acting in (flat, padded):
        acting.noise.set_correlation(np.array([0.0, 0.5, 0.9]))
    for _ in range(3):  # the streams stay together
        state = make_batch(policy, 7)
        everywhere = {
            "observation": torch.full((*shape, 39), torch.nan),
            "task_one_hot": torch.zeros(*shape, 3),
            "task_idx": torch.zeros(shape, dtype=torch.long),
        }
        for name, values in everywhere.items():
            values.view(-1, *values.shape[len(shape) :])[rows] = state[name]
        expected, out = flat(state), padded(TensorDict(everywhere, shape))
        for name in ("action", "action_log_prob"):
            values = out[name].flatten(0, len(shape) - 1)
            assert out[name].shape == (*shape, *expected[name].shape[1:])
            assert torch.equal(values[rows], expected[name])
            idle = torch.ones(len(values), dtype=torch.bool)
            idle[rows] = False
            assert idle.any() and (values[idle] == 0).all()
    assert_same(padded.state_dict(), flat.state_dict())
