"""How rows find the head of their task: ways to compute the same, forward and backward, for few and for many tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import progress, seconds_per_call, write_results
from torch import Tensor
from torch.nn.functional import silu

from mtrl_vec.config import Precision, TrainConfig
from mtrl_vec.device import autocast, on_stream, resolve_device, resolve_precision
from mtrl_vec.errors import InputError
from mtrl_vec.policy import TaskHeads
from mtrl_vec.sim import ACTION_SIZE

MEMORY_LIMIT = 4 << 30  # bytes of gathered weights: beyond that a way is not tried


@dataclass(frozen=True)
class Args:
    """Time the task heads, forward and backward, in each way of routing rows to them.

    Example: python benchmarks/routing.py --num-tasks 3 50 --batch-sizes 2048 --json routing.json
    """

    num_tasks: tuple[int, ...] = (3, 10, 50)
    """K."""
    batch_sizes: tuple[int, ...] = (512, 2048, 8192, 65536)
    """Rows."""
    seconds: float = 0.5
    """Time for each measurement."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: Path | None = None
    """Also write the results to this file."""


def gather_weights(heads: TaskHeads, features: Tensor, task_idx: Tensor) -> Tensor:
    """A copy of its head's weights for every row, in one batched product. Only here, for comparison."""
    hidden = torch.baddbmm(heads.bias1[task_idx][:, None], features[:, None], heads.weight1[task_idx])
    with torch.autocast(features.device.type, enabled=False):
        hidden = silu(hidden).float()
        return torch.baddbmm(heads.bias2[task_idx][:, None], hidden, heads.weight2[task_idx]).squeeze(1)


def ways(device: torch.device, precision: Precision) -> dict[str, Callable[[TaskHeads, Tensor, Tensor], Tensor]]:
    found = {"gathered": TaskHeads.gathered, "bmm": gather_weights, "split": TaskHeads.split}
    if precision == "bf16" or device.type == "cpu":  # always bf16
        found["grouped"] = TaskHeads.grouped
    return found


def prepare(
    way: Callable[..., Tensor], name: str, heads: TaskHeads, features: Tensor, task_idx: Tensor, precision: Precision
) -> Callable[[], object]:
    """Forward and backward as training runs them: on a GPU compiled and in a graph, but for what has to wait."""
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
    config, device = TrainConfig(), resolve_device(args.device)
    if min(*args.num_tasks, *args.batch_sizes) < 1:
        raise InputError("num_tasks and batch_sizes must be positive")
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: give a file in an existing folder")
    precision = resolve_precision(device, config.precision)
    rows: list[dict[str, object]] = []
    for num_tasks in args.num_tasks:
        heads = TaskHeads(num_tasks, config.torso[1], config.head, ACTION_SIZE, 1.0).to(device)
        for batch_size in args.batch_sizes:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            features = torch.randn(batch_size, config.torso[1], device=device, dtype=dtype, requires_grad=True)
            task_idx = torch.randint(num_tasks, (batch_size,), device=device)
            for name, way in ways(device, precision).items():
                if name == "bmm" and 4 * batch_size * config.torso[1] * config.head > MEMORY_LIMIT:
                    continue
                torch._dynamo.reset()
                try:
                    call = prepare(way, name, heads, features, task_idx, precision)
                    seconds = seconds_per_call(call, device, args.seconds)
                except torch.cuda.OutOfMemoryError:
                    progress(f"K={num_tasks} rows={batch_size} {name} does not fit into the GPU")
                    continue
                rows.append({"num_tasks": num_tasks, "batch_size": batch_size, "way": name, "seconds": seconds})
                progress(f"K={num_tasks} rows={batch_size} {name} {1e6 * seconds:,.0f} us")
    return rows


def report(rows: list[dict[str, object]]) -> str:
    """Microseconds in Markdown, the best of each line in bold."""
    names = list(dict.fromkeys(str(row["way"]) for row in rows))
    lines = ["| K | rows | " + " | ".join(names) + " |", "|---:|---:|" + "---:|" * len(names)]
    for key in dict.fromkeys((row["num_tasks"], row["batch_size"]) for row in rows):
        found = {str(r["way"]): float(str(r["seconds"])) for r in rows if (r["num_tasks"], r["batch_size"]) == key}
        cells = [f"{1e6 * found[name]:,.0f}" if name in found else "" for name in names]
        best = names.index(min(found, key=lambda name: found[name]))
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {key[0]} | {key[1]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    args = tyro.cli(Args)
    try:
        rows = measure(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(rows))
    write_results(args.json, {"results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
