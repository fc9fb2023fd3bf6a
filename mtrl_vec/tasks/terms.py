"""Terms that rewards are made of, over rows: distances, tolerances, products, grasps.

They reproduce ``metaworld/utils/reward_utils.py`` and the shared methods of ``SawyerXYZEnv``.

Shapes: ``n`` rows. All lengths in metres.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.tasks.task import Array, Grasp, RewardInputs

_SMALLEST_MARGIN = 1e-150  # its square is still a number
_SMALLEST_TOTAL = 1e-30  # a number in float32 as well
_GAUSSIAN_SCALE = np.sqrt(-2 * np.log(0.1))  # the bell passes through 0.1 at the margin


@cache
def point(x: float, y: float, z: float) -> Array:
    """A constant vector, [3], made once: arrays of this size cost as much as what is computed with them."""
    constant = np.array([x, y, z])
    constant.flags.writeable = False
    return constant


def length(vector: Array) -> Array:
    """Euclidean norm of the rows of an array, [..., d] -> [...]."""
    return np.sqrt(np.vecdot(vector, vector))  # rounds as the norm of a single vector does, unlike norm(axis=-1)


def distance(a: Array, b: Array) -> Array:
    """Euclidean distance between the rows of two arrays, [..., d] -> [...]."""
    return length(a - b)


def tolerance(x: Array, bound: Array | float, margin: Array | float) -> Array:
    """1 up to a bound, falling off as a long tail beyond it, to 0.1 at a distance of ``margin`` from it. [n] -> [n].

    ``reward_utils.tolerance`` with ``sigmoid="long_tail"`` and the bounds ``(0, bound)``, for distances, which are not
    negative. A margin of zero gives 0 beyond the bound (1e-300), and so does a negative one, which Meta-World refuses.
    """
    return _long_tail(x - bound, margin)


def band_tolerance(x: Array, lower: Array | float, upper: Array | float, margin: Array | float) -> Array:
    """The same with two bounds, ``(lower, upper)``."""
    return _long_tail(np.maximum(lower - x, x - upper), margin)


def _long_tail(gap: Array, margin: Array | float) -> Array:
    scaled = np.maximum(gap, 0.0) / np.maximum(margin, _SMALLEST_MARGIN)
    return 1.0 / (9.0 * scaled**2 + 1.0)  # 9 = 1 / 0.1 - 1: the tail passes through 0.1 where scaled is 1


def gaussian_tolerance(x: Array, bound: Array | float, margin: Array | float) -> Array:
    """`tolerance` with a Gaussian tail, ``sigmoid="gaussian"``."""
    scaled = np.maximum(x - bound, 0.0) / np.maximum(margin, _SMALLEST_MARGIN)
    return np.exp(-0.5 * (scaled * _GAUSSIAN_SCALE) ** 2)


def hamacher(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> Any:
    """Hamacher product ``ab / (a + b - ab)``, 0 where both are 0. ``reward_utils.hamacher_product``."""
    product: NDArray[Any] = a * b
    return product / np.maximum(a + b - product, _SMALLEST_TOTAL)


def closing(s: RewardInputs) -> Array:
    """How hard the gripper closes, [n] in [0, 1]."""
    return np.minimum(np.maximum(0.0, s.grip), 1.0)


def log_floor(radius: Array, free: Array | float, slope: Array | float, height: Array | float) -> Array:
    """Height that the hand should keep at a horizontal distance from its target: 0 within ``free``, then a logarithm.

    The funnel of door-open, box-close, bin-picking and pick-out-of-hole, and the hook of assembly.
    """
    return np.where(radius <= free, 0.0, slope * np.log(np.maximum(radius - free, 1e-300)) + height)


def upright(s: RewardInputs, ideal: tuple[float, float, float, float], scale: float) -> Array:
    """1 for an object with the ideal rotation, down to 0. ``_reward_quat`` of the tasks that have one. [n]."""
    return np.maximum(1.0 - distance(s.quat, np.array(ideal)) / scale, 0.0)


def rectangular_prism(point: Array, zero: Array, one: Array) -> Array:
    """0 at corner ``zero`` of a box and 1 at corner ``one``; 1 outside. ``rect_prism_tolerance``. [..., 3] -> [...]."""
    share = (point - zero) / (one - zero)  # of the way from one corner to the other, along each axis
    inside = np.all((share >= 0.0) & (share <= 1.0), axis=-1)
    return np.where(inside, np.prod(share, axis=-1), 1.0)


def pulled_to_hand(s: RewardInputs, reach: Array | float) -> Array:
    """The object's position, with the hand's x where that is within ``reach``: it may be held anywhere along x."""
    obj = s.obj.copy()
    near = np.abs(obj[:, 0] - s.hand[:, 0]) < reach
    obj[:, 0] = np.where(near, s.hand[:, 0], obj[:, 0])
    return obj


# How a grasp's reward depends on how near it is to one.
SPARSE, DENSE, REACHING = 0.0, 1.0, 2.0
_SIDES = np.array([1.0, -1.0])  # of the left and the right pad


def caging(
    radius: float,
    pad: float,
    xz: float,
    *,
    effort: float = 1.0,
    density: float = DENSE,
    reach: float = 1.0,
    signed: bool = False,
) -> Grasp:
    """Reward for having the object between the pads and the gripper closing on it.

    ``SawyerXYZEnv._gripper_caging_reward``, and pick-place's own version of it.

    Args:
        radius: of the object (``obj_radius``).
        pad: how far from the object a pad still counts as caging it (``pad_success_thresh``).
        xz: how far from it the tool centre may be in the xz plane (``xz_thresh``).
        effort: of the gripper that counts as closing (``desired_gripper_effort``).
        density: `SPARSE`, `DENSE` (``high_density``) or `REACHING` (``medium_density``).
        reach: distance at which the object counts as reached, with `REACHING` (``object_reach_radius``).
        signed: measure the pads' distances on their own sides of the object, and margins from where the pads are.
            pick-place means their *initial* positions, but what Meta-World stores are live views of the current ones.
    """
    names = ("radius", "pad", "xz", "effort", "density", "reach", "signed")
    values = (radius, pad, xz, effort, density, reach, float(signed))
    return Grasp(caging_reward, dict(zip(names, values, strict=True)))


def caging_at(grasp: Grasp, *, handle_reach: float = 0.0, offset_x: float = 0.0) -> Grasp:
    """A grasp by a handle: `caging` of another point of the object.

    Args:
        handle_reach: see `pulled_to_hand`.
        offset_x: of what is grasped from the object.
    """
    return Grasp(handle_caging_reward, {**grasp.params, "handle_reach": handle_reach, "offset_x": offset_x})


def caging_reward(s: RewardInputs) -> Array:
    """See `caging`. [n] in [0, 1]."""
    return _caging(s, s.obj)


def handle_caging_reward(s: RewardInputs) -> Array:
    """See `caging_at`. [n] in [0, 1]."""
    handle = pulled_to_hand(s, s.params["handle_reach"])
    handle[:, 0] += s.params["offset_x"]
    return _caging(s, handle)


def _caging(s: RewardInputs, obj: Array) -> Array:
    p = s.params
    pads = np.stack([s.left_pad[:, 1], s.right_pad[:, 1]], axis=1)
    gaps = (pads - obj[:, 1:2]) * _SIDES
    from_start = np.abs(pads - s.init_obj[:, 1:2])  # the margin follows the pads, measured from the object's *start*
    signed, sizes = p["signed"][:, None] > 0, np.abs(gaps)
    pad = p["pad"][:, None]
    margins = np.abs(np.where(signed, sizes, from_start) - pad)
    sides = band_tolerance(np.where(signed, gaps, sizes), p["radius"][:, None], pad, margins)
    caged = hamacher(hamacher(sides[:, 0], sides[:, 1]), _caged_xz(s, obj))
    effort, density = p["effort"], p["density"]
    gripping = np.where(caged > 0.97, np.minimum(np.maximum(0.0, s.grip), effort) / effort, 0.0)
    grasped, near = hamacher(caged, gripping), caged
    if density.max() > DENSE:
        margin = np.abs(distance(s.init_obj, s.init_tcp) - p["reach"])
        near = np.where(density > DENSE, tolerance(distance(obj, s.tcp), p["reach"], margin), caged)
    return np.where(density > SPARSE, (grasped + near) / 2, grasped)


def side_caging(radius: float, grip: float, xz: float) -> Grasp:
    """Reward for having the object between the pads, narrowly: of push-back, soccer, sweep and sweep-into.

    Args:
        radius: of the object.
        grip: how far beyond the object's radius a pad may be to grip it (``grip_success_margin - obj_radius``).
        xz: see `caging`.
    """
    return Grasp(side_caging_reward, {"radius": radius, "grip": grip, "xz": xz})


def side_caging_reward(s: RewardInputs) -> Array:
    """See `side_caging`. [n] in [0, 1]. Margins follow the current pads, as they do in pick-place."""
    p = s.params
    gaps = np.stack([s.obj[:, 1] - s.right_pad[:, 1], s.left_pad[:, 1] - s.obj[:, 1]], axis=1)
    margins = np.abs(np.abs(gaps) - 0.05)
    radius = p["radius"][:, None]
    caged_y = hamacher(*band_tolerance(gaps, radius, 0.05, margins).T)
    gripped_y = hamacher(*band_tolerance(gaps, radius, radius + p["grip"][:, None], margins).T)
    caged = hamacher(caged_y, _caged_xz(s, s.obj))
    return (caged + np.where(caged > 0.95, gripped_y, 0.0)) / 2


def _caged_xz(s: RewardInputs, obj: Array) -> Array:
    xz = s.params["xz"]
    margin = distance(s.init_obj[:, ::2], s.init_tcp[:, ::2]) - xz
    return tolerance(distance(s.tcp[:, ::2], obj[:, ::2]), xz, margin)


def rounded_as_summed(reward: Array, s: RewardInputs, held: NDArray[np.bool_]) -> Array:
    """Rewards [n] in float32 where Meta-World adds several terms up in it, for held objects: see below.

    Each of its sums is rounded, together by up to 1.2e-6. Rounded likewise, ours is one unit in the last place off at
    most, 9.6e-7.
    """
    return np.where(held & in_single_precision(s.grip), reward.astype(np.float32), reward)


def in_single_precision(grip: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where Meta-World goes on in float32: it passes on the action's own float32 if the command is in (0, 1]. [n]."""
    return (grip > 0) & (grip <= 1)
