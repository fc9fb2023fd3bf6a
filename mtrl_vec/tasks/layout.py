"""What the entries of an observation are. Policies get their sizes and features from here, not from a simulator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtrl_vec.tasks.task import Task

FRAME_SIZE = 18
"""Entries of a frame: hand [3], gripper opening, then position [3] and quaternion [4] of up to two objects."""
OBSERVATION_SIZE = 39
"""A frame, the frame before and the goal [3]. Source: ``SawyerXYZEnv._get_obs``."""
ACTION_SIZE = 4
"""Hand velocity [3] and gripper effort, in [-1, 1]."""


@dataclass(frozen=True)
class ObservationLayout:
    """Sizes and positions of the entries of an observation ``[..., D]``. Positions and lengths in metres."""

    size: int
    """D."""
    frame: slice
    """The current frame, without its padding: hand, gripper opening, position and rotation of the objects."""
    previous_frame: slice
    """The same entries one step earlier."""
    hand: slice
    """Hand position, [3]."""
    object: slice
    """Object position, [3]."""
    goal: slice
    """Goal position, [3]."""
    second: slice | None = None
    """Position of a second object, [3], if a task has one."""


METAWORLD = ObservationLayout(
    size=OBSERVATION_SIZE,
    frame=slice(0, 11),
    previous_frame=slice(FRAME_SIZE, FRAME_SIZE + 11),
    hand=slice(0, 3),
    object=slice(4, 7),
    goal=slice(36, 39),
)
"""With one object, as in most tasks."""
METAWORLD_TWO_OBJECTS = replace(
    METAWORLD,
    frame=slice(0, FRAME_SIZE),
    previous_frame=slice(FRAME_SIZE, 2 * FRAME_SIZE),
    second=slice(11, 14),
)
"""With the second object of hammer, stick-push and stick-pull."""


def layout_of(tasks: Iterable[Task]) -> ObservationLayout:
    """The layout of a policy for these tasks: without entries that are padding in all of them."""
    return METAWORLD if all(task.second is None for task in tasks) else METAWORLD_TWO_OBJECTS
