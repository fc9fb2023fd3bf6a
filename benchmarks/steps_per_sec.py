"""Environment steps per second: this package, bare physics, the usual vectorised Meta-Worlds, and a tutorial's loop.

In every round each contender runs for a slice of time, so that a machine that slows down affects all of them. A rate is
the median over the rounds, a ratio the median of the ratios within the rounds.
"""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"  # read when NumPy and torch load; worker processes inherit it

import gymnasium
import numpy as np
import torch
import tyro
from baselines import (
    SEED,
    Contender,
    EnvPool,
    Floor,
    FloorParallel,
    GymAsync,
    GymParallelEnv,
    TorchRL,
    TutorialPPO,
    names_of,
    random_actions,
)
from common import check_arguments, progress, provenance, run_benchmark, write_results
from replay import Replay

from mtrl_vec.config import TrainConfig
from mtrl_vec.envs import make_env
from mtrl_vec.envs.make import default_num_workers
from mtrl_vec.errors import InputError
from mtrl_vec.machine import available_cores
from mtrl_vec.processes import deferred_interrupts
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import TASK_SETS
from mtrl_vec.tasks.task import Task

TARGETS = {
    "MT3": (
        ("sim_1proc", "floor_1proc", 0.95),
        ("sim_1proc", "envpool_1thread", 1.3),
        ("parallel_env", "floor_parallel", 0.75),
        ("parallel_env", "envpool_parallel", 1.2),
        ("parallel_env", "gym_parallel_env", 12.0),
        ("gym_vector", "gym_async", 5.0),
        ("train", "tutorial_loop", 50.0),
        ("train", "tutorial_fixed", 5.0),
    ),
    "MT10": (
        ("sim_1proc", "floor_1proc", 1.0),
        ("sim_1proc", "envpool_1thread", 1.5),
        ("parallel_env", "floor_parallel", 0.85),
        ("parallel_env", "envpool_parallel", 1.3),
        ("gym_vector", "gym_async", 5.0),
    ),
    "MT50": (("sim_1proc", "floor_1proc", 0.9),),
}
"""What should be faster than what, and by which factor, with the tasks of a suite."""
ENVS_PER_WORKER = {"MT3": 96, "MT10": 240, "MT50": 500}
"""Computing rewards costs the more, the more formulas there are, whatever the number of simulations."""
WITH_EXPERTS = ("floor_1proc", "sim_1proc", "floor_parallel")
"""Contenders that can start episodes where those of the experts did."""

NAMES = (
    *("floor_1proc", "sim_1proc", "floor_parallel", "parallel_env", "gym_vector", "gym_parallel_env", "gym_async"),
    *("envpool_1thread", "envpool_parallel", "tutorial_loop", "tutorial_fixed", "train"),
)


@dataclass(frozen=True)
class Args:
    """Measure environment steps per second and compare them with the targets."""

    suite: Literal["MT3", "MT10", "MT50"] = "MT3"
    """The tasks."""
    actions: Literal["random", "expert"] = "random"
    """What is done: random actions, or recorded ones of Meta-World's scripted experts, which touch things and so make
    the physics slower. With experts only floor_1proc, sim_1proc and floor_parallel are measured."""
    quick: bool = False
    """A single short round, under a minute. Less accurate."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the results to this file, with the machine, the versions and the command."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Measure only these contenders, for example: sim_1proc floor_1proc. By default all."""
    seconds: float | None = None
    """Length of a slice. By default 2, with --quick 0.25. Some contenders need longer for one piece of work."""
    rounds: int | None = None
    """Slices per contender. By default 5, with --quick 1."""
    num_workers: int | None = None
    """Processes of parallel_env, gym_vector and floor_parallel, threads of envpool_parallel. By default what suits the
    machine. train always runs with its own defaults."""
    envs_per_worker: int | None = None
    """Simulations in each process of floor_1proc, sim_1proc, floor_parallel, parallel_env and gym_vector; any number.
    By default 96 with MT3, 240 with MT10 and 500 with MT50."""

    def validate(self) -> None:
        """Raises InputError if something cannot be measured."""
        unknown = [name for name in self.only if name not in NAMES]
        if unknown:
            raise InputError(f"--only: no contender is called {unknown[0]!r}; there are {', '.join(NAMES)}")
        impossible = [name for name in self.only if self.actions == "expert" and name not in WITH_EXPERTS]
        if impossible:
            raise InputError(f"--only {impossible[0]}: with --actions expert there are only {', '.join(WITH_EXPERTS)}")
        names = ("seconds", "rounds", "num_workers", "envs_per_worker")
        check_arguments(self.json, **{name: getattr(self, name) for name in names})

    def settings(self) -> dict[str, Any]:
        """The settings that the arguments mean."""
        return {
            "num_workers": self.num_workers or default_num_workers(),
            "envs_per_worker": self.envs_per_worker or ENVS_PER_WORKER[self.suite],
            "rounds": self.rounds or (1 if self.quick else 5),
            "seconds": self.seconds or (0.25 if self.quick else 2.0),
        }


