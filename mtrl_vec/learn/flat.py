"""Tensors in one piece of memory: what the ranks add up in one message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FlatCopy:
    """A copy of some tensors, one after the other, in memory that stays the same: for one message, and CUDA graphs.

    Args:
        needed: there is somebody to send it to; otherwise nothing is copied.

    Attributes:
        parts: views of the copy, of the tensors' shapes; if it is not needed the tensors themselves.
    """

    def __init__(self, needed: bool) -> None:
        self._needed, self._flat = needed, torch.empty(0)
        self.parts: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copy the tensors, which have the same shapes every time. Returns all of it as one vector, or an empty one."""
        if not self._needed:
            self.parts = tuple(tensors)
        elif not self.parts:
            self._flat = torch.cat([tensor.flatten() for tensor in tensors])
            parts = self._flat.split([tensor.numel() for tensor in tensors])
            self.parts = tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))
        else:
            for part, tensor in zip(self.parts, tensors, strict=True):
                part.copy_(tensor)
        return self._flat
