"""Gradient methods: combining the tasks' gradients over the shared torso where they are in conflict.

A task's gradient is that of its part of the loss; the default adds them up. The methods, and the metrics of the
gradients, need only their Gram matrix, so that the gradients themselves are read twice: once for the matrix and once
for the combination.

Shapes: ``K`` tasks, ``P`` parameters of the torso.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Coefficients = Callable[[Tensor, Tensor], Tensor]
"""From a Gram matrix [K, K] and random numbers [K, K] to the coefficients [K] of the combination."""

CAGRAD_RADIUS = 0.4
CAGRAD_STEPS, CAGRAD_RATE = 40, 8.0  # within 0.3 % of the exact solution on 200 random problems
_TINY = 1e-12


def added(gram: Tensor, random: Tensor | None = None) -> Tensor:
    """Plain sum: [K, K] -> [K]."""
    return torch.ones_like(gram[0])


def pcgrad(gram: Tensor, random: Tensor) -> Tensor:
    """Projecting conflicting gradients (Yu et al. 2020, algorithm 1): [K, K], [K, K] -> [K].

    Each task's gradient is projected onto the normal plane of every other that it conflicts with, in random order; the
    results are added up. All tasks go through their orders at once; a row of ``random``, sorted, is the order of one.
    """
    k = len(gram)
    rows = torch.arange(k, device=gram.device)
    combination = torch.eye(k, device=gram.device, dtype=gram.dtype)  # what each projected gradient is made of
    for other in random.argsort(1).unbind(1):
        product = (combination @ gram)[rows, other]
        conflict = (product < 0) & (other != rows)
        step = torch.where(conflict, product / gram[other, other].clamp(min=_TINY), 0.0)
        combination = combination.index_put((rows, other), -step, accumulate=True)
    return combination.sum(0)


def cagrad(gram: Tensor, random: Tensor | None = None) -> Tensor:
    """Conflict-averse gradient descent (Liu et al. 2021, eq. 4): [K, K] -> [K]. It uses no random numbers.

    Of all directions within `CAGRAD_RADIUS` of the mean gradient, relative to its length, the one that maximises the
    smallest improvement of a task. Its dual, over the simplex of the tasks, is minimised by exponentiated gradient
    descent. Scaled to a sum over the tasks: ``K`` times what the paper has. A task without gradient (of zero weight, or
    not practised yet) is left out: its improvement would be the smallest, whatever the direction.
    """
    k = len(gram)
    gram = gram / gram.diagonal().mean().clamp(min=_TINY)  # the combination does not depend on the scale
    with_mean = gram.mean(1)  # products of each gradient with the mean one
    radius = CAGRAD_RADIUS * with_mean.mean().clamp(min=0).sqrt()
    logits = torch.zeros_like(with_mean).masked_fill(gram.diagonal() <= 0, -1e4)  # finite, if there are no others
    for _ in range(CAGRAD_STEPS):
        weights = torch.softmax(logits, 0)
        product = gram @ weights
        slope = with_mean + radius * product / (weights @ product).clamp(min=_TINY).sqrt()
        logits = logits - CAGRAD_RATE * (slope - slope @ weights)
    weights = torch.softmax(logits, 0)
    length = (weights @ gram @ weights).clamp(min=_TINY).sqrt()
    return 1 + k * radius / length * weights


METHODS: dict[str, Coefficients] = {"none": added, "pcgrad": pcgrad, "cagrad": cagrad}


def gram_matrix(gradients: list[Tensor]) -> Tensor:
    """Products of the tasks' gradients with each other, [K, K], over all parameters, [K, ...] each."""
    flat = [gradient.flatten(1) for gradient in gradients]
    return torch.stack([g @ g.T for g in flat]).sum(0)


def cosines_with_others(gram: Tensor) -> Tensor:
    """Cosine of each task's gradient with the sum of all others, [K, K] -> [K]: NaN where one has no length."""
    other = 1 - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    product = (gram * other).sum(1)
    squared = ((other @ gram) * other).sum(1)  # lengths of the sums; not by subtraction, lest small tasks drown
    return product / (gram.diagonal().sqrt() * squared.clamp(min=0).sqrt())


def combine(gradients: list[Tensor], mix: Tensor) -> list[Tensor]:
    """The tasks' gradients [K, ...] of each parameter, combined with the coefficients ``mix`` [K] to [...] each."""
    return [(mix @ gradient.flatten(1)).view(gradient.shape[1:]) for gradient in gradients]
