"""The simulations as a TorchRL environment, and many of those in parallel worker processes.

Shapes: ``W`` workers, ``E`` environments per worker, ``K`` tasks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase, ParallelEnv

from mtrl_vec.errors import InputError, WorkerDied
from mtrl_vec.sim import ACTION_SIZE, OBSERVATION_SIZE, SawyerSim
from mtrl_vec.tasks import MAX_EPISODE_STEPS, TASKS, resolve_tasks
from mtrl_vec.timing import Timer

ALL_TASKS = tuple(task.name for task in TASKS)


class MetaWorldEnv(EnvBase):
    """A batch of ``E`` Meta-World simulations, stepped and partially reset as one. See `make_env` for many of them.

    Environment ``i`` holds task ``(first_slot + i) % K``. A TensorDict of batch size ``[E]`` carries

    ================  ===========  ==================================================================
    ``observation``   [E, 39] f32  Meta-World's, goal included
    ``task_one_hot``  [E, K] f32   which of the tasks
    ``task_idx``      [E] i64      the same as an index
    ``action``        [E, 4] f32   hand velocity and gripper effort, clipped to [-1, 1]
    ``reward``        [E, 1] f32   Meta-World's, in [0, 10]
    ``success``       [E, 1] bool  at this very step
    ``terminated``    [E, 1] bool  never: Meta-World's episodes do not end on success
    ``truncated``     [E, 1] bool  time limit, or unstable physics
    ``unstable``      [E, 1] bool  unstable physics: the observation is the last good one, the reward 0
    ================  ===========  ==================================================================

    Args:
        tasks: names, see `mtrl_vec.tasks.resolve_tasks`.
        num_envs: ``E``.
        seed, first_slot, goals_seed, max_episode_steps, random_phase, rest_after_success: see
            `mtrl_vec.sim.SawyerSim`.

    Raises:
        InputError: unknown or repeated task.
    """

    def __init__(
        self,
        tasks: Sequence[str] = ALL_TASKS,
        num_envs: int = 3,
        *,
        seed: int = 0,
        first_slot: int = 0,
        goals_seed: int | None = None,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        random_phase: bool = False,
        rest_after_success: bool = False,
    ) -> None:
        super().__init__(batch_size=[num_envs])
        resolved = resolve_tasks(tasks)
        self.num_tasks = k = len(resolved)
        self.sim = SawyerSim(
            resolved,
            (first_slot + np.arange(num_envs)) % k,
            seed=seed,
            first_slot=first_slot,
            goals_seed=goals_seed,
            max_episode_steps=max_episode_steps,
            random_phase=random_phase,
            rest_after_success=rest_after_success,
        )
        batch = self.batch_size
        self.observation_spec = Composite(
            observation=Unbounded((*batch, OBSERVATION_SIZE)),
            task_one_hot=OneHot(k, (*batch, k), dtype=torch.float32),
            task_idx=Categorical(k, batch),
            success=Binary(1, (*batch, 1), dtype=torch.bool),
            unstable=Binary(1, (*batch, 1), dtype=torch.bool),
            shape=batch,
        )
        self.action_spec = Bounded(-1.0, 1.0, (*batch, ACTION_SIZE))
        self.reward_spec = Unbounded((*batch, 1))
        flag = Binary(1, (*batch, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=batch)

    def _output(self, observation: np.ndarray, **flags: torch.Tensor) -> TensorDict:
        task_idx = torch.from_numpy(self.sim.task_idx.copy())
        return TensorDict(
            {
                "observation": torch.from_numpy(observation.astype(np.float32)),
                "task_one_hot": torch.nn.functional.one_hot(task_idx, self.num_tasks).float(),
                "task_idx": task_idx,
                **flags,
            },
            self.batch_size,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        observation = self.sim.reset(None if mask is None else mask.view(-1).numpy())
        never = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        names = ("success", "unstable", "done", "terminated", "truncated")
        return self._output(observation, **{name: never.clone() for name in names})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        step = self.sim.step(tensordict.get("action").numpy())
        truncated = torch.from_numpy(step.truncated)[:, None]
        return self._output(
            step.observation,
            reward=torch.from_numpy(step.reward.astype(np.float32))[:, None],
            success=torch.from_numpy(step.success)[:, None],
            unstable=torch.from_numpy(step.unstable)[:, None],
            terminated=torch.zeros_like(truncated),
            truncated=truncated,
            done=truncated.clone(),
        )

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.sim.seed(seed)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach. One that is pressed meanwhile takes effect at the end of the block.

    A terminal sends it to every process of the group, but when and how to stop is for the parent to decide. Where
    SIGTERM counts as Ctrl-C, it waits as well; the new processes take it as ever.
    """
    received = threading.Event()
    resource_tracker.ensure_running()  # multiprocessing's helper process: starting it later would unblock the signal
    main = threading.current_thread() is threading.main_thread()
    like_ctrl_c = signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)[: 1 + like_ctrl_c]}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited by what is started here
    try:
        for number in handlers if main else ():  # another thread may take the signal in spite of the mask
            signal.signal(number, lambda *_: received.set())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items() if main else ():
            signal.signal(number, handler)
        if received.is_set():  # also where the new processes took it too, and failed to start
            raise KeyboardInterrupt


