"""Quaternions of rotation matrices, with the bits of SciPy's `Rotation`, which Meta-World uses, in a tenth of the time.

SciPy checks each matrix on its own; MuJoCo's are rotations already.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The components of a quaternion before it is normalised, by which of x, y, z, w is the largest: positions in the list
# of `quaternions`. Source: Markley, "Unit quaternion from rotation matrix", J. Guid. Control Dyn. 31(2), 2008.
_BY_LARGEST = np.array([[0, 4, 5, 7], [4, 1, 6, 8], [5, 6, 2, 9], [7, 8, 9, 3]])


def quaternions(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit quaternions ``xyzw`` of rotation matrices, [n, 3, 3] -> [n, 4]."""
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = np.ascontiguousarray(matrices.transpose(1, 2, 0))
    trace = m00 + m11 + m22
    largest = np.argmax([m00, m11, m22, trace], axis=0)
    rest = 1 - trace
    squares = [rest + 2 * m00, rest + 2 * m11, rest + 2 * m22, 1 + trace]
    components = np.array([*squares, m10 + m01, m20 + m02, m21 + m12, m21 - m12, m02 - m20, m10 - m01])
    quats = components[_BY_LARGEST[largest], np.arange(len(matrices))[:, None]]
    x, y, z, w = quats.T
    quats /= np.sqrt(x * x + y * y + z * z + w * w)[:, None]
    return quats
