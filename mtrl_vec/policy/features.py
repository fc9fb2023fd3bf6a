"""What the torso sees of an observation.

Shapes: ``D`` observation size, ``F`` features, ``K`` tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrl_vec.policy.normalization import ObservationNorm
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.tasks.layout import METAWORLD, ObservationLayout


def relative_features(observation: Tensor, layout: ObservationLayout = METAWORLD) -> Tensor:
    """An observation [..., D] as what tasks are about, [..., F]; for Meta-World's layout 39 -> 34.

    The current frame; how each of its entries changed in the last step; the goal; and the differences object - hand,
    goal - object and goal - hand; with a second object (39 -> 54), also second - object and goal - second. All are
    linear in the observation, so a network could work them out by itself. But a grasp is a matter of a centimetre and
    a motion one of millimetres, in positions that vary by decimetres: only once normalised on their own are they large
    enough to learn from early.

    Left out are the previous frame, which the changes replace, and the frame's padding.
    """
    frame, previous = observation[..., layout.frame], observation[..., layout.previous_frame]
    hand, obj, goal = (observation[..., part] for part in (layout.hand, layout.object, layout.goal))
    parts = [frame, frame - previous, goal, obj - hand, goal - obj, goal - hand]
    if layout.second is not None:
        second = observation[..., layout.second]
        parts += [second - obj, goal - second]
    return torch.cat(parts, dim=-1)


class InputFeatures(nn.Module):
    """Observations, relative and normalised as the settings say, then the task one-hot.

    Args:
        layout: of the observations.
        num_tasks: K.
        relative: see `relative_features`; otherwise they stay as they are.
        normalize: by running statistics.
        per_task: of each task; otherwise of all tasks together.
    """

    def __init__(
        self, layout: ObservationLayout, num_tasks: int, *, relative: bool, normalize: bool, per_task: bool
    ) -> None:
        super().__init__()
        self.layout, self.relative, self.normalize, self.per_task = layout, relative, normalize, per_task
        self.size = relative_features(torch.zeros(layout.size), layout).numel() if relative else layout.size
        """F, without the one-hot."""
        self.observation_norm = ObservationNorm(self.size, num_tasks if per_task else 1)

    def update(self, observation: Tensor, task_one_hot: Tensor, ranks: Ranks = ALONE) -> None:
        """Add the observations of all ranks to the running statistics, [..., D] and [..., K]."""
        if self.normalize:
            groups = task_one_hot if self.per_task else torch.ones_like(task_one_hot[..., :1])
            self.observation_norm.update(self._select(observation), groups, ranks)

    def forward(self, observation: Tensor, task_one_hot: Tensor) -> Tensor:
        """[..., D], [..., K] -> [..., F + K]."""
        features = self._select(observation)
        if self.normalize:
            task_idx = task_one_hot.argmax(-1)
            features = self.observation_norm(features, task_idx if self.per_task else torch.zeros_like(task_idx))
        return torch.cat([features, task_one_hot], dim=-1)

    def _select(self, observation: Tensor) -> Tensor:
        return relative_features(observation, self.layout) if self.relative else observation
