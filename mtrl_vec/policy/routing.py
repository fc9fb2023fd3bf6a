"""Task heads in stacked weights, and routing each row to the head of its task.

Shapes: ``B`` rows, ``K`` tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MANY_TASKS = 8
"""From this number of tasks on, a GPU sorts rows by task instead of computing all heads for all rows."""
GROUPING = (9, 10)
"""Major compute capabilities of GPUs whose grouped products read the sizes on the device. On others PyTorch copies them
to the CPU first, which waits, and cannot be part of a CUDA graph."""


class TaskHeads(nn.Module):
    """``K`` two-layer perceptrons in stacked weights ``[K, in, out]``; every row gets the output of its own task's.

    There are several ways to the same result, which ``benchmarks/routing.py`` compares; `forward` takes the fastest one
    for the device and precision (on a GPU: estimated, not yet measured). In all of them a row gives the other tasks'
    heads exactly zero gradient.
    """

    def __init__(self, num_tasks: int, in_features: int, hidden: int, out_features: int, out_gain: float) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(num_tasks, in_features, hidden))
        self.bias1 = nn.Parameter(torch.zeros(num_tasks, hidden))
        self.weight2 = nn.Parameter(torch.empty(num_tasks, hidden, out_features))
        self.bias2 = nn.Parameter(torch.zeros(num_tasks, out_features))
        aligned = in_features % 8 == 0 and hidden % 8 == 0  # rows of 16 bytes, as grouped products want them
        self._sort_on_gpu = num_tasks >= MANY_TASKS and aligned
        for k in range(num_tasks):
            nn.init.orthogonal_(self.weight1[k], math.sqrt(2))
            nn.init.orthogonal_(self.weight2[k], out_gain)

    def forward(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """features [B, in], task_idx [B] -> [B, out]."""
        if features.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.split(features, task_idx)
        in_bf16 = features.device.type == "cuda" and features.dtype == torch.bfloat16
        if in_bf16 and self._sort_on_gpu and torch.cuda.get_device_properties(features.device).major in GROUPING:
            return self.grouped(features, task_idx)
        return self.gathered(features, task_idx)

    def split(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """Rows sorted by task, each head on its own; to learn the sizes one would have to wait for a GPU."""
        counts = torch.bincount(task_idx, minlength=len(self.weight1)).tolist()
        if bool((task_idx[1:] >= task_idx[:-1]).all()):  # as minibatches are
            return self._of_sorted(features, counts)
        order = torch.argsort(task_idx)
        return self._of_sorted(features.index_select(0, order), counts).index_select(0, torch.argsort(order))

    def _of_sorted(self, features: Tensor, counts: list[int]) -> Tensor:
        hidden = nn.functional.silu(split_linear(features, self.weight1, self.bias1, counts))
        return self._output(hidden, split_linear, counts)

    def gathered(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """All heads on all rows, of which each row gathers its own."""
        hidden = nn.functional.silu(gathered_linear(features, self.weight1, self.bias1, task_idx))
        return self._output(hidden, gathered_linear, task_idx)

    def grouped(self, features: Tensor, task_idx: Tensor) -> Tensor:
        """Rows sorted by task, all heads in one grouped product, which takes the sizes from the device: in bf16."""
        order = torch.argsort(task_idx)
        sorted_idx = task_idx.index_select(0, order)
        tasks = torch.arange(len(self.weight1), device=task_idx.device)
        ends = torch.searchsorted(sorted_idx, tasks, right=True).int()
        rows, weight = features.index_select(0, order).bfloat16(), self.weight1.bfloat16()
        product = nn.functional.grouped_mm(rows, weight, offs=ends)
        # The bias is rounded after it is gathered: its gradient is then added up in fp32.
        hidden = nn.functional.silu(product + rows_of(self.bias1, sorted_idx).bfloat16())
        return self._output(hidden, gathered_linear, sorted_idx).index_select(0, torch.argsort(order))

    def _output(self, hidden: Tensor, linear: Callable[..., Tensor], rows: Tensor | list[int]) -> Tensor:
        # In fp32 also under autocast: bf16 would round a value of 10 to the next 1/16.
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float(), self.weight2, self.bias2, rows)


def split_linear(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
    """The first ``counts[0]`` rows times ``weight[0]``, the next ``counts[1]`` times ``weight[1]``, and so on.

    Shapes: [B, in], [K, in, out], [K, out] -> [B, out].
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return SplitLinear.apply(x, weight, bias, counts)


class SplitLinear(torch.autograd.Function):
    """`split_linear` with every product written to its place: autograd would keep, join and add up many small parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        """See `split_linear`."""
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(len(x), weight.shape[-1])
        for rows, w, b, product in zip(x.split(counts), weight, bias, out.split(counts), strict=True):
            torch.addmm(b, rows, w, out=product)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Gradients of everything but the counts."""
        x, weight = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = torch.empty_like(weight), weight.new_empty(len(weight), weight.shape[-1])
        of_rows = [None] * len(weight) if of_x is None else of_x.split(ctx.counts)
        parts = zip(x.split(ctx.counts), weight, grad.split(ctx.counts), of_rows, of_weight, of_bias, strict=True)
        for rows, w, of_product, of_row, of_w, of_b in parts:
            if of_row is not None:
                torch.mm(of_product, w.t(), out=of_row)
            torch.mm(rows.t(), of_product, out=of_w)
            torch.sum(of_product, 0, out=of_b)
        return of_x, of_weight, of_bias, None


def gathered_linear(x: Tensor, weight: Tensor, bias: Tensor, task_idx: Tensor) -> Tensor:
    """``x[b] @ weight[task_idx[b]] + bias[task_idx[b]]`` for every row ``b``: a wide product, then its own part.

    Shapes: [B, in], [K, in, out], [K, out], [B] -> [B, out].
    """
    k, _, out = weight.shape
    everything = torch.addmm(bias.flatten(), x, weight.transpose(0, 1).flatten(1))
    return own_row(everything.view(-1, k, out), task_idx)


def own_row(rows: Tensor, task_idx: Tensor) -> Tensor:
    """``rows[b, task_idx[b]]`` for every ``b``, [B, K, out], [B] -> [B, out].

    A sum over a mask, whose gradient is a mask as well. That of a gather would be added up with atomic operations on a
    GPU, in another order each time.
    """
    own = torch.arange(rows.shape[1], device=rows.device) == task_idx[:, None]
    return torch.where(own[..., None], rows, 0.0).sum(1)


def rows_of(table: Tensor, task_idx: Tensor) -> Tensor:
    """``table[task_idx]``, [K, out], [B] -> [B, out], float32 also under autocast.

    On a GPU as a product with one-hots, whose gradient is a product, too. That of an index would be added up with
    atomic operations: slow where few places get many rows, and in another order each time.
    """
    if table.device.type == "cpu" and not torch.compiler.is_compiling():
        return table.index_select(0, task_idx)
    one_hot = task_idx[:, None] == torch.arange(len(table), device=table.device)
    with torch.autocast(table.device.type, enabled=False):
        return one_hot.to(table.dtype) @ table
