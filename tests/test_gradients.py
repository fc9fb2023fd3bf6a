"""Gradients by task against one backward pass per task, and their combinations against the papers' own loops."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from helpers import make_policy, make_rollout, tiny_config
from mtrl_vec.learn.gradients import CAGRAD_RADIUS, METHODS, cagrad, combine, cosines_with_others, gram_matrix, pcgrad
from mtrl_vec.learn.loss import LEARNING_KEYS
from mtrl_vec.learn.ppo import PPO


def random_gradients(seed: int) -> np.ndarray:
    """[K, 20] of two to five tasks and of very different lengths; half of them with something in common."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 6))
    gradients = rng.normal(size=(k, 20)) * rng.lognormal(0, 1, size=(k, 1))
    return gradients + rng.normal(size=20) * (seed % 2)


def loop_pcgrad(gradients: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper, over pairs of tasks."""
    total = np.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        projected = gradients[i].copy()
        for j in order:
            product = projected @ gradients[j]
            if j != i and product < 0:
                projected -= product / (gradients[j] @ gradients[j]) * gradients[j]
        total += projected
    return total


@pytest.mark.parametrize("seed", range(20))
def test_pcgrad_equals_a_loop_over_pairs(seed) -> None:
    gradients = random_gradients(seed)
    gram = torch.tensor(gradients @ gradients.T)
    random = torch.rand(gram.shape, generator=torch.Generator().manual_seed(seed))
    expected = loop_pcgrad(gradients, random.argsort(1).numpy())
    np.testing.assert_allclose(pcgrad(gram, random).numpy() @ gradients, expected, rtol=1e-9, atol=1e-12)


def test_pcgrad_by_hand() -> None:
    """Two tasks: (1, 0) and (-1, 1). Each is projected onto the normal of the other."""
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    torch.testing.assert_close(pcgrad(gradients @ gradients.T, torch.rand(2, 2)) @ gradients, torch.tensor([0.5, 1.5]))
    agreeing = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(pcgrad(agreeing @ agreeing.T, torch.rand(2, 2)), torch.ones(2))


@pytest.mark.parametrize("seed", range(40))
def test_cagrad_helps_the_worst_task_as_much_as_an_exact_solver(seed) -> None:
    gradients = random_gradients(seed)
    k, mean = len(gradients), gradients.mean(0)
    radius = CAGRAD_RADIUS * np.linalg.norm(mean)
    exact = minimize(
        lambda w: (w @ gradients) @ mean + radius * np.linalg.norm(w @ gradients),
        np.ones(k) / k,
        bounds=[(0, 1)] * k,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    mixed = exact.x @ gradients
    best = (gradients @ (mean + radius * mixed / np.linalg.norm(mixed))).min()
    direction = cagrad(torch.tensor(gradients @ gradients.T)).numpy() @ gradients / k
    assert np.linalg.norm(direction - mean) == pytest.approx(radius, rel=1e-6)
    scale = radius * np.linalg.norm(gradients, axis=1).mean()
    assert (gradients @ direction).min() > best - 0.005 * scale
    assert (gradients @ direction).min() > (gradients @ mean).min() - 1e-9


def norms_and_cosines(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the tasks' gradients [K], and the cosines between them [K, K]: NaN where one has no length."""
    norms = gram.diagonal().sqrt()
    return norms, gram / norms.outer(norms)


def test_the_gram_matrix_and_cosines_by_hand() -> None:
    """Three tasks, over two parameters: (3, 4), (0, -1), (0, 0)."""
    gradients = [torch.tensor([[3.0], [0.0], [0.0]]), torch.tensor([[4.0], [-1.0], [0.0]])]
    gram = gram_matrix(gradients)
    assert gram.tolist() == [[25, -4, 0], [-4, 1, 0], [0, 0, 0]]
    assert cosines_with_others(gram)[:2].tolist() == pytest.approx([-0.8, -0.8])
    assert cosines_with_others(gram)[2].isnan()


@pytest.mark.parametrize("seed", range(20))
def test_cagrad_of_a_task_without_gradient_is_that_of_the_others(seed) -> None:
    gram = torch.tensor(random_gradients(seed) @ random_gradients(seed).T)
    absent = torch.nn.functional.pad(gram, (1, 0, 1, 0))
    torch.testing.assert_close(cagrad(absent)[1:], cagrad(gram), rtol=1e-6, atol=1e-6)
    assert cagrad(torch.zeros(3, 3)).isfinite().all()


def test_cosines_of_a_task_that_is_small_beside_the_others() -> None:
    gradients = torch.tensor([[1e4, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    expected = [(0.6 - 1) / np.hypot(0.4, 0.8), 0.6, -1]  # of push with (9999, 0), of pick-place with (10000.6, 0.8)
    assert cosines_with_others(gram_matrix([gradients])).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_cosines_with_the_sum_of_the_others(seed) -> None:
    gradients = random_gradients(seed)
    others = gradients.sum(0) - gradients
    lengths = np.linalg.norm(gradients, axis=1) * np.linalg.norm(others, axis=1)
    expected = (gradients * others).sum(1) / lengths
    got = cosines_with_others(gram_matrix([torch.tensor(gradients)]))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


def setup(tasks: tuple[str, ...] = ("reach", "push", "pick-place"), **changes: object):
    torch.manual_seed(0)
    config = tiny_config(tasks=tasks, **changes)
    ppo = PPO(config, make_policy(config))
    for parameter in ppo.policy.parameters():  # the heads' last layer starts too small to tell anything
        torch.nn.init.normal_(parameter, std=0.3)
    td = make_rollout(ppo.policy, 12, 16)
    ppo.add_advantages(td)
    return ppo, td.select(*LEARNING_KEYS).reshape(-1)[:100]  # tasks have different numbers of rows


@pytest.mark.parametrize("compiling", [False, True])
def test_gradients_by_task_equal_one_backward_pass_for_each(compiling, monkeypatch) -> None:
    ppo, batch = setup()
    torso, k = ppo.policy.torso.module, 3
    if compiling:  # the route without waiting for sizes
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    copies = torso.copies()
    total, _ = ppo.minibatch_loss(batch, copies)
    by_task = torch.autograd.grad(total, copies)
    plain, _ = ppo.minibatch_loss(batch)
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-6)
    for task in range(k):
        ppo.set_task_weights([float(i == task) for i in range(k)])
        alone, _ = ppo.minibatch_loss(batch)
        expected = torch.autograd.grad(alone / k, list(torso.parameters()))
        for got, want in zip(by_task, expected, strict=True):
            torch.testing.assert_close(got[task], want, rtol=1e-3, atol=1e-5)


def test_a_combination_that_adds_up_is_the_gradient_without_a_method() -> None:
    """The last step of an update goes by task where gradients are logged, and learns the same."""
    (plain, batch), (last, _) = setup(), setup(log_gradients=True)
    assert plain.last_step == plain.step
    for learner in (plain, last):
        learner.minibatches.frames, learner.minibatches.rows = batch, torch.arange(len(batch))
    plain.step()
    last.last_step()
    for (name, a), b in zip(plain.policy.named_parameters(), last.policy.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert plain.gram.isnan().all() and last.gram.isfinite().all()


@pytest.mark.parametrize("method", ["none", "cagrad"])
def test_an_update_tells_the_norms_and_cosines_of_its_last_minibatch(method) -> None:
    """Against one backward pass per task from where the last step started."""
    ppo, _ = setup(gradient_method=method, log_gradients=method == "none", num_epochs=2, num_minibatches=3)
    data = make_rollout(ppo.policy, 12, 16)
    ppo.add_advantages(data)
    ppo.set_task_weights([1.0, 0.0, 3.0])
    before, step = {}, ppo.last_step
    ppo.last_step = lambda: (before.update(copy.deepcopy(ppo.policy.state_dict())), step())[1]
    metrics = ppo.update(data)
    ppo.policy.load_state_dict(before)
    torso, gradients = list(ppo.policy.torso.parameters()), []
    for weights in ([1, 0, 0], [0, 0, 3]):
        ppo.loss.task_weights.copy_(torch.tensor(weights) * 3 / 4)
        total, _ = ppo.minibatch_loss(ppo.minibatches.current())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, torso)]))
    reach, pick_place = gradients
    assert float(metrics["reach-v3/grad_norm"]) == pytest.approx(float(reach.norm()), rel=1e-3)
    assert float(metrics["push-v3/grad_norm"]) == 0
    assert float(metrics["pick-place-v3/grad_norm"]) == pytest.approx(float(pick_place.norm()), rel=1e-3)
    cosine = float(torch.cosine_similarity(reach, pick_place, dim=0))
    assert float(metrics["reach-v3/grad_cosine"]) == pytest.approx(cosine, abs=1e-3)
    assert float(metrics["pick-place-v3/grad_cosine"]) == pytest.approx(cosine, abs=1e-3)
    assert metrics["push-v3/grad_cosine"].isnan()
    norms, cosines = norms_and_cosines(ppo.gram)
    assert float(cosines[0, 2]) == pytest.approx(cosine, abs=1e-3) and float(norms[1]) == 0


