"""Meta-World's official evaluation, in its own environments and by its own ``metaworld.evaluation``.

Each task is tried on its 50 goals once, with the mean action; an episode succeeds if any of its steps does. It ends
there, so that these returns are not comparable with those of training, whose episodes run to the time limit.

`evaluate` works in units of a task and a seed, in as many processes as wanted: its numbers do not depend on how many.

Shapes: ``K`` tasks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple, Protocol

import gymnasium as gym
import metaworld  # noqa: F401  (registers its environments with gymnasium)
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.evaluation import Agent, evaluation
from numpy.typing import NDArray
from scipy.stats import binomtest

from mtrl_vec.errors import InputError, WorkerDied
from mtrl_vec.processes import START_METHOD, deferred_interrupts

NUM_GOALS = 50
MAX_SEED = 2**32 - len(ALL_V3_ENVIRONMENTS)
"""Seeds have 32 bits, and task ``k``, of up to all of Meta-World's, gets the goals of ``seed + k``."""
Progress = Callable[[int, int, str], object]
"""Is told how many units are done, of how many, and the result of the one done last: empty at the start."""


class Policy(Protocol):
    """What `evaluate` evaluates, for example a `mtrl_vec.policy.TrainedPolicy`."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that it knows."""

    def act(self, observation: NDArray[np.floating], task_idx: NDArray[np.integer]) -> NDArray[np.float32]:
        """Mean actions [n, 4] for observations [n, 39] of the tasks at positions [n]."""


class Unit(NamedTuple):
    """What is evaluated in one go: a task on the goals of a seed."""

    task_idx: int
    """Position ``k`` among the policy's tasks."""
    seed: int
    """Of the evaluation; the task's goals are those of ``seed + k``."""
    num_goals: int = NUM_GOALS


def make_official_envs(tasks: Sequence[str], seed: int) -> gym.vector.SyncVectorEnv:
    """Meta-World's vector environment: task ``k`` in environment ``k``, on its 50 goals of benchmark seed ``seed + k``.

    All in this process. Two of Meta-World's defaults would spoil the protocol. A seed of 0 counts as no seed, so it is
    refused here. And the default task selection draws goals with replacement; the pseudorandom one visits each once,
    but only if told to at resets.

    Raises:
        InputError: see `check_seeds` and `check_tasks`.
    """
    check_tasks(tasks)
    check_seeds([seed])
    return _make_envs(tasks, seed)


def _make_envs(tasks: Sequence[str], seed: int) -> gym.vector.SyncVectorEnv:
    envs = gym.make_vec(
        "Meta-World/custom-mt-envs",
        vector_strategy="sync",
        envs_list=list(tasks),
        seed=seed,
        task_select="pseudorandom",
    )
    assert isinstance(envs, gym.vector.SyncVectorEnv)
    envs.call("toggle_sample_tasks_on_reset", True)
    return envs