class Sim(Contender):
    """`SimBatch`, including resets."""

    def __init__(self, tasks: Sequence[Task], num_slots: int, replay: Replay | None = None) -> None:
        options: dict[str, Any] = {"max_episode_steps": replay.length} if replay else {"random_phase": True}
        self._sim = SimBatch(tasks, np.arange(num_slots) % len(tasks), seed=SEED, **options)
        self._replay, self._vectors = replay, replay.vectors if replay else None
        self._sim.reset(vectors=self._vectors)
        self._rng = np.random.default_rng(SEED)
        if replay:
            self.setup = f"{replay.success:.0%} of the experts' episodes succeed"

    def advance(self) -> int:
        n = self._sim.num_slots
        action = self._replay.actions[self._sim.elapsed[0]] if self._replay else random_actions(self._rng, n)
        truncated = self._sim.step(action).truncated
        if truncated.any():
            self._sim.reset(truncated, vectors=self._vectors)
        return n


class ParallelSim(TorchRL):
    """This package's environment through TorchRL's interface. Training collects with less work in the parent."""

    def __init__(self, tasks: Sequence[Task], num_workers: int, envs_per_worker: int) -> None:
        names = names_of(tasks)
        super().__init__(make_env(names, num_workers=num_workers, envs_per_worker=envs_per_worker, seed=SEED))


class GymVector(Contender):
    """This package's vector environment of Gymnasium."""

    def __init__(self, tasks: Sequence[Task], num_workers: int, envs_per_worker: int) -> None:
        self._env = gymnasium.make_vec(
            "mtrl_vec/MT1-v0",
            num_envs=num_workers * envs_per_worker,
            tasks=names_of(tasks),
            num_workers=num_workers,
            seed=SEED,
            random_phase=True,
        )
        self._env.reset()
        self._rng = np.random.default_rng(SEED)

    def advance(self) -> int:
        self._env.step(random_actions(self._rng, self._env.num_envs))
        return self._env.num_envs

    def close(self) -> None:
        self._env.close()


def expert_contenders(tasks: Sequence[Task], workers: int, slots: int) -> dict[str, Callable[[], Contender]]:
    """How to start each contender with recorded actions."""
    replay = cache(lambda: Replay(tasks, slots))  # the same for both
    return {
        "floor_1proc": lambda: Floor(tasks, slots, replay=replay()),
        "sim_1proc": lambda: Sim(tasks, slots, replay()),
        "floor_parallel": lambda: FloorParallel(tasks, workers, slots, experts=True),
    }


def contenders(suite: str, workers: int, slots: int, quick: bool) -> dict[str, Callable[[], Contender]]:
    """How to start each contender, in the order of their turns."""
    cores, tasks = available_cores(), TASK_SETS[suite]
    widths = EnvPool.WIDTHS[1:2] if quick else EnvPool.WIDTHS  # trying several takes time
    if len(tasks) > len(TASK_SETS["MT3"]):
        widths = EnvPool.WIDTHS[:1] if len(tasks) > len(TASK_SETS["MT10"]) else EnvPool.WIDTHS[:2]  # for memory
    return {
        # First, because Gymnasium forks, and a fork keeps the pipes of everything that was started before.
        "gym_async": lambda: GymAsync(tasks),
        "floor_1proc": lambda: Floor(tasks, slots),
        "sim_1proc": lambda: Sim(tasks, slots),
        "envpool_1thread": lambda: EnvPool(tasks, 1, widths),
        "floor_parallel": lambda: FloorParallel(tasks, workers, slots),
        "parallel_env": lambda: ParallelSim(tasks, workers, slots),
        "gym_vector": lambda: GymVector(tasks, workers, slots),
        "envpool_parallel": lambda: EnvPool(tasks, workers, widths),
        "gym_parallel_env": lambda: GymParallelEnv(tasks),
        "tutorial_loop": lambda: TutorialPPO(tasks, reset_every_step=True, num_threads=cores),
        "tutorial_fixed": lambda: TutorialPPO(tasks, reset_every_step=False, num_threads=cores),
        "train": lambda: Train(suite, iterations=4 if quick else 8, once=quick),
    }


