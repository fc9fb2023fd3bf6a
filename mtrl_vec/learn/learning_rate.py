"""Annealing over a run, and the learning rate that follows the KL divergence."""

from __future__ import annotations

import torch
from torch import Tensor

LR_BOUNDS = (1e-5, 3e-3)
MAX_LR_CHANGE = 1.5
"""Largest factor per iteration."""


def annealed(first: float, final: float, progress: float, start: float = 0.0, end: float = 0.9) -> float:
    """From ``first`` to ``final``, linearly between two points of the run's progress, constant before and after."""
    return first + (final - first) * min(1.0, max(0.0, progress - start) / (end - start))


@torch.no_grad()
def adapt_lr(lr: Tensor, approx_kl: Tensor, target: float) -> None:
    """Move the learning rate, in place, towards the one that gives the target KL divergence.

    Near the old policy the divergence grows with the square of the step, hence the root. (The usual rule, a fixed
    factor outside of a dead band, does the same in larger jumps.)
    """
    change = torch.sqrt(target / approx_kl.clamp(min=1e-8)).clamp(1 / MAX_LR_CHANGE, MAX_LR_CHANGE)
    change = change.nan_to_num(1.0)  # where all steps of the last epoch were skipped
    lr.mul_(change).clamp_(*LR_BOUNDS)
