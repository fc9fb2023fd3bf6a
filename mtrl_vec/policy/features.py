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
    """What the policy sees of an observation: relative features if wanted, normalised.

    The torso sees them normalised over all tasks together, and the task one-hot. The heads can see them as well,
    normalised over their own task, besides what the torso makes of them. One task varies far less than fifty, whose
    objects are all over the table: normalised over all, the centimetres that decide about its success hardly show, and
    the torso has fifty tasks to serve. But a torso that saw each task in units of its own would be slower to learn what
    they share.

    Args:
        layout: of the observations.
        num_tasks: K.
        relative: see `relative_features`; otherwise they stay as they are.
        normalize: by running statistics.
        direct: the heads see them.
    """

    def __init__(
        self, layout: ObservationLayout, num_tasks: int, *, relative: bool, normalize: bool, direct: bool
    ) -> None:
        super().__init__()
        self.layout, self.relative, self.normalize, self.direct = layout, relative, normalize, direct
        self.size = relative_features(torch.zeros(layout.size), layout).numel() if relative else layout.size
        """F, without the one-hot."""
        self.own_size = self.size + -self.size % 8 if direct else 0
        """E: F and zeros to a multiple of 8, as products of matrices on a GPU want it."""
        self.observation_norm = ObservationNorm(self.size)
        if direct:
            self.own_norm = ObservationNorm(self.size, num_tasks)

    def update(self, observation: Tensor, task_one_hot: Tensor, ranks: Ranks = ALONE) -> None:
        """Add the observations of all ranks to the running statistics, [..., D] and [..., K]."""
        if self.normalize:
            features = self._select(observation)
            self.observation_norm.update(features, ranks=ranks)
            if self.direct:
                self.own_norm.update(features, task_one_hot, ranks)

    def forward(self, observation: Tensor, task_one_hot: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D], [..., K] -> what the torso sees, [..., F + K], and what the heads see, [..., E]."""
        features = self._select(observation)
        shared = self.observation_norm(features) if self.normalize else features
        if not self.direct:
            own = features[..., :0]
        else:
            own = self.own_norm(features, task_one_hot.argmax(-1)) if self.normalize else features
            own = nn.functional.pad(own, (0, self.own_size - self.size))
        return torch.cat([shared, task_one_hot], dim=-1), own

    def _select(self, observation: Tensor) -> Tensor:
        return relative_features(observation, self.layout) if self.relative else observation
