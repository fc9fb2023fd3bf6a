"""Running statistics against the statistics of everything at once, and against a plain loop."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from mtrl_vec.learn.reward_scale import RewardScale
from mtrl_vec.policy.normalization import ObservationNorm


def test_observation_moments_equal_those_of_all_batches_of_a_group_together() -> None:
    torch.manual_seed(0)
    norm = ObservationNorm(5, 3)
    torch.testing.assert_close(norm(torch.ones(1, 5), torch.tensor([2])), torch.ones(1, 5))  # nothing is known
    batches = [(torch.randn(n, 7, 5) * n + n, torch.randint(2, (n, 7))) for n in (3, 20, 11)]  # none of group 2
    for rows, group in batches:
        norm.update(rows, one_hot(group, 3).float())
    everything, groups = (torch.cat([part[i].flatten(0, 1) for part in batches]) for i in (0, 1))
    for group in (0, 1):
        own = everything[groups == group]
        torch.testing.assert_close(norm.mean[group], own.mean(0))
        torch.testing.assert_close(norm.var[group], own.var(0, correction=0))
        expected = (own - own.mean(0)) / own.std(0, correction=0)
        torch.testing.assert_close(norm(everything, groups)[groups == group], expected, atol=1e-4, rtol=1e-4)
    assert norm(torch.full((1, 5), 1e6), torch.tensor([0])).max() == 10


def test_without_groups_the_moments_are_those_of_all() -> None:
    torch.manual_seed(0)
    norm, rows = ObservationNorm(3), torch.randn(40, 3) * 5 + 1
    norm.update(rows[:10])
    norm.update(rows[10:])
    torch.testing.assert_close(norm(rows), (rows - rows.mean(0)) / rows.std(0, correction=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm(rows, torch.zeros(40, dtype=torch.long)), norm(rows))


def test_what_never_changes_is_not_blown_up() -> None:
    norm = ObservationNorm(1)
    norm.update(torch.zeros(100, 1))
    assert norm(torch.full((1,), 1e-6)).abs() < 0.01


def test_what_only_one_task_does_not_change_is_measured_by_what_the_others_do() -> None:
    """Standard deviations of 3, 4 and 0, whose root mean square is sqrt(25 / 3): a fifth of that is the least."""
    norm = ObservationNorm(1, 3)
    values = torch.tensor([-3.0, 3.0, -4.0, 4.0, 7.0, 7.0])[:, None]
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    norm.update(values, one_hot(group, 3).float())
    least = (25 / 3) ** 0.5 / 5
    torch.testing.assert_close(norm(values + 0.5, group)[::2, 0], torch.tensor([-2.5 / 3, -3.5 / 4, 0.5 / least]))


def test_numbers_that_are_not_finite_change_no_statistics() -> None:
    norm = ObservationNorm(2, 2)
    hot = torch.eye(2).repeat(4, 1)
    norm.update(torch.randn(8, 2), hot)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm.update(torch.tensor([[1.0, torch.nan]]).repeat(8, 1), hot)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


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
