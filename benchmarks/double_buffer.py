"""What ``--double-buffer`` brings where there are more cores than here: simulators that sleep instead of computing.

A machine of ``C`` cores is imitated by ``C - 1`` tokens. A worker that steps its environments holds one of them for as
long as the simulation would take, and sleeps. The process that drives the workers, their messages and the policy are
real, so that this machine should be idle. Simulators that really compute are timed by ``--real``.
"""

from __future__ import annotations

import fcntl
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
import tyro
from common import check_arguments, progress, run_benchmark, write_results
from learner import in_turn, make_policy
from numpy.typing import NDArray
from tensordict import TensorDictBase

from mtrl_vec.config import TrainConfig
from mtrl_vec.envs import MetaWorldEnv, SimulatorPool, make_env
from mtrl_vec.envs.make import default_num_workers
from mtrl_vec.envs.pool import Policy
from mtrl_vec.errors import InputError
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.sim import SimBatch, Step
from mtrl_vec.tasks.layout import ACTION_SIZE
from mtrl_vec.timing import Timer

Policies = Callable[[Sequence[int]], Sequence[Policy]]
"""Makes one policy for each group of environments, given the sizes of the groups."""


@dataclass(frozen=True)
class Args:
    """Collect rollouts with and without halves in turn, on imitated machines.

    Example: python benchmarks/double_buffer.py --cores 16 32 --json double_buffer.json
    """

    suite: Literal["MT3", "MT10", "MT50"] = "MT10"
    """The tasks."""
    cores: tuple[int, ...] = (8, 16)
    """Cores of the machines to imitate, at least 3 each."""
    step_ms: tuple[float, float] = (0.9, 0.088)
    """Milliseconds that a worker takes for a step: constant, and per environment. Those of MT10 on an EPYC with
    AVX-512."""
    gpu_ms: float = 0.3
    """Milliseconds that a GPU takes to act, however many environments there are: an estimate."""
    num_steps: int = 32
    """Steps of a rollout."""
    rounds: int = 5
    """Rollouts of each way, in turn."""
    real: bool = False
    """Also with simulators that compute, on this machine."""
    json: Path | None = None
    """Also write the results to this file."""


class SleepingSim(SimBatch):
    """Simulations in which nothing happens, but which take their time; episodes never end."""

    token: IO[str]
    seconds: float

    def step(self, action: NDArray[np.float32]) -> Step:
        fcntl.flock(self.token, fcntl.LOCK_EX)
        time.sleep(self.seconds)
        fcntl.flock(self.token, fcntl.LOCK_UN)
        nothing = np.zeros(self.num_slots, dtype=bool)
        return Step(self.observation, np.zeros(self.num_slots), nothing, nothing, nothing)


class SleepingEnv(MetaWorldEnv):
    """An environment of such simulations.

    Args:
        seconds: that a step takes, of all ``num_envs``.
        token: a file that only one worker at a time may hold.
        options: see `MetaWorldEnv`.
    """

    def __init__(self, seconds: float, token: str, **options: Any) -> None:
        super().__init__(**options)
        self.sim.__class__ = SleepingSim
        self.sim.seconds, self.sim.token = seconds, Path(token).open("w")  # noqa: SIM115 - for as long as the worker lives


def imitated(args: Args, config: TrainConfig, workers: int, tokens: Sequence[str]) -> SimulatorPool:
    """So many workers, of which as many as there are tokens simulate at the same time."""
    ends = [config.num_envs * w // workers for w in range(workers + 1)]
    counts = [end - start for start, end in itertools.pairwise(ends)]
    options = [
        {
            **{"tasks": config.environment.tasks, "num_envs": count, "num_rows": max(counts), "first_slot": ends[w]},
            **{"seconds": (args.step_ms[0] + count * args.step_ms[1]) / 1e3, "token": tokens[w % len(tokens)]},
        }
        for w, count in enumerate(counts)
    ]
    return SimulatorPool(SleepingEnv, options)


def on_gpu(args: Args) -> Policies:
    """A policy that only takes its time."""

    def act(state: TensorDictBase) -> TensorDictBase:
        time.sleep(args.gpu_ms / 1e3)
        return state.set("action", torch.zeros(*state.shape, ACTION_SIZE))

    return lambda sizes: [act] * len(sizes)


def on_cpu(config: TrainConfig) -> Policies:
    """An untrained policy."""
    return ActingPolicy(make_policy(config, torch.device("cpu")), config, Timer()).in_turn


def rates(
    args: Args, config: TrainConfig, pools: dict[str, SimulatorPool], policies: dict[str, Policies]
) -> dict[str, float]:
    """Steps/s of each policy on each pool, at once and by halves: medians of rounds in which all ways take turns."""
    ways: dict[str, Callable[[], object]] = {}
    for (name, pool), (device, of_sizes), groups in itertools.product(pools.items(), policies.items(), (1, 2)):
        pool.reset()
        turns = of_sizes(pool.envs_per_group(groups))
        way = f"{name}, {device}, {'at once' if groups == 1 else 'halves'}"
        ways[way] = lambda pool=pool, turns=turns: pool.collect(turns, args.num_steps)
    frames, seconds = config.num_envs * args.num_steps, in_turn(ways, args.rounds, torch.device("cpu"))
    return {way: frames / seconds[way] for way in ways}


def benchmark(args: Args) -> None:
    """Measure, report, and write the results."""
    check_arguments(
        args.json, step_ms=min(args.step_ms), gpu_ms=args.gpu_ms,
        num_steps=args.num_steps, rounds=args.rounds,
    )  # fmt: skip
    if min(args.cores, default=3) < 3:
        raise InputError(f"cores is {min(args.cores)}: give at least 3, of which one drives the workers")
    torch.set_num_threads(1)
    config = TrainConfig.of(tasks=(args.suite,), device="cpu")
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cores in args.cores:
            progress(f"{cores} cores")
            workers = default_num_workers(cores)
            tokens = [str(Path(folder, f"{cores}-{i}")) for i in range(workers)]
            pools = {f"{cores} cores, {n} workers": imitated(args, config, n, tokens) for n in (workers, 2 * workers)}
            results |= measured(args, config, pools, {"cpu": on_cpu(config), "gpu": on_gpu(args)})
    if args.real:
        progress("simulators that compute")
        pools = {f"here, {n} workers": make_env(config.tasks, num_workers=n, num_envs=config.num_envs) for n in (2, 4)}
        results |= measured(args, config, pools, {"cpu": on_cpu(config)})
    print("| way | steps/s |\n|---|---:|\n" + "\n".join(f"| {way} | {rate:,.0f} |" for way, rate in results.items()))
    write_results(args.json, results)


def measured(
    args: Args, config: TrainConfig, pools: dict[str, SimulatorPool], policies: dict[str, Policies]
) -> dict[str, float]:
    """`rates`, after which the workers are ended."""
    try:
        return rates(args, config, pools, policies)
    finally:
        for pool in pools.values():
            pool.close()


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
