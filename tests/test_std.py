"""The standard deviation of the actions: it learns, and keeps its limit."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import make_policy, make_rollout, tiny_config
from mtrl_vec.learn.ppo import PPO


def learner_on_the_limit(**changes: object) -> PPO:
    """A learner whose standard deviations are all exactly at their limit, as at the start of a run."""
    torch.manual_seed(0)
    config = tiny_config(target_kl=None, lr=1e-2, **changes)
    ppo = PPO(config, make_policy(config))
    assert torch.equal(ppo.policy.action_std(), torch.full((3, 4), config.policy.init_std))
    return ppo


def rollout_preferring(ppo: PPO, small: bool) -> torch.Tensor:
    """Advantages that reward actions near the mean, or those far from it."""
    td = make_rollout(ppo.policy, 12, 16)
    ppo.add_advantages(td)
    distance = ((td["action"] - td["loc"]) / td["scale"]).square().sum(-1, keepdim=True)
    td["advantage"] = torch.where(distance < 4, 1.0, -1.0) * (1 if small else -1)
    return td


def test_a_std_at_its_limit_can_come_down_and_go_up_again() -> None:
    ppo = learner_on_the_limit()
    for _ in range(3):
        ppo.update(rollout_preferring(ppo, small=True))
    low = ppo.policy.action_std()
    assert (low < 0.98).all()
    for _ in range(8):  # Adam's momentum points down at first
        ppo.update(rollout_preferring(ppo, small=False))
    assert ppo.policy.action_std().mean() > low.mean() + 0.01


def test_no_step_leaves_a_std_above_its_limit_and_none_is_without_gradient_there() -> None:
    """Pushed up for three updates; its gradient there is that of any other."""
    ppo = learner_on_the_limit(entropy_coeff=1.0)
    for _ in range(3):
        td = rollout_preferring(ppo, small=False)
        ppo.update(td)
        assert (ppo.policy.action_std() <= 1.0).all()
    before = ppo.policy.action_std()
    torch.testing.assert_close(before, torch.ones(3, 4))
    heads = ppo.policy.actor_heads[0].module
    (gradient,) = torch.autograd.grad(heads.std().sum(), heads.log_std)
    assert torch.equal(gradient, before)  # the derivative of exp, with nothing in its way


def test_an_entropy_bonus_acts_below_the_limit_and_stops_at_it() -> None:
    ppo = learner_on_the_limit(entropy_coeff=1.0)
    ppo.policy.limit_std(1.05)
    td = make_rollout(ppo.policy, 12, 16)
    ppo.add_advantages(td)
    td["advantage"].zero_()
    ppo.update(td)
    assert (ppo.policy.action_std() > 1.01).all()
    for _ in range(5):
        ppo.update(td)
    torch.testing.assert_close(ppo.policy.action_std(), torch.full((3, 4), 1.05))


def test_a_falling_limit_takes_the_stds_along_and_leaves_smaller_ones_alone() -> None:
    ppo = learner_on_the_limit()
    with torch.no_grad():
        ppo.policy.actor_heads[0].module.log_std[1, 2] = math.log(0.2)
    ppo.policy.limit_std(0.3)
    expected = torch.full((3, 4), 0.3)
    expected[1, 2] = 0.2
    torch.testing.assert_close(ppo.policy.action_std(), expected)


def test_a_std_that_is_held_follows_its_fraction_of_the_limit_and_is_free_without_one() -> None:
    ppo = learner_on_the_limit()
    ppo.policy.hold_std(torch.tensor([1.0, 0.9, 0.0]))
    for _ in range(4):
        ppo.update(rollout_preferring(ppo, small=True))
    held, partly, free = ppo.policy.action_std()
    torch.testing.assert_close(held, torch.ones(4))
    torch.testing.assert_close(partly, torch.full((4,), 0.9))
    assert (free < 0.9).all()
    ppo.policy.limit_std(0.5)  # lower than the floor was, which is a fraction of it
    torch.testing.assert_close(ppo.policy.action_std()[:2], torch.full((2, 4), 0.5))
    ppo.policy.hold_std(torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(ppo.policy.action_std(), torch.full((3, 4), 0.5))


@pytest.mark.parametrize("learn_std", [True, False])
def test_a_skipped_step_moves_no_std(learn_std) -> None:
    ppo = learner_on_the_limit(learn_std=learn_std)
    td = rollout_preferring(ppo, small=True)
    td["advantage"].fill_(math.nan)
    assert ppo.update(td)["skipped_updates"] == 4
    assert torch.equal(ppo.policy.action_std(), torch.ones(3, 4))


def test_a_std_that_does_not_learn_is_its_limit_also_when_that_rises() -> None:
    """As after a resumption with more frames, and after a warm start from a policy with little noise left."""
    ppo = learner_on_the_limit(learn_std=False)
    for limit in (0.3, 0.7):
        ppo.policy.limit_std(limit)
        torch.testing.assert_close(ppo.policy.action_std(), torch.full((3, 4), limit))
