"""What the entries of an observation are. Policies get their sizes and features from here, not from a simulator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObservationLayout:
    """Sizes and positions of the entries of an observation ``[..., D]``. Positions and lengths in metres."""

    size: int
    """D."""
    frame: slice
    """The current frame, without its padding: hand, gripper opening, object position and rotation."""
    previous_frame: slice
    """The same entries one step earlier."""
    hand: slice
    """Hand position, [3]."""
    object: slice
    """Object position, [3]."""
    goal: slice
    """Goal position, [3]."""


METAWORLD = ObservationLayout(
    size=39,
    frame=slice(0, 11),
    previous_frame=slice(18, 29),
    hand=slice(0, 3),
    object=slice(4, 7),
    goal=slice(36, 39),
)
"""Source: ``SawyerXYZEnv._get_obs``: a frame of 18 entries, the frame before, and the goal."""

FRAME_SIZE = 18
"""Entries of a frame with its padding: hand [3], gripper opening, object position [3], quaternion [4], zeros [7]."""
ACTION_SIZE = 4
"""Hand velocity [3] and gripper effort, in [-1, 1]."""
