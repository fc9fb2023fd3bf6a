"""Running statistics against the statistics of everything at once, and against a plain loop."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from mtrl_vec.learn.reward_scale import RewardScale
from mtrl_vec.policy.normalization import ObservationNorm


def test_observation_moments_equal_those_of_all_batches_together() -> None:
    torch.manual_seed(0)
    norm = ObservationNorm(5)
    batches = [torch.randn(n, 7, 5) * n + n for n in (3, 20, 11)]
    for b in batches:
        norm.update(b)
    everything = torch.cat([b.reshape(-1, 5) for b in batches])
    torch.testing.assert_close(norm.mean, everything.mean(0))
    torch.testing.assert_close(norm.var, everything.var(0, correction=0))
    torch.testing.assert_close(norm(everything).std(0, correction=0), torch.ones(5), atol=0.02, rtol=0)
    assert norm(torch.full((5,), 1e6)).max() == 10


def test_what_never_changes_is_not_blown_up() -> None:
    norm = ObservationNorm(1)
    norm.update(torch.zeros(100, 1))
    assert norm(torch.full((1,), 1e-6)).abs() < 0.01


def test_reward_scale_is_the_std_of_each_tasks_discounted_return() -> None:
    torch.manual_seed(0)
    envs, steps, gamma = 6, 50, 0.9
    task = torch.arange(envs) % 2
    reward = torch.rand(envs, 2 * steps) * torch.where(task == 0, 1.0, 100.0)[:, None]
    done = torch.rand(envs, 2 * steps) < 0.1
    scale = RewardScale(envs, 2, gamma)
    hot = one_hot(task, 2).float()[:, None].expand(envs, steps, 2)
    for half in (slice(0, steps), slice(steps, None)):  # returns run on from one rollout to the next
        scale.update(reward[:, half], done[:, half], hot)

    returns: dict[int, list[float]] = {0: [], 1: []}
    for env in range(envs):
        running = 0.0
        for t in range(2 * steps):
            running = running * gamma + float(reward[env, t])
            returns[int(task[env])].append(running)
            if done[env, t]:
                running = 0.0
    for k in (0, 1):
        expected = torch.tensor(returns[k])
        torch.testing.assert_close(scale.var[k], expected.var(correction=0), rtol=1e-4, atol=0)
        scaled = scale(torch.ones(1, 1), one_hot(torch.tensor([k]), 2).float())
        torch.testing.assert_close(scaled[0, 0], 1 / expected.std(correction=0), rtol=1e-4, atol=0)


def test_a_task_without_rows_keeps_its_statistics() -> None:
    scale = RewardScale(2, 2, 0.9)
    hot = torch.tensor([1.0, 0.0]).expand(2, 3, 2)
    scale.update(torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool), hot)
    assert scale.var[1] == 1 and scale.count.tolist() == [6, 0]
