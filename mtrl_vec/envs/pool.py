"""`SimulatorPool`: worker processes that each hold a batch of simulations, as one TorchRL environment.

Shapes: ``W`` workers, ``E`` rows per worker, ``B`` environments, ``K`` tasks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase, ParallelEnv

from mtrl_vec.envs.channel import call, receive, send
from mtrl_vec.envs.rollout import SharedRollout
from mtrl_vec.errors import InputError, WorkerDied
from mtrl_vec.processes import LOST, START_METHOD, deferred_interrupts
from mtrl_vec.timing import Timer

_STEP = call(("rollouts", "step"))

Policy = Callable[[TensorDictBase], TensorDictBase]
"""Adds actions to what environments observe."""


class _Group(NamedTuple):
    """Workers that simulate at the same time."""

    workers: slice
    rows: slice  # their environments


_EVERYONE = _Group(slice(None), slice(None))


class SimulatorPool(ParallelEnv):
    """`ParallelEnv` that collects rollouts without copies, and whose parent sleeps while the workers simulate.

    `collect` is what training uses: workers write to shared memory, and the parent sleeps until their answers come.

    In the steps of TorchRL's interface the parent polls the workers' shared done flags without a pause and so takes a
    core from them. Even a look every 50 us costs a fifth of their speed where they want every core. But a step takes
    about as long as the one before: so sleep for most of that, and poll only towards the end.

    An interruption (Ctrl-C) of anything that waits for workers ends them, and closes the pool.

    Where ``B`` is not a multiple of ``W``, the first workers hold one environment more than the others, whose last row
    is then idle: an observation of zeros of the first task, never done. `rows` tells the environments from idle rows.

    Args:
        create_env: see `ParallelEnv`.
        env_kwargs: of each worker, with ``num_envs`` and ``num_rows``.
    """

    POLL_SECONDS = 1e-4
    SLEEP_SHARE = 0.85  # of the shortest of the last waits
    CHECK_SECONDS = 0.2  # between looks for dead workers
    SHUTDOWN_SECONDS = 10.0
    timer: Timer | None = None
    """Counts the section ``simulate``, waiting for the workers, if there is one."""
    pinned = False
    """Let a GPU read the rollouts that are collected directly, see `SharedRollout`."""
    _shortest_wait = 0.0
    _rollouts: Sequence[SharedRollout] = ()
    _messages: Sequence[bytes] = ()  # to a worker, one for each step
    _collected = 0
    _now: TensorDict
    _processes: Sequence[psutil.Process] = ()

    def __init__(self, create_env: Callable[..., EnvBase], env_kwargs: Sequence[dict[str, Any]]) -> None:
        self.envs_per_worker = [kwargs["num_envs"] for kwargs in env_kwargs]
        """Environments of each worker, ``B`` in sum."""
        super().__init__(
            len(env_kwargs),
            create_env,
            create_env_kwargs=list(env_kwargs),
            num_sub_threads=1,
            mp_start_method=START_METHOD,
            daemon=True,  # else a script that fails before `close` waits for them at its end, for ever
        )

    @property
    def rows(self) -> torch.Tensor | None:
        """[B] which of the ``W * E`` rows are environments; None if all are."""
        num_rows = max(self.envs_per_worker)
        if min(self.envs_per_worker) == num_rows:
            return None
        live = torch.arange(num_rows) < torch.tensor(self.envs_per_worker)[:, None]  # [W, E]
        return live.flatten().nonzero().flatten()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [] if self.is_closed else [process.pid for process in self._workers]

    def _start_workers(self) -> None:
        self._messages = ()  # new workers know of no rollouts
        # It would take threads from the learner for good, or give the parent more than it has just now.
        self.num_threads = torch.get_num_threads()
        if START_METHOD == "forkserver":
            multiprocessing.set_forkserver_preload(["mtrl_vec.envs"])
        with deferred_interrupts():
            try:
                super()._start_workers()
            except (OSError, EOFError) as error:  # no memory for another process, or nothing left to copy it from
                with contextlib.suppress(Exception):
                    self._cleanup_failed_worker_startup()
                raise WorkerDied(f"simulation workers cannot be started ({error or type(error).__name__})") from error
        try:
            self._processes = [psutil.Process(process.pid) for process in self._workers]
        except psutil.Error as error:
            raise WorkerDied("a simulation worker died right after its start") from error

    def _cleanup_failed_worker_startup(self) -> None:
        workers = list(self._workers)
        deadline = time.monotonic() + 2.0
        while all(process.is_alive() for process in workers) and time.monotonic() < deadline:
            time.sleep(0.01)  # it has closed its pipe and is about to end
        dead = next((worker for worker, process in enumerate(workers) if not process.is_alive()), None)
        self._terminate_and_join_workers(workers, timeout=2.0)
        super()._cleanup_failed_worker_startup()
        if dead is not None:
            exit_code = workers[dead].exitcode
            hint = "; does your script have an 'if __name__ == \"__main__\":' guard?" if exit_code == 1 else ""
            raise WorkerDied(f"simulation worker {dead} died with exit code {exit_code} while it started{hint}")

    def envs_per_group(self, num_groups: int) -> list[int]:
        """Environments of each of ``num_groups`` groups of workers, for `collect`. Some may have one worker more.

        Raises:
            InputError: there are fewer workers than groups.
        """
        return [group.rows.stop - group.rows.start for group in self._groups(num_groups)]

    def collect(self, policies: Policy | Sequence[Policy], num_steps: int) -> TensorDict:
        """Step all environments with a policy, new episodes included: a rollout [B, T] without idle rows.

        With several policies the workers are divided into as many groups, in order, see `envs_per_group`. Each policy
        acts for its group while the other groups simulate, in turn: double-buffered sampling (Petrenko et al. 2020,
        "Sample Factory"). The simulations are the same.

        A rollout continues from the last reset, `restore`, or rollout. Its memory is used again by the rollout after
        the next.

        Args:
            policies: add ``action`` and whatever else is to be kept to a TensorDict [n] with ``observation``,
                ``task_one_hot`` and ``task_idx``, which they must not change. ``n`` is ``B`` for one policy.
            num_steps: ``T``.

        Raises:
            InputError: there is not enough shared memory, or there are fewer workers than policies.
            WorkerDied: a worker exited on its own.
        """
        policies = policies if isinstance(policies, Sequence) else [policies]
        if self.is_closed:
            self.reset()
        with self._naming_the_dead():
            if len(self._messages) != num_steps:
                self._share_rollouts(num_steps)
            rollout = self._rollouts[self._collected % 2]
            groups = self._groups(len(policies))
            turns = [(group, p, rollout.states(group.rows)) for group, p in zip(groups, policies, strict=True)]
            self._ask(("rollouts", "begin"), [(self._collected % 2,)] * self.num_workers)
            busy: deque[_Group] = deque()
            try:
                for t, message in enumerate(self._messages):
                    for group, policy, states in turns:
                        if t:
                            self._receive(busy.popleft())  # the same group
                        rollout.keep(t, group.rows, policy(states[t]))
                        self._send(group, message)
                        busy.append(group)
                while busy:
                    self._receive(busy.popleft())
            except Exception:  # of a policy: unread answers would pass for those of the next call
                for group in busy:
                    self._receive(group)
                raise
            self._collected += 1
            return rollout.result()

    def look(self) -> TensorDict:
        """Where all environments are: a TensorDict [B] of what a policy reads, valid until the next step.

        Raises:
            WorkerDied: a worker exited on its own.
        """
        with self._naming_the_dead():
            if len(self._messages) != 1:
                self._share_rollouts(1)
            self._ask(("rollouts", "begin"), [(0,)] * self.num_workers)
            self._now = self._rollouts[0].result()[:, 0]
            return self._now

    def step_in_place(self, action: torch.Tensor) -> TensorDict:
        """Take one step after a `look`, with actions [B, 4]; new episodes begin where one is over.

        Returns:
            [B] where the environments are then, and as ``next`` what the step brought; valid until the next one.

        Raises:
            WorkerDied: a worker exited on its own.
        """
        with self._naming_the_dead(look_first=False):  # which costs 11 us a worker
            self._now["action"].copy_(action)
            self._send(_EVERYONE, _STEP)
            self._receive(_EVERYONE)
            return self._now

    def _groups(self, count: int) -> list[_Group]:
        if not 1 <= count <= self.num_workers:
            raise InputError(f"{self.num_workers} workers cannot be divided into {count} groups: give one to each")
        of_envs = [0, *np.cumsum(self.envs_per_worker).tolist()]
        of_workers = [self.num_workers * group // count for group in range(count + 1)]
        return [_Group(slice(a, b), slice(of_envs[a], of_envs[b])) for a, b in pairwise(of_workers)]

    def _send(self, group: _Group, message: bytes) -> None:
        send(self.parent_channels[group.workers], message)

    def _receive(self, group: _Group) -> None:
        with self._simulating():
            receive(self.parent_channels[group.workers])

    def _simulating(self) -> contextlib.AbstractContextManager[object]:
        return self.timer("simulate") if self.timer else contextlib.nullcontext()

    def _share_rollouts(self, num_steps: int) -> None:
        num_envs, num_tasks = sum(self.envs_per_worker), self.observation_spec["task_one_hot"].shape[-1]
        self._rollouts = [SharedRollout(num_envs, num_steps, num_tasks, self.pinned) for _ in range(2)]
        ends = np.cumsum(self.envs_per_worker).tolist()
        for channel, start, end in zip(self.parent_channels, [0, *ends], ends, strict=False):
            channel.send((("rollouts", "attach"), (([r.part(start, end) for r in self._rollouts],), {})))
            channel.recv()  # one after the other: each tensor on its way takes a file descriptor
        self._messages = [call(("rollouts", "advance"), t) for t in range(num_steps)]

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """As in `ParallelEnv`. Raises `WorkerDied`."""
        with self._simulating(), self._naming_the_dead():
            return super().step_and_maybe_reset(tensordict)

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """As in `ParallelEnv`. Raises `WorkerDied`."""
        with self._naming_the_dead():
            return super().set_seed(seed, static_seed=static_seed)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        with self._naming_the_dead():
            return super()._step(tensordict)

    def _reset(self, tensordict: TensorDictBase, **options: Any) -> TensorDictBase:
        with self._naming_the_dead():
            result = super()._reset(tensordict, **options)
        self._shortest_wait = 0.0  # a reset is no step, and steps may take longer from here on
        return result

    def set_task_probs(self, task_probs: NDArray[np.float64] | None) -> None:
        """Draw the task of every new episode with these probabilities [K]; None: environments keep their tasks.

        Raises:
            InputError: not a probability distribution.
            WorkerDied: a worker exited on its own.
        """
        k = self.observation_spec["task_one_hot"].shape[-1]
        if task_probs is not None and not (
            np.shape(task_probs) == (k,) and np.min(task_probs) >= 0 and np.isclose(np.sum(task_probs), 1)
        ):
            raise InputError(f"task_probs is {task_probs}: give {k} non-negative numbers that sum to 1")
        if self.is_closed:
            self.start()
        self._ask("set_task_probs", [(task_probs,)] * self.num_workers)

    def snapshot(self) -> dict[str, NDArray]:
        """Exact state of all environments, arrays of ``B`` rows: see `mtrl_vec.sim.SimBatch.snapshot`.

        Raises:
            WorkerDied: a worker exited on its own.
        """
        parts = self._ask("snapshot", [()] * self.num_workers)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        """Continue from a `snapshot`, also from one of a pool with another number of workers; starts them if needed.

        The next reset starts no new episodes but returns the last observations.

        Raises:
            WorkerDied: a worker exited on its own.
        """
        if self.is_closed:
            self.start()
        ends = np.cumsum(self.envs_per_worker)[:-1]
        split = {name: np.split(array, ends) for name, array in snapshot.items()}
        self._ask("restore", [({name: parts[w] for name, parts in split.items()},) for w in range(self.num_workers)])

    def _ask(self, method: str | tuple[str, ...], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every worker's environment, or of an attribute of it.

        TorchRL's own state dictionaries leave done flags set.
        """
        with self._naming_the_dead():
            for channel, args in zip(self.parent_channels, arguments, strict=True):
                channel.send((method, (args, {})))
            return [channel.recv()[1] for channel in self.parent_channels]

    @contextlib.contextmanager
    def _naming_the_dead(self, look_first: bool = True) -> Iterator[None]:
        started = not self.is_closed  # else TorchRL is about to start them
        if started and look_first:
            self._check_alive(range(self.num_workers))
        try:
            yield
        except (OSError, EOFError, RuntimeError):  # it may have died just now, and its process be about to end
            deadline = time.monotonic() + 1.0
            while started and time.monotonic() < deadline:
                self._check_alive(range(self.num_workers))
                time.sleep(0.01)
            raise
        except Exception:
            raise
        except BaseException:  # interrupted: answers that nobody has read would pass for those of the next call
            with deferred_interrupts():
                self.close(raise_if_closed=False)
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
            try:
                alive, exit_code = process.is_alive(), process.exitcode
            except ValueError:  # TorchRL has noticed as well, and given it up
                alive, exit_code = False, None
            if not alive and exit_code == LOST and self._processes[worker].is_running():
                raise WorkerDied("the fork server of the simulation workers died")
            if not alive:
                pid = self._processes[worker].pid
                raise WorkerDied(f"simulation worker {worker} (pid {pid}) died with exit code {exit_code}")

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
        for process in self._processes:  # where nothing is left that would end them for us
            with contextlib.suppress(psutil.Error):
                process.kill()
        del self._workers, self.parent_channels, self.shared_tensordicts, self.shared_tensordict_parent
        self._cuda_events = self._events = self.event = None