class SimulatorPool(ParallelEnv):
    """`ParallelEnv` whose parent sleeps, instead of spinning on a core, while the workers simulate.

    TorchRL's parent polls the workers' shared done flags without a pause and so takes a core from them. Even a
    look every 50 us costs a fifth of their speed where they want every core. But a step takes about as long as the one
    before: so sleep for most of that, and poll only towards the end.
    """

    POLL_SECONDS = 1e-4
    SLEEP_SHARE = 0.85  # of the shortest of the last waits
    CHECK_SECONDS = 0.2  # between looks for dead workers
    SHUTDOWN_SECONDS = 10.0
    timer: Timer | None = None
    """Counts the section ``simulate``, if there is one."""
    _shortest_wait = 0.0

    def _start_workers(self) -> None:
        # It would take threads from the learner for good, or give the parent more than it has just now.
        self.num_threads = torch.get_num_threads()
        with deferred_interrupts():
            super()._start_workers()

    def _cleanup_failed_worker_startup(self) -> None:
        workers = list(self._workers)
        deadline = time.monotonic() + 2.0
        while all(process.is_alive() for process in workers) and time.monotonic() < deadline:
            time.sleep(0.01)  # it has closed its pipe and is about to end
        dead = next((worker for worker, process in enumerate(workers) if not process.is_alive()), None)
        self._terminate_and_join_workers(workers, timeout=2.0)
        super()._cleanup_failed_worker_startup()
        if dead is not None:
            raise WorkerDied(f"simulation worker {dead} died with exit code {workers[dead].exitcode} while it started")

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """As in `ParallelEnv`. Raises `WorkerDied`."""
        with self.timer("simulate") if self.timer else contextlib.nullcontext(), self._naming_the_dead():
            return super().step_and_maybe_reset(tensordict)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        with self._naming_the_dead():
            return super()._step(tensordict)

    def _reset(self, tensordict: TensorDictBase, **options: Any) -> TensorDictBase:
        with self._naming_the_dead():
            result = super()._reset(tensordict, **options)
        self._shortest_wait = 0.0  # a reset is no step, and steps may take longer from here on
        return result

    @contextlib.contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        started = not self.is_closed  # else TorchRL is about to start them
        if started:
            self._check_alive(range(self.num_workers))
        try:
            yield
        except OSError:  # a worker's pipe broke just now, and its process is about to end
            deadline = time.monotonic() + 1.0
            while started and time.monotonic() < deadline:
                self._check_alive(range(self.num_workers))
                time.sleep(0.01)
            raise

    def _wait_for_workers(self, workers_range: Sequence[int]) -> None:
        flags = self._shm_done_flags
        pending = [(worker, self._worker_indices[worker]) for worker in workers_range]
        start = checked = time.perf_counter()
        shortest = self._shortest_wait
        time.sleep(min(self.SLEEP_SHARE * shortest, self.CHECK_SECONDS))
        while pending := [(worker, flag) for worker, flag in pending if not flags[flag]]:
            time.sleep(self.POLL_SECONDS)
            if time.perf_counter() - checked > self.CHECK_SECONDS:
                checked = time.perf_counter()
                self._check_alive([worker for worker, flag in pending if not flags[flag]])
        # It may grow again, slowly, when steps get slower.
        waited = time.perf_counter() - start
        self._shortest_wait = min(waited, 1.05 * shortest) if shortest else waited
        for worker in workers_range:
            flags[self._worker_indices[worker]] = 0

    def _check_alive(self, workers: Sequence[int]) -> None:
        for worker in workers:
            process = self._workers[worker]
            if not process.is_alive():
                reason = f"(pid {process.pid}) died with exit code {process.exitcode}"
                raise WorkerDied(f"simulation worker {worker} {reason}")

    def close(self, **options: Any) -> None:
        """As in `ParallelEnv`, but leaves torch's threads as they are."""
        threads = torch.get_num_threads()
        super().close(**options)
        torch.set_num_threads(threads)

    def _shutdown_workers(self) -> None:
        # TorchRL's own refuses to run once a worker is dead, and then leaves the others behind.
        for channel in self.parent_channels:
            with contextlib.suppress(OSError):
                channel.send(("close", None))
        deadline = time.monotonic() + self.SHUTDOWN_SECONDS
        with contextlib.suppress(ValueError):  # TorchRL has given up on them already
            for process in self._workers:
                process.join(max(0.0, deadline - time.monotonic()))
            self._terminate_and_join_workers(self._workers, timeout=2.0)
        for channel in self.parent_channels:
            channel.close()
        del self._workers, self.parent_channels, self.shared_tensordicts, self.shared_tensordict_parent
        self._cuda_events = self._events = self.event = None


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_num_workers() -> int:
    """One worker per core, but for one core left to the learner where there are more than two.

    On 2 cores, two workers beat both one and three: see benchmarks/results/README.md.
    """
    cores = available_cores()
    return cores if cores <= 2 else cores - 1


