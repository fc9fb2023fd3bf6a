"""`make_env`: many simulations in worker processes as one environment."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from mtrl_vec.config.checks import check_seed, require
from mtrl_vec.envs.metaworld import DEFAULT_TASKS, MetaWorldEnv
from mtrl_vec.envs.pool import SimulatorPool
from mtrl_vec.errors import InputError, first_line
from mtrl_vec.machine import available_cores
from mtrl_vec.tasks.suite import MT50, resolve_tasks
from mtrl_vec.tasks.task import MAX_EPISODE_STEPS, Task


def make_env(
    tasks: Sequence[str | Task] = DEFAULT_TASKS,
    *,
    num_workers: int | None = None,
    envs_per_worker: int = 96,
    num_envs: int | None = None,
    seed: int = 0,
    first_slot: int = 0,
    goals_seed: int | None = None,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    random_phase: bool = True,
    rest_after_success: bool = False,
    fresh_starts: bool = False,
) -> SimulatorPool:
    """``W`` worker processes with ``E`` simulations each, holding all tasks in turn, as one TorchRL environment.

    What an environment does depends on its number (``first_slot`` + its position among all) and the seed alone: with
    any number of workers, the same environments give the same numbers. Scripts that call this need an
    ``if __name__ == "__main__":`` guard (workers are processes that import them). Call ``close()`` at the end.

    Args:
        tasks: names of tasks or sets, or tasks of your own, see `mtrl_vec.tasks.suite.resolve_tasks`. Environment
            ``i`` holds task ``i % K``.
        num_workers: ``W``; by default what suits the machine (`default_num_workers`).
        envs_per_worker: ``E``.
        num_envs: the environments of all workers together, instead of ``envs_per_worker``. Any number: they are spread
            as evenly as possible, see `SimulatorPool`. There are at most as many workers.
        seed, first_slot, goals_seed, max_episode_steps, random_phase, rest_after_success, fresh_starts: see
            `mtrl_vec.sim.SimBatch`.

    Returns:
        An environment of batch size ``[W, E]`` with the entries of `MetaWorldEnv`.

    Raises:
        InputError: unknown or repeated task, a task whose model lacks what it reads, a number that is not positive, or
            a seed that does not have 32 bits.
    """
    resolved = resolve_tasks(tasks)
    common = {
        # Meta-World's go by name, which is quicker to send. Workers need not know that yours are registered.
        "tasks": tuple(task.name if task in MT50 else task for task in resolved),
        "seed": seed,
        "goals_seed": goals_seed,
        "max_episode_steps": max_episode_steps,
        "random_phase": random_phase,
        "rest_after_success": rest_after_success,
        "fresh_starts": fresh_starts,
    }
    for task in resolved:
        _check_sendable(task)
    num_workers = default_num_workers() if num_workers is None else num_workers
    sizes = {"num_workers": num_workers, "envs_per_worker": envs_per_worker, "num_envs": num_envs}
    for name, value in (sizes | {"max_episode_steps": max_episode_steps}).items():
        require(value is None or value >= 1, name, value, "must be at least 1")
    check_seed("seed", seed)
    check_seed("goals_seed", goals_seed)
    counts = _spread(num_workers * envs_per_worker if num_envs is None else num_envs, num_workers)
    own = [{"num_envs": count, "first_slot": first_slot + sum(counts[:w])} for w, count in enumerate(counts)]
    return SimulatorPool(MetaWorldEnv, [common | {"num_rows": max(counts)} | worker for worker in own])


def default_num_workers(cores: int | None = None) -> int:
    """One worker per core; with more than two cores, one of them is left to the learner.

    On 2 cores, two workers beat both one and three: see benchmarks/results/README.md.

    Args:
        cores: how many there are to use; by default all that this process may use.
    """
    cores = available_cores() if cores is None else cores
    return cores if cores <= 2 else cores - 1


def _check_sendable(task: Task) -> None:
    try:
        pickle.dumps(task)
    except Exception as error:  # whatever its functions are
        problem = "cannot be sent to worker processes: use functions of a module, and functools.partial of them"
        raise InputError(f"task {task.name!r} {problem} ({first_line(error)})") from error


def _spread(num_envs: int, num_workers: int) -> list[int]:
    """Environments of each worker, as even as possible; of as many workers as there are environments, at most."""
    num_workers = min(num_workers, num_envs)
    share, more = divmod(num_envs, num_workers)
    return [share + (w < more) for w in range(num_workers)]
