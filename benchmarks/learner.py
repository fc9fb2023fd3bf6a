"""How fast the learner is in isolation: updates and inference, eager, compiled and graphed, in fp32 and bf16.

It times the code that training runs, `PPO.update` and `ActingPolicy`, on random data. All variants of a size run in
turn. Plain matrix products of the same shapes show what is attainable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from common import check_arguments, progress, run_benchmark, seconds_per_call, write_results
from tensordict import TensorDict
from torch.nn.functional import one_hot

from mtrl_vec.commands.profile import flops_per_sample, matmul_flops_per_second
from mtrl_vec.config import TrainConfig
from mtrl_vec.config.sections import Device
from mtrl_vec.errors import InputError
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.learn.device import on_stream, resolve_device
from mtrl_vec.learn.ppo import PPO
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.tasks.layout import ACTION_SIZE, METAWORLD
from mtrl_vec.timing import Timer

UPDATE = {"num_steps": 32, "num_epochs": 2, "num_minibatches": 4}
"""Settings of an update: eight optimiser steps."""

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
    """Time the learner on random data, without simulators.

    Example: python benchmarks/learner.py --minibatch-sizes 1920 7680 --json learner.json
    """

    minibatch_sizes: tuple[int, ...] | None = None
    """Frames per optimiser step, multiples of 24. By default 1,920 and 7,680, and on a GPU also larger ones."""
    num_envs: tuple[int, ...] = (360, 1440)
    """Environments of an inference step."""
    variants: tuple[str, ...] | None = None
    """Variants of the update. By default all that run on the device; compiling takes a minute each."""
    rounds: int = 5
    """Measurements of each variant, in turn."""
    device: Device = "auto"
    """auto: CUDA when there is one."""
    json: Path | None = None
    """Also write the results to this file."""


def make_policy(config: TrainConfig, device: torch.device) -> SharedPolicy:
    return SharedPolicy.for_tasks(config.policy, config.tasks).to(device)


def random_rollout(config: TrainConfig) -> TensorDict:
    """A rollout [B, T] on the CPU, in the collector's layout."""
    shape, k = (config.num_envs, config.learner.num_steps), config.num_tasks
    task_idx = (torch.arange(shape[0]) % k)[:, None].expand(shape).contiguous()
    false = torch.zeros(*shape, 1, dtype=torch.bool)
    after = {"observation": torch.randn(*shape, METAWORLD.size), "reward": torch.rand(*shape, 1), "success": false}
    return TensorDict(
        {
            "observation": torch.randn(*shape, METAWORLD.size),
            "task_idx": task_idx,
            "task_one_hot": one_hot(task_idx, k).float(),
            "action": torch.randn(*shape, ACTION_SIZE),
            "action_log_prob": torch.full(shape, -5.0),
            "next": after | {"done": false.clone(), "terminated": false.clone()},
        },
        shape,
    )


def update_call(config: TrainConfig, device: torch.device) -> Callable[[], object]:
    """A whole update, on data that is on the device already."""
    torch.manual_seed(0)
    ppo = PPO(config, make_policy(config, device))
    data = random_rollout(config).to(device)
    ppo.add_advantages(data)

    def call() -> None:
        with on_stream(ppo.stream):
            ppo.update(data)

    return call


def inference_call(config: TrainConfig, device: torch.device) -> Callable[[], object]:
    """From observations on the CPU to actions on the CPU."""
    acting = ActingPolicy(make_policy(config, device), config, Timer())
    state = random_rollout(config)[:, 0].select(*acting.in_keys)
    return lambda: acting(state)