@pytest.mark.parametrize("method", ["pcgrad", "cagrad"])
def test_a_step_follows_the_combined_gradient_of_the_torso_and_leaves_the_heads_theirs(method) -> None:
    ppo, batch = setup(gradient_method=method, max_grad_norm=1e9)
    ppo.minibatches.frames, ppo.minibatches.rows = batch, torch.arange(len(batch))
    torso = ppo.policy.torso.module
    copies = torso.copies()
    total, _ = ppo.minibatch_loss(batch, copies)
    gradients = torch.autograd.grad(total, [*copies, *ppo.policy.critic_heads.parameters()])
    ppo.random.copy_(torch.rand(3, 3))
    by_task = list(gradients[: len(copies)])
    expected = combine(by_task, METHODS[method](gram_matrix(by_task), ppo.random))
    ppo.step()
    for parameter, want in zip(torso.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6)
    for parameter, want in zip(ppo.policy.critic_heads.parameters(), gradients[len(copies) :], strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["pcgrad", "cagrad"])
def test_one_task_has_nothing_to_combine(method) -> None:
    combined, plain = setup(("push",), gradient_method=method)[0], setup(("push",))
    batch = plain[1]
    for learner in (combined, plain[0]):
        learner.minibatches.frames, learner.minibatches.rows = batch, torch.arange(len(batch))
        learner.step()
    if method == "pcgrad":
        for a, b in zip(combined.policy.parameters(), plain[0].policy.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(combined.policy.torso.parameters(), plain[0].policy.torso.parameters(), strict=True):
        assert torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.9999  # CAGrad's are longer