class Train(Contender):
    """`python -m mtrl_vec train` with its defaults, including learning. Every slice is a run of its own.

    Evaluations are off: they are rare in a real run, and would be frequent in one so short. The time counts from the
    end of the second iteration, without the start-up.

    Args:
        suite: the tasks.
        iterations: of a run.
        once: run only the first slice, and repeat its result.
    """

    TIMEOUT_SECONDS = 600

    def __init__(self, suite: str, iterations: int, once: bool) -> None:
        self._suite, self._iterations, self._once = suite, iterations, once
        self._measured: float | None = None

    def warm_up(self) -> None:
        pass  # each run has a warm-up of its own

    def rate(self, seconds: float) -> float:
        if self._measured is None or not self._once:
            self._measured = self._run()
        return self._measured

    def _run(self) -> float:
        with tempfile.TemporaryDirectory() as folder:
            run_dir, log = Path(folder, "run"), Path(folder, "log")
            frames = self._iterations * TrainConfig().frames_per_batch
            command = [sys.executable, "-m", "mtrl_vec", "train", "--quiet", "--tasks", self._suite]
            command += ["--run-dir", str(run_dir), "--total-frames", str(frames), "--eval-interval", "0"]
            environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
            with log.open("w") as output:
                process = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            try:
                process.wait(self.TIMEOUT_SECONDS)
            finally:
                end_session(process)
            if process.returncode:
                last_line = log.read_text().rstrip().rpartition("\n")[2]
                raise RuntimeError(f"train ended with exit code {process.returncode}: {last_line}")
            with (run_dir / "metrics.csv").open() as file:
                rows = [(float(row["frames"]), float(row["time/elapsed"])) for row in csv.DictReader(file)]
        (first_frames, first), (last_frames, last) = rows[1], rows[-1]
        return (last_frames - first_frames) / (last - first)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Stop a process that leads its own session: with SIGINT, and if that fails with SIGKILL for all its processes."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Report:
    """What was measured. Args: the suite."""

    def __init__(self, suite: str) -> None:
        self._suite = suite
        self.rates: dict[str, list[float]] = {}
        """The rate in every round, by contender."""
        self.missing: dict[str, str] = {}
        """Why a contender was not measured."""
        self.setup: dict[str, str] = {}
        """How a contender was set up."""

    def failed(self, name: str, error: Exception) -> None:
        self.rates.pop(name, None)
        message = (str(error).strip() or "no message").splitlines()[0]
        self.missing[name] = f"{type(error).__name__}: {message}"
        progress(f"{name} is not measured: {self.missing[name]}")

    def value(self, name: str) -> float | None:
        return round(median(self.rates[name]), 1) if name in self.rates else None

    def targets(self) -> list[dict[str, object]]:
        rows = []
        for name, other, factor in TARGETS[self._suite]:
            ratio = None
            if name in self.rates and other in self.rates:
                ratio = round(median(a / b for a, b in zip(self.rates[name], self.rates[other], strict=True)), 3)
            result = "not measured" if ratio is None else "met" if ratio >= factor else "missed"
            rows.append({"target": f"{name} / {other}", "at_least": factor, "measured": ratio, "result": result})
        return rows


def measure(
    suite: str, starts: Mapping[str, Callable[[], Contender]], wanted: Sequence[str], rounds: int, seconds: float
) -> Report:
    """Start the contenders, measure them in turn, and end them whatever happens."""
    report = Report(suite)
    running: dict[str, Contender] = {}
    try:
        for name, start in starts.items():
            if name not in wanted:
                continue
            progress(f"starting {name}")
            try:
                with deferred_interrupts():
                    running[name] = start()
                torch.set_num_threads(1)  # TorchRL changes it
                running[name].warm_up()
            except Exception as error:
                report.failed(name, error)
                discard(running.pop(name, None))
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            for name in list(running):
                try:
                    report.rates.setdefault(name, []).append(running[name].rate(seconds))
                except Exception as error:
                    report.failed(name, error)
                    discard(running.pop(name))
        report.setup = {name: contender.setup for name, contender in running.items() if contender.setup}
        return report
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for contender in running.values():
            discard(contender)
        for process in multiprocessing.active_children():  # of a contender that failed
            process.kill()
            process.join()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def discard(contender: Contender | None) -> None:
    if contender is not None:
        with contextlib.suppress(Exception):  # it may be in the middle of a step, or broken
            contender.close()


def print_report(report: Report, values: dict[str, object]) -> None:
    """Print names and values, then what else is in the report."""
    for name, value in values.items():
        print(name, "null" if value is None else value)
    print()
    for name, text in report.missing.items():
        print(f"{name} is not measured: {text}")
    for name, text in report.setup.items():
        print(f"{name}: {text}")
    print(f"\n{'target':<34} {'at least':>8} {'measured':>9}  result")
    for row in report.targets():
        ratio = "-" if row["measured"] is None else f"{row['measured']:.2f}"
        print(f"{row['target']:<34} {row['at_least']:>8} {ratio:>9}  {row['result']}")


def benchmark(args: Args) -> None:
    """Measure, report, and write the results. Whether the targets are met makes no difference to the exit code."""
    args.validate()
    settings = args.settings()
    warnings.filterwarnings("ignore")  # of the other packages about their own defaults
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is closed then too
    workers, slots = settings["num_workers"], settings["envs_per_worker"]
    if args.actions == "expert":
        starts = expert_contenders(TASK_SETS[args.suite], workers, slots)
    else:
        starts = contenders(args.suite, workers, slots, args.quick)
    wanted = args.only or (WITH_EXPERTS if args.actions == "expert" else NAMES)
    report = measure(args.suite, starts, wanted, settings["rounds"], settings["seconds"])
    settings = {"suite": args.suite, "actions": args.actions, **settings}
    values = {name: report.value(name) for name in NAMES}
    about = provenance()
    print_report(report, values | settings | about.pop("machine") | about.pop("versions") | about)
    details = {
        "settings": settings,
        "setup": report.setup,
        "not_measured": report.missing,
        "targets": report.targets(),
        "rounds": report.rates,
    }
    write_results(args.json, values | details)


def main() -> int:
    args = tyro.cli(Args)
    return run_benchmark(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
