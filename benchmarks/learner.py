"""How fast the learner is by itself: updates and inference, eager, compiled and graphed, in fp32 and bf16.

Everything that is timed is what training runs, on random data: `PPO.update` and `ActingPolicy`. All variants of a size
take turns. The plain matrix products of the same shapes, without anything between them, are the ceiling.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from common import progress, seconds_per_call, write_results
from tensordict import TensorDict
from torch.nn.functional import one_hot

from mtrl_vec.acting import ActingPolicy
from mtrl_vec.config import TrainConfig
from mtrl_vec.device import on_stream, resolve_device
from mtrl_vec.errors import InputError
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.ppo import PPO
from mtrl_vec.profiling import flops_per_sample, matmul_flops_per_second
from mtrl_vec.sim import ACTION_SIZE, OBSERVATION_SIZE
from mtrl_vec.timing import Timer

STEPS = 32  # per environment
UPDATE = {"num_epochs": 2, "num_minibatches": 4}  # eight optimiser steps

VARIANTS: dict[str, dict[str, Any]] = {
    f"{how}_{precision}": {**settings, "precision": precision}
    for how, settings in {
        "eager": {"compile": "off", "cuda_graphs": False},
        "graphed": {"compile": "off", "cuda_graphs": True},
        "compiled": {"compile": "on", "cuda_graphs": False},
        "compiled_graphed": {"compile": "on", "cuda_graphs": True},
    }.items()
    for precision in ("fp32", "bf16")
}


@dataclass(frozen=True)
class Args:
    """Time the learner on random data: no simulators take part.

    Example: python benchmarks/learner.py --minibatch-sizes 1920 7680 --json learner.json
    """

    minibatch_sizes: tuple[int, ...] | None = None
    """Frames per optimiser step, multiples of 24. By default 1,920 and more on a GPU than on a CPU."""
    num_envs: tuple[int, ...] = (360, 1440)
    """Rows of one inference step."""
    variants: tuple[str, ...] | None = None
    """Of the ways to run it. By default all that the device has; compiling takes a minute each."""
    rounds: int = 5
    """Turns of each variant."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: Path | None = None
    """Also write the results to this file."""


def random_rollout(policy: SharedPolicy, num_envs: int) -> TensorDict:
    """What a collector would bring, on the CPU, [B, T]."""
    shape, k = (num_envs, STEPS), policy.num_tasks
    task_idx = (torch.arange(num_envs) % k)[:, None].expand(shape).contiguous()
    false = torch.zeros(*shape, 1, dtype=torch.bool)
    after = {"observation": torch.randn(*shape, OBSERVATION_SIZE), "reward": torch.rand(*shape, 1), "success": false}
    return TensorDict(
        {
            "observation": torch.randn(*shape, OBSERVATION_SIZE),
            "task_idx": task_idx,
            "task_one_hot": one_hot(task_idx, k).float(),
            "action": torch.randn(*shape, ACTION_SIZE),
            "action_log_prob": torch.full(shape, -5.0),
            "next": after | {"done": false.clone(), "terminated": false.clone()},
        },
        shape,
    )


def update_call(config: TrainConfig, device: torch.device) -> Callable[[], object]:
    """One whole update on data that is on the device already."""
    torch.manual_seed(0)
    policy = SharedPolicy(config).to(device)
    ppo = PPO(config, policy)
    ppo.last_step = ppo.step  # of few steps here the one that goes by task would be a large part
    data = random_rollout(policy, config.num_envs).to(device)
    ppo.add_advantages(data)

    def call() -> None:
        with on_stream(ppo.stream):
            ppo.update(data)

    return call


def inference_call(config: TrainConfig, num_envs: int, device: torch.device) -> Callable[[], object]:
    """From observations on the CPU to actions on the CPU."""
    acting = ActingPolicy(SharedPolicy(config).to(device), config, Timer())
    state = random_rollout(acting.previous, num_envs)[:, 0].select(*acting.in_keys)
    return lambda: acting(state)