def products_call(config: TrainConfig, device: torch.device) -> Callable[[], object]:
    """Nothing but the matrix products of an optimiser step, forward and backward."""
    rows, k = config.minibatch_size, config.num_tasks
    (first, second), head = config.policy.torso, config.policy.head_width(k)
    torso = make_policy(config, device).torso.module
    layers = [(1, rows, torso.layers[0].in_features, first), (1, rows, first, second)]
    for outputs in (ACTION_SIZE, 1):
        layers += [(k, rows // k, torso.out_features, head), (k, rows // k, head, outputs)]
    dtype = torch.bfloat16 if config.runtime.precision == "bf16" else torch.float32
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
    graph = torch.cuda.CUDAGraph()  # otherwise launching the small products takes longer than computing them
    call()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(args: Args) -> dict[str, float]:
    """Samples per second of updates by size and variant, and seconds of inference by rows and variant."""
    device = resolve_device(args.device)
    on_gpu = device.type == "cuda"
    check_arguments(args.json, rounds=args.rounds, num_envs=min(args.num_envs, default=None))
    available = [name for name in VARIANTS if on_gpu or "graphed" not in name]
    names = args.variants or tuple(available)
    for name in names:
        if name not in available:
            raise InputError(f"no variant {name!r} on {device}: there are {', '.join(available)}")
    sizes = args.minibatch_sizes or ((1920, 7680, 30720, 122880) if on_gpu else (1920, 7680))
    for size in sizes:
        if size < 24 or size % 24:
            raise InputError(f"minibatch size {size}: it must be a positive multiple of 24")

    results: dict[str, float] = {}
    base = TrainConfig.of(**UPDATE)
    for precision in precisions(names):
        peak = matmul_flops_per_second(base.replace(precision=precision), device)
        results[f"matmul_flops_per_second/{precision}"] = peak
    for size in sizes:
        progress(f"updates with {size:,} frames per step: {', '.join(names)}")
        results |= measure_updates(base, size, names, args.rounds, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in collection
    for num_envs in args.num_envs:
        acting = [name for name in names if "graphed" not in name and (on_gpu or "eager" in name)]
        progress(f"inference for {num_envs} environments: {', '.join(acting)}")
        torch._dynamo.reset()  # otherwise each size counts as a recompilation, up to a limit
        configs = {name: base.replace(num_envs=num_envs, **VARIANTS[name]) for name in acting}
        calls = {name: inference_call(config, device) for name, config in configs.items()}
        for name, seconds in in_turn(calls, args.rounds, device).items():
            results[f"inference_seconds/{num_envs}/{name}"] = seconds
    torch.set_num_threads(threads)
    results["flops_per_sample"] = flops_per_sample(base)
    return results


def precisions(names: Sequence[str]) -> list[str]:
    """The precisions of some variants."""
    return list(dict.fromkeys(VARIANTS[name]["precision"] for name in names))


def measure_updates(
    base: TrainConfig, size: int, names: Sequence[str], rounds: int, device: torch.device
) -> dict[str, float]:
    """Samples per second of updates with ``size`` frames per step, and of the products alone."""
    torch._dynamo.reset()
    steps = base.learner.num_epochs * base.learner.num_minibatches
    base = base.replace(num_envs=size * base.learner.num_minibatches // base.learner.num_steps)
    calls = {name: update_call(base.replace(**VARIANTS[name]), device) for name in names}
    for call in calls.values():
        call(), call()  # compile, and capture
    samples = dict.fromkeys(calls, size * steps)
    for precision in precisions(names):
        calls[f"products_{precision}"] = products_call(base.replace(precision=precision), device)
    return {
        f"update_samples_per_second/{size}/{name}": samples.get(name, size) / seconds
        for name, seconds in in_turn(calls, rounds, device).items()
    }


def in_turn(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds per call of several functions, which are measured in turn: medians over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_per_call(call, device, 0.3))
    return {name: median(measured) for name, measured in seconds.items()}


def report(results: dict[str, float]) -> str:
    """Markdown tables: updates by minibatch size, then inference."""
    keys = [name.split("/") for name in results]
    sizes = list(dict.fromkeys(key[1] for key in keys if key[0] == "update_samples_per_second"))
    variants = list(dict.fromkeys(key[2] for key in keys if key[0] == "update_samples_per_second"))
    variants = [variant for variant in variants if not variant.startswith("products")]
    lines = ["| update, samples/s | " + " | ".join(f"{int(s):,} per step" for s in sizes) + " |"]
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
    lines += ["", "| inference, ms | " + " | ".join(f"{int(r):,} environments" for r in rows) + " |"]
    lines += ["|---|" + "---:|" * len(rows)]
    for variant in dict.fromkeys(key[2] for key in keys if key[0] == "inference_seconds"):
        cells = [f"{1e3 * results[f'inference_seconds/{r}/{variant}']:.2f}" for r in rows]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def benchmark(args: Args) -> None:
    """Measure, report, and write the results."""
    results = measure(args)
    for name, value in results.items():
        print(name, f"{value:.6g}")
    print("\n" + report(results))
    write_results(args.json, results)


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
