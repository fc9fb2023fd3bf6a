"""Ways to route rows to the heads of their tasks, forward and backward, for few and for many tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import check_arguments, progress, run_benchmark, seconds_per_call, write_results
from torch import Tensor
from torch.nn.functional import silu

from mtrl_vec.config import PolicyConfig
from mtrl_vec.config.sections import Device, Precision
from mtrl_vec.learn.device import autocast, on_stream, resolve_device
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.routing import TaskHeads
from mtrl_vec.tasks.layout import ACTION_SIZE

MEMORY_LIMIT = 4 << 30
"""Bytes of gathered weights above which ``bmm`` is omitted."""


@dataclass(frozen=True)
class Args:
    """Time the task heads, forward and backward, with each way of routing rows to them.

    On a GPU in bf16, compiled and graphed; on the CPU in fp32, but `grouped` always in bf16.

    Example: python benchmarks/routing.py --num-tasks 3 50 --batch-sizes 2048 --json routing.json
    """

    num_tasks: tuple[int, ...] = (3, 10, 50)
    """Numbers of tasks, K."""
    batch_sizes: tuple[int, ...] = (512, 2048, 8192, 65536)
    """Numbers of rows."""
    seconds: float = 0.5
    """Approximate length of each measurement."""
    head: int = 128
    """Width of the hidden layers of the heads."""
    device: Device = "auto"
    """auto: CUDA when there is one."""
    json: Path | None = None
    """Also write the results to this file."""


def gather_weights(heads: TaskHeads, features: Tensor, task_idx: Tensor) -> Tensor:
    """A copy of the weights of its head for every row, and a batched product. For comparison only."""
    hidden = torch.baddbmm(heads.bias1[task_idx][:, None], features[:, None], heads.weight1[task_idx])
    with torch.autocast(features.device.type, enabled=False):
        hidden = silu(hidden).float()
        return torch.baddbmm(heads.bias2[task_idx][:, None], hidden, heads.weight2[task_idx]).squeeze(1)


WAYS: dict[str, Callable[[TaskHeads, Tensor, Tensor], Tensor]] = {
    "gathered": TaskHeads.gathered,
    "bmm": gather_weights,
    "split": TaskHeads.split,
    "grouped": TaskHeads.grouped,
}


def prepare(
    way: Callable[..., Tensor], name: str, heads: TaskHeads, features: Tensor, task_idx: Tensor, precision: Precision
) -> Callable[[], object]:
    """Forward and backward as in training: on a GPU compiled and graphed, except `split`, which waits for it."""
    device = features.device

    def loss() -> Tensor:
        with autocast(device, precision):
            return way(heads, features, task_idx).square().mean()

    run = torch.compile(loss, fullgraph=True) if device.type == "cuda" and name != "split" else loss

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), [features, *heads.parameters()])

    if run is loss:
        return call
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with on_stream(stream):
        call(), call()
        with torch.cuda.graph(graph, stream=stream):
            call()
    torch.cuda.synchronize()
    return graph.replay


def measure(args: Args) -> list[dict[str, object]]:
    """A row per number of tasks, batch size and way."""
    smallest = {"num_tasks": min(args.num_tasks, default=None), "batch_sizes": min(args.batch_sizes, default=None)}
    check_arguments(args.json, head=args.head, **smallest)
    device, head = resolve_device(args.device), args.head
    width = SharedPolicy.for_tasks(PolicyConfig(), ["MT10"]).torso.module.out_features
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows: list[dict[str, object]] = []
    for num_tasks in args.num_tasks:
        heads = TaskHeads(num_tasks, width, head, ACTION_SIZE, 1.0).to(device)
        for batch_size in args.batch_sizes:
            features = torch.randn(batch_size, width, device=device, dtype=dtype, requires_grad=True)
            task_idx = torch.randint(num_tasks, (batch_size,), device=device)
            for name, way in WAYS.items():
                if name == "bmm" and 4 * batch_size * width * head > MEMORY_LIMIT:
                    continue
                torch._dynamo.reset()
                try:
                    call = prepare(way, name, heads, features, task_idx, precision)
                    seconds = seconds_per_call(call, device, args.seconds)
                except torch.cuda.OutOfMemoryError:
                    progress(f"K={num_tasks} rows={batch_size} {name}: out of GPU memory")
                    continue
                rows.append({"num_tasks": num_tasks, "batch_size": batch_size, "way": name, "seconds": seconds})
                progress(f"K={num_tasks} rows={batch_size} {name} {1e6 * seconds:,.0f} us")
    return rows


def report(rows: list[dict[str, object]]) -> str:
    """A Markdown table of microseconds, the best of each line in bold."""
    names = list(dict.fromkeys(str(row["way"]) for row in rows))
    lines = ["| K | rows | " + " | ".join(names) + " |", "|---:|---:|" + "---:|" * len(names)]
    for key in dict.fromkeys((row["num_tasks"], row["batch_size"]) for row in rows):
        found = {str(r["way"]): float(str(r["seconds"])) for r in rows if (r["num_tasks"], r["batch_size"]) == key}
        cells = [f"{1e6 * found[name]:,.0f}" if name in found else "" for name in names]
        best = names.index(min(found, key=lambda name: found[name]))
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {key[0]} | {key[1]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def benchmark(args: Args) -> None:
    """Measure, report, and write the results."""
    rows = measure(args)
    print(report(rows))
    write_results(args.json, {"results": rows})


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