def make_env(
    tasks: Sequence[str] = ALL_TASKS,
    *,
    num_workers: int | None = None,
    envs_per_worker: int = 96,
    seed: int = 0,
    first_slot: int = 0,
    goals_seed: int | None = None,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    random_phase: bool = True,
    rest_after_success: bool = False,
) -> ParallelEnv:
    """``W`` worker processes of ``E`` simulations each, holding all tasks in equal shares, as one TorchRL environment.

    What environment ``[w, e]`` does depends on its number ``first_slot + w * E + e`` and the seed alone: ``[1, 2 E]``
    and ``[2, E]`` give the same numbers. Scripts that call this need an ``if __name__ == "__main__":`` guard (workers
    are spawned). Call ``close()`` at the end.

    Args:
        tasks: names, see `mtrl_vec.tasks.resolve_tasks`.
        num_workers: ``W``; by default what suits the machine (`default_num_workers`).
        envs_per_worker: ``E``, a multiple of the number of tasks.
        seed, first_slot, goals_seed, max_episode_steps, random_phase, rest_after_success: see
            `mtrl_vec.sim.SawyerSim`.

    Returns:
        An environment of batch size ``[W, E]`` with the entries of `MetaWorldEnv`.

    Raises:
        InputError: unknown or repeated task, or a number of environments that the tasks cannot share equally.
    """
    tasks = tuple(task.name for task in resolve_tasks(tasks))
    num_workers = default_num_workers() if num_workers is None else num_workers
    if num_workers < 1:
        raise InputError(f"num_workers is {num_workers}: it must be at least 1")
    if envs_per_worker < 1 or envs_per_worker % len(tasks):
        raise InputError(
            f"envs_per_worker is {envs_per_worker}: it must be a positive multiple of the {len(tasks)} tasks"
        )
    shared = {
        "tasks": tasks,
        "num_envs": envs_per_worker,
        "seed": seed,
        "goals_seed": goals_seed,
        "max_episode_steps": max_episode_steps,
        "random_phase": random_phase,
        "rest_after_success": rest_after_success,
    }
    return SimulatorPool(
        num_workers,
        MetaWorldEnv,
        create_env_kwargs=[shared | {"first_slot": first_slot + w * envs_per_worker} for w in range(num_workers)],
        num_sub_threads=1,
        mp_start_method="spawn",
    )
