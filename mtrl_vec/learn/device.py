"""What depends on the device that the policy lives on: precision, pinned copies, and CUDA graphs."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from mtrl_vec.config.sections import Precision
from mtrl_vec.errors import InputError, first_line


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA when there is one. Raises InputError when CUDA is requested but missing."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError("device is cuda: PyTorch finds no CUDA device here; use --device cpu, or auto")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    """For forward passes and losses. Weights, their gradients and the optimiser stay in fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    # No cache of converted weights: a graph that is captured with one would read it for ever.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all its queued work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Queue work on a stream of its own, after everything queued before and before everything that follows.

    None, as on the CPU, changes nothing.
    """
    if stream is None:
        yield
        return
    outside = torch.cuda.current_stream()
    stream.wait_stream(outside)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outside.wait_stream(stream)


class DeviceCopy:
    """Copies of host data on the GPU: always in the same place, and without waiting.

    What is not in pinned memory is copied there first. The caller has to make sure that a copy has arrived before it
    changes the data, and before the next copy starts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staged: dict[NestedKey, Tensor] = {}
        self._data: TensorDictBase | None = None

    def __call__(self, data: TensorDictBase) -> TensorDictBase:
        """The copy of ``data``, which has the same keys and shapes every time. Other keys may be added to it."""
        if self._data is None:
            self._data = data.to(self._device)
        for key in data.keys(include_nested=True, leaves_only=True):
            self._data[key].copy_(self._pinned(key, data[key]), non_blocking=True)
        return self._data.clone(recurse=False)

    def _pinned(self, key: NestedKey, source: Tensor) -> Tensor:
        if source.is_pinned():
            return source
        if key not in self._staged:
            self._staged[key] = torch.empty_like(source, pin_memory=True)
        return self._staged[key].copy_(source)


class GraphedCall:
    """Calls a function of no arguments: as it is for a while, then as one CUDA graph.

    The function works on tensors that stay where they are. The first ``warmup`` calls run it eagerly, in which
    compilers, libraries and the optimiser set up what they need; they count like all others. Where it cannot be
    captured, calls go on as they are, after a warning.

    Args:
        function: what to call, always on the same stream, not the default one; it must not wait for the device.
        warmup: calls before the one that is captured, at least 1.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "Whole-network capture".
    """

    def __init__(self, function: Callable[[], Tensor], warmup: int) -> None:
        self._function, self._eager_calls_left = function, warmup
        self.graph: torch.cuda.CUDAGraph | None = None
        """What was captured, if anything yet."""
        self._output: Tensor | None = None

    def __call__(self) -> Tensor:
        """What the function returns. Once captured it is always the same tensor, with new values."""
        if self._eager_calls_left:
            self._eager_calls_left -= 1
            return self._function()
        if self.graph is None:
            graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # other threads may go on using the GPU meanwhile
            try:
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode=mode):
                    self._output = self._function()
            except RuntimeError as error:
                warnings.warn(f"continuing without CUDA graphs: capture failed ({first_line(error)})", stacklevel=2)
                self._eager_calls_left = sys.maxsize
                return self._function()
            self.graph = graph
        self.graph.replay()
        assert self._output is not None
        return self._output
