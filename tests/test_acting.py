"""Acting: what the simulators are told to do, against the policy itself."""

from __future__ import annotations

import torch
from conftest import tiny_config
from test_policy import batch

from mtrl_vec.acting import ActingPolicy
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.timing import Timer


def test_it_acts_as_the_policy_does_and_tells_the_log_probability() -> None:
    torch.manual_seed(0)
    policy, timer = SharedPolicy(tiny_config(init_std=0.5)), Timer()
    acting = ActingPolicy(policy, tiny_config(), timer)
    state = batch(policy, 2, 6)
    loc, scale = policy.distribution(state["observation"], state["task_one_hot"], state["task_idx"])
    torch.manual_seed(1)
    out = acting(state.clone())
    torch.manual_seed(1)
    torch.testing.assert_close(out["action"], torch.normal(loc, scale))
    expected = torch.distributions.Normal(loc, scale).log_prob(out["action"]).sum(-1)
    torch.testing.assert_close(out["action_log_prob"], expected)
    torch.testing.assert_close(ActingPolicy(policy, tiny_config(), timer, mean=True)(state.clone())["action"], loc)
    assert timer.seconds["infer"] > 0


def test_a_lagging_one_acts_as_before_until_it_catches_up() -> None:
    torch.manual_seed(0)
    policy = SharedPolicy(tiny_config())
    state = batch(policy, 8)
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
