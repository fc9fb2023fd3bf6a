"""Exploration: the noise of the actions against its formula and its moments, and how much of it tasks get."""

from __future__ import annotations

import numpy as np
import torch

from mtrl_vec.learn.exploration import ActionNoise, exploration


def make_noise(rho: list[float], seed: int = 0) -> ActionNoise:
    noise = ActionNoise(len(rho), 4, torch.Generator().manual_seed(seed))
    noise.set_correlation(np.array(rho))
    return noise


def test_every_value_is_standard_normal_and_each_task_has_its_correlation() -> None:
    rho = [0.0, 0.5, 0.9]
    noise, task_idx = make_noise(rho), torch.arange(3).repeat(4000)
    draws = torch.stack([noise(task_idx) for _ in range(30)]).numpy()  # [T, B, A]
    assert draws.shape == (30, 12_000, 4)
    for k, expected in enumerate(rho):
        of_task = draws[:, k::3]
        for t in (0, 1, 5, 29):  # from the first step on
            assert abs(of_task[t].mean()) < 0.03 and abs(of_task[t].std() - 1) < 0.02
        for lag in (1, 3):
            found = np.mean(of_task[lag:] * of_task[:-lag])
            assert abs(found - expected**lag) < 0.02, (k, lag)
        other_dimension = np.mean(of_task[..., 0] * of_task[..., 1])
        other_environment = np.mean(of_task[:, :-1] * of_task[:, 1:])
        assert abs(other_dimension) < 0.04 and abs(other_environment) < 0.02


def test_it_is_an_autoregression_written_out_for_one_environment() -> None:
    noise, white = make_noise([0.8]), torch.Generator().manual_seed(0)
    task_idx, last = torch.zeros(1, dtype=torch.long), None
    for _ in range(5):
        w = torch.randn(1, 4, generator=white).numpy()
        last = w if last is None else 0.8 * last + 0.6 * w
        np.testing.assert_allclose(noise(task_idx), last, rtol=1e-5, atol=1e-6)


def test_without_correlation_it_is_white_to_the_last_bit() -> None:
    noise, white = make_noise([0.0, 0.0]), torch.Generator().manual_seed(0)
    for _ in range(3):
        assert torch.equal(noise(torch.tensor([[0, 1, 1]])), torch.randn(1, 3, 4, generator=white))


def test_it_continues_from_a_state() -> None:
    noise, task_idx = make_noise([0.8, 0.3]), torch.tensor([0, 1, 0])
    noise(task_idx)
    saved = noise.state_dict()
    expected = [noise(task_idx) for _ in range(3)]
    other = make_noise([0.8, 0.3], seed=9)
    other.load_state_dict(saved)
    for values in expected:
        assert torch.equal(other(task_idx), values)


def test_a_task_explores_less_as_it_succeeds() -> None:
    success = np.array([0.0, 0.1, 0.25, 0.5, 1.0, np.nan, np.nan])
    unknown = np.array([7.0, 7.0, 7.0, 7.0, 7.0, 1.0, 0.0])
    frames, expected = np.full(7, 200), [1.0, 0.8, 0.5, 0.0, 0.0, 1.0, 0.0]
    for delay in (0, 100):
        np.testing.assert_allclose(exploration(success, frames, delay, unknown), expected)


def test_a_task_that_fails_explores_after_a_while() -> None:
    frames, success, unknown = np.array([0, 100, 150, 150, 175, 1000]), np.array([0, 0, 0, 0.25, np.nan, 0]), np.ones(6)
    expected = [0.0, 0.0, 0.5, 0.25, 0.75, 1.0]
    np.testing.assert_allclose(exploration(success, frames, 100, unknown), expected)