def products_call(config: TrainConfig, device: torch.device) -> Callable[[], object]:
    """The matrix products of one optimiser step, forward and backward, and nothing else."""
    rows, k = config.minibatch_size, len(config.tasks)
    first, second = config.torso
    inputs = SharedPolicy(config).torso.module.layers[0].in_features
    layers = [(1, rows, inputs, first), (1, rows, first, second)]
    for outputs in (ACTION_SIZE, 1):
        layers += [(k, rows // k, second, config.head), (k, rows // k, config.head, outputs)]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    tensors = [
        (torch.randn(g, n, i, device=device), torch.randn(g, i, o, device=device), torch.randn(g, n, o, device=device))
        for g, n, i, o in layers
    ]
    tensors = [tuple(t.to(dtype) for t in triple) for triple in tensors]

    def call() -> None:
        for layer, (x, w, y) in enumerate(tensors):
            x @ w
            x.mT @ y
            if layer:  # the observations need no gradient
                y @ w.mT

    if device.type == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()  # else a GPU would spend its time being told of small ones
    call()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(args: Args) -> dict[str, float]:
    device = resolve_device(args.device)
    on_gpu = device.type == "cuda"
    if args.rounds < 1:
        raise InputError(f"rounds is {args.rounds}: it must be positive")
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: give a file in an existing folder")
    names = args.variants or tuple(name for name in VARIANTS if on_gpu or "graphed" not in name)
    for name in names:
        if name not in VARIANTS or ("graphed" in name and not on_gpu):
            there_are = ", ".join(n for n in VARIANTS if on_gpu or "graphed" not in n)
            raise InputError(f"no variant {name!r} on {device}: there are {there_are}")
    sizes = args.minibatch_sizes or ((1920, 7680, 30720, 122880) if on_gpu else (1920, 7680))
    for size in sizes:
        if size < 24 or size % 24:
            raise InputError(f"minibatch size {size}: it must be a positive multiple of 24")
    results: dict[str, float] = {}

    def take_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                seconds[name].append(seconds_per_call(call, device, 0.3))
        return {name: median(rounds) for name, rounds in seconds.items()}

    base = dataclasses.replace(TrainConfig(), **UPDATE, num_steps=STEPS)
    for precision in ("fp32", "bf16"):
        config = dataclasses.replace(base, precision=precision)
        results[f"matmul_flops_per_second/{precision}"] = matmul_flops_per_second(config, device)
    for size in sizes:
        progress(f"updates of {size:,} frames a step: {', '.join(names)}")
        torch._dynamo.reset()  # else every size adds to what it counts as recompilations, until it refuses
        at_size = dataclasses.replace(base, num_envs=size * UPDATE["num_minibatches"] // STEPS)
        configs = {name: dataclasses.replace(at_size, **VARIANTS[name]) for name in names}
        updates = {name: update_call(config, device) for name, config in configs.items()}
        for call in updates.values():
            call(), call()  # compile, and capture
        products = {
            f"products_{precision}": products_call(dataclasses.replace(at_size, precision=precision), device)
            for precision in ("fp32", "bf16")
        }
        for name, seconds in take_turns(updates | products).items():
            samples = size if name in products else size * UPDATE["num_epochs"] * UPDATE["num_minibatches"]
            results[f"update_samples_per_second/{size}/{name}"] = samples / seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as training collects
    for rows in args.num_envs:
        acting = [name for name in names if "graphed" not in name and (on_gpu or "eager" in name)]
        progress(f"inference for {rows} rows: {', '.join(acting)}")
        torch._dynamo.reset()
        calls = {}
        for name in acting:
            config = dataclasses.replace(base, num_envs=rows, **VARIANTS[name])
            calls[name] = inference_call(config, rows, device)
        for name, seconds in take_turns(calls).items():
            results[f"inference_seconds/{rows}/{name}"] = seconds
    torch.set_num_threads(threads)
    results["flops_per_sample"] = flops_per_sample(base)
    return results


def report(results: dict[str, float]) -> str:
    """Tables in Markdown: updates by minibatch size, then inference."""
    keys = [name.split("/") for name in results]
    sizes = list(dict.fromkeys(key[1] for key in keys if key[0] == "update_samples_per_second"))
    variants = list(dict.fromkeys(key[2] for key in keys if key[0] == "update_samples_per_second"))
    variants = [variant for variant in variants if not variant.startswith("products")]
    lines = ["| update, samples/s | " + " | ".join(f"{int(s):,} a step" for s in sizes) + " |"]
    lines += ["|---|" + "---:|" * len(sizes)]
    for variant in variants:
        cells = []
        for size in sizes:
            rate = results[f"update_samples_per_second/{size}/{variant}"]
            first = results[f"update_samples_per_second/{size}/{variants[0]}"]
            products = results[f"update_samples_per_second/{size}/products_{variant[-4:]}"]
            mfu = rate * results["flops_per_sample"] / results[f"matmul_flops_per_second/{variant[-4:]}"]
            cells.append(f"{rate:,.0f} ({rate / first:.2f} x; {rate / products:.0%} of products; MFU {mfu:.1%})")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    rows = list(dict.fromkeys(key[1] for key in keys if key[0] == "inference_seconds"))
    lines += ["", "| inference, ms | " + " | ".join(f"{int(r):,} rows" for r in rows) + " |"]
    lines += ["|---|" + "---:|" * len(rows)]
    for variant in dict.fromkeys(key[2] for key in keys if key[0] == "inference_seconds"):
        cells = [f"{1e3 * results[f'inference_seconds/{r}/{variant}']:.2f}" for r in rows]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    args = tyro.cli(Args)
    try:
        results = measure(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in results.items():
        print(name, f"{value:.6g}")
    print("\n" + report(results))
    write_results(args.json, dict(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