class OfficialAgent:
    """A policy as ``metaworld.evaluation`` expects it: row ``k`` of its observations is task ``k``.

    Args:
        policy: which acts.
        task_idx: other tasks in the rows, as positions among the policy's.
    """

    def __init__(self, policy: Policy, task_idx: Sequence[int] | None = None) -> None:
        self._policy = policy
        self._task_idx = np.arange(len(policy.tasks)) if task_idx is None else np.array(task_idx)

    def eval_action(self, observations: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean actions [K, 4] for observations [K, 39], clipped to the action space."""
        return self._policy.act(observations, self._task_idx).astype(np.float64)

    def reset(self, env_mask: NDArray[np.bool_]) -> None:
        """Nothing to forget between episodes."""


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises InputError where Meta-World would not take these seeds as such."""
    for seed in seeds:
        if not 1 <= seed <= MAX_SEED:
            raise InputError(f"seed is {seed}: Meta-World takes 0 for 'no seed', so give 1 or more, up to 32 bits")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds are {', '.join(map(str, seeds)) or 'none'}: give one or more, each once")


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises InputError where a task is not Meta-World's."""
    for task in tasks:
        if task not in ALL_V3_ENVIRONMENTS:
            raise InputError(
                f"task {task!r} is not one of Meta-World's, and its official protocol is for those only: give "
                "--tasks without it"
            )


def evaluate(
    policy: Policy,
    seeds: Sequence[int],
    num_workers: int = 1,
    progress: Progress = lambda done, total, result: None,
    tasks: Sequence[str] | None = None,
) -> dict[str, float]:
    """Run the official evaluation of a policy, on 50 goals per task and seed.

    The policy acts on one row at a time, with one torch thread, so that the results do not depend on ``num_workers``:
    a matrix product of another number of rows, or by another number of threads, may be rounded differently.

    Args:
        policy: for example from `mtrl_vec.load_policy`. With several processes it is pickled.
        seeds: of Meta-World's goals, 1 or more each.
        num_workers: processes; 1 for this one alone. Others import the script that runs, so it needs the ``__main__``
            guard.
        progress: is told at the start, and of each task and seed as soon as it is done.
        tasks: which of the policy's, all by default. Each has the goals that it has among all.

    Returns:
        As `run_protocol`, means over the seeds; and with each success rate the ends of its 95 % interval (Wilson 1927),
        ``eval/<task>/success_low`` and ``_high``, and ``eval/mean_success_low`` and ``_high`` of all tasks' episodes.

    Raises:
        InputError: see `check_seeds` and `check_tasks`; also ``num_workers`` below 1, or a task that is not the
            policy's.
        WorkerDied: one of the processes ended on its own.
    """
    tasks = policy.tasks if tasks is None else tuple(tasks)
    check_tasks(tasks)
    for task in tasks:
        if task not in policy.tasks:
            raise InputError(f"task is {task!r}: this policy has {', '.join(policy.tasks)}")
    check_seeds(seeds)
    if num_workers < 1:
        raise InputError(f"num_workers is {num_workers}: give 1 or more")
    units = [Unit(k, seed, NUM_GOALS) for seed in seeds for k in map(policy.tasks.index, tasks)]
    scores = run_units(policy, units, num_workers, progress)
    results: dict[str, float] = {}
    for k, task in enumerate(tasks):
        for value in ("success_rate", "return"):
            name = f"eval/{task}/{value}"
            results[name] = float(np.mean([score[name] for score in scores[k :: len(tasks)]]))
    rates = [results[f"eval/{task}/success_rate"] for task in tasks]
    results["eval/mean_success_rate"] = float(np.mean(rates))
    episodes = NUM_GOALS * len(seeds)
    for task, rate in zip(tasks, rates, strict=True):
        low, high = wilson_interval(rate, episodes)
        results |= {f"eval/{task}/success_low": low, f"eval/{task}/success_high": high}
    low, high = wilson_interval(results["eval/mean_success_rate"], episodes * len(tasks))
    return results | {"eval/mean_success_low": low, "eval/mean_success_high": high}


def wilson_interval(rate: float, episodes: int) -> tuple[float, float]:
    """95 % confidence interval (Wilson 1927) of a success rate over a number of episodes."""
    interval = binomtest(round(rate * episodes), episodes).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def run_protocol(agent: Agent, tasks: Sequence[str], seed: int) -> dict[str, float]:
    """``metaworld.evaluation`` of any agent on the 50 goals per task that ``seed`` gives, all tasks in lock step.

    Returns:
        ``eval/<task>/success_rate`` and ``eval/<task>/return`` (mean over 50 episodes) and ``eval/mean_success_rate``.

    Raises:
        InputError: see `check_seeds` and `check_tasks`.
    """
    results = _run(agent, make_official_envs(tasks, seed), tasks, NUM_GOALS)
    mean = float(np.mean([results[f"eval/{task}/success_rate"] for task in tasks]))
    return results | {"eval/mean_success_rate": mean}


def _run(agent: Agent, envs: gym.vector.SyncVectorEnv, tasks: Sequence[str], num_goals: int) -> dict[str, float]:
    try:
        _, _, successes, returns = evaluation(agent, envs, num_episodes=num_goals)
    finally:
        envs.close()
    results: dict[str, float] = {}
    for task in tasks:
        results[f"eval/{task}/success_rate"] = float(successes[task])
        results[f"eval/{task}/return"] = float(np.mean(returns[task]))
    return results


def run_unit(policy: Policy, unit: Unit) -> dict[str, float]:
    """``eval/<task>/success_rate`` and ``eval/<task>/return`` of one task on the goals of one seed."""
    tasks = [policy.tasks[unit.task_idx]]
    with _one_torch_thread():
        envs = _make_envs(tasks, unit.seed + unit.task_idx)
        return _run(OfficialAgent(policy, [unit.task_idx]), envs, tasks, unit.num_goals)


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Limits torch where the policy has brought it along; this module has no use for it."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def run_units(policy: Policy, units: Sequence[Unit], num_workers: int, progress: Progress) -> list[dict[str, float]]:
    """`run_unit` of each unit, in this process or in several others. Raises WorkerDied."""
    progress(0, len(units), "")
    num_workers = min(num_workers, len(units))
    if num_workers > 1:
        return _run_in_processes(policy, units, num_workers, progress)
    results = []
    for unit in units:
        results.append(run_unit(policy, unit))
        progress(len(results), len(units), _in_words(policy, unit, results[-1]))
    return results


def _run_in_processes(
    policy: Policy, units: Sequence[Unit], num_workers: int, progress: Progress
) -> list[dict[str, float]]:
    """`run_unit` of each unit in processes, which end with this function, however it ends."""
    if START_METHOD == "forkserver":
        multiprocessing.set_forkserver_preload([__name__, type(policy).__module__])
    pickled = pickle.dumps(policy)  # multiprocessing's own way would move tensors to shared memory, which may be small
    others, done = set(multiprocessing.active_children()), 0
    executor = ProcessPoolExecutor(num_workers, multiprocessing.get_context(START_METHOD), _start_worker)
    try:
        with deferred_interrupts():
            futures = {executor.submit(_run_pickled, pickled, unit): unit for unit in units}
        for future in as_completed(futures):
            words = _in_words(policy, futures[future], future.result())
            progress(done := done + 1, len(units), words)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        left = f"{len(units) - done} of {len(units)} tasks and seeds left"
        raise WorkerDied(f"an evaluation process died, {left}: if memory ran out, use a smaller num_workers") from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # or the executor would wait until they have finished what they are doing
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _in_words(policy: Policy, unit: Unit, scores: dict[str, float]) -> str:
    task = policy.tasks[unit.task_idx]
    return f"{task}, seed {unit.seed}: success {scores[f'eval/{task}/success_rate']:.3f}"


def _run_pickled(policy: bytes, unit: Unit) -> dict[str, float]:
    return run_unit(pickle.loads(policy), unit)


def _start_worker() -> None:
    """Let a worker end with its parent, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
