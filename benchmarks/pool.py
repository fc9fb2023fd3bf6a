"""What the process that drives the simulators costs per step, with simulators that do nothing.

Two ways to a rollout: `SimulatorPool.collect`, which training uses, and TorchRL's collector on the same pool. What is
counted is the CPU time of this process, with the time of a policy that does nothing; workers have their own. Waiting
for them takes none in the first way; in the second one polls, which counts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import check_arguments, progress, run_benchmark, write_results
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torchrl.collectors import Collector

from mtrl_vec.envs import MetaWorldEnv, SimulatorPool
from mtrl_vec.envs.rollout import RolloutWriter
from mtrl_vec.sim import SimBatch, Step
from mtrl_vec.tasks.layout import ACTION_SIZE


@dataclass(frozen=True)
class Args:
    """Time the parent of 2, 15 and 60 workers.

    Example: python benchmarks/pool.py --num-workers 2 15 --json pool.json
    """

    num_workers: tuple[int, ...] = (2, 15, 60)
    """Worker processes, one pool each."""
    envs_per_worker: int = 96
    """Environments of each worker."""
    num_steps: int = 32
    """Steps of a rollout."""
    rounds: int = 5
    """Rollouts of either way, in turn."""
    json: Path | None = None
    """Also write the results to this file."""


class EmptySim(SimBatch):
    """Simulations in which nothing happens; episodes never end."""

    def step(self, action: NDArray[np.float32]) -> Step:
        nothing = np.zeros(self.num_slots, dtype=bool)
        return Step(self.observation, np.zeros(self.num_slots), nothing, nothing, nothing)


class EmptyEnv(MetaWorldEnv):
    """One whose simulations do nothing."""

    def __init__(self, num_envs: int, num_rows: int) -> None:
        super().__init__(["reach"], num_envs, num_rows=num_rows)
        self.sim.__class__ = EmptySim
        self.rollouts = RolloutWriter(self.sim)


def no_action(state: TensorDictBase) -> TensorDictBase:
    return state.set("action", torch.zeros(*state.shape, ACTION_SIZE))


def measure(args: Args) -> dict[str, float]:
    """Milliseconds of CPU time per step by way and number of workers: medians over the rounds."""
    check_arguments(
        args.json, envs_per_worker=args.envs_per_worker, num_steps=args.num_steps, rounds=args.rounds,
        num_workers=min(args.num_workers, default=None),
    )  # fmt: skip
    torch.set_num_threads(1)
    results: dict[str, float] = {}
    for workers in args.num_workers:
        progress(f"{workers} workers")
        with_rows: dict[str, Any] = {"num_envs": args.envs_per_worker, "num_rows": args.envs_per_worker}
        pool = SimulatorPool(EmptyEnv, [with_rows] * workers)
        frames = workers * args.envs_per_worker * args.num_steps
        try:
            pool.reset()
            collector = iter(
                Collector(
                    pool, no_action, frames_per_batch=frames, trust_policy=True, track_traj_ids=False,
                    use_buffers=False, auto_register_policy_transforms=False,
                )
            )  # fmt: skip
            ways: dict[str, Callable[[], object]] = {
                "collect": lambda pool=pool: pool.collect(no_action, args.num_steps),
                "torchrl": lambda collector=collector: next(collector),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for round_number in range(args.rounds + 1):  # the first does not count
                for way, call in ways.items():
                    start = time.process_time()
                    call()
                    if round_number:
                        seconds[way].append((time.process_time() - start) / args.num_steps)
        finally:
            pool.close()
        results |= {f"{way}_ms/{workers}": 1e3 * statistics.median(all_) for way, all_ in seconds.items()}
    return results


def report(results: dict[str, float], counts: tuple[int, ...]) -> str:
    """A Markdown table."""
    lines = ["| ms of the parent per step | " + " | ".join(f"{count} workers" for count in counts) + " |"]
    lines += ["|---|" + "---:|" * len(counts)]
    for way in ("torchrl", "collect"):
        lines.append(f"| {way} | " + " | ".join(f"{results[f'{way}_ms/{count}']:.2f}" for count in counts) + " |")
    return "\n".join(lines)


def benchmark(args: Args) -> None:
    """Measure, report, and write the results."""
    results = measure(args)
    print(report(results, args.num_workers))
    write_results(args.json, results)


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
