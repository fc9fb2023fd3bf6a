"""The TorchRL environment: specs, partial resets, and worker processes against a single batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from mtrl_vec.envs import MetaWorldEnv, make_env
from mtrl_vec.envs.rollout import SharedRollout
from mtrl_vec.errors import InputError, WorkerDied


def test_specs() -> None:
    check_env_specs(MetaWorldEnv(num_envs=6))
    check_env_specs(MetaWorldEnv(["push"], num_envs=2))
    check_env_specs(MetaWorldEnv(num_envs=4, num_rows=5))


def test_step_carries_everything() -> None:
    env = MetaWorldEnv(num_envs=6, max_episode_steps=2)
    td = env.reset()
    assert td["observation"].shape == (6, 39) and td["observation"].dtype == torch.float32
    assert td["task_idx"].tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(td["task_one_hot"], torch.eye(3).repeat(2, 1))
    td["action"] = torch.zeros(6, 4)
    nxt = env.step(td)["next"]
    assert nxt["reward"].shape == nxt["success"].shape == nxt["truncated"].shape == (6, 1)
    assert not nxt["done"].any()


def test_partial_reset_keeps_the_others_and_next_holds_the_true_last_observation() -> None:
    env = MetaWorldEnv(num_envs=3, max_episode_steps=4)
    td = env.reset()
    env.sim.elapsed[:] = [0, 2, 0]
    for _ in range(2):
        td["action"] = torch.rand(3, 4) * 2 - 1
        out, td = env.step_and_maybe_reset(td)
    assert out["next", "truncated"].squeeze(-1).tolist() == [False, True, False]
    assert not out["next", "terminated"].any()
    last, first = out["next", "observation"], td["observation"]
    assert torch.equal(last[[0, 2]], first[[0, 2]])
    assert not torch.equal(last[1], first[1])
    assert torch.equal(first[1, :18], first[1, 18:36])  # a first frame is stacked onto itself
    assert not torch.equal(last[1, :18], last[1, 18:36])
    assert not td["done"].any()


ENTRIES = ("observation", "reward", "success", "truncated", "terminated", "done", "unstable", "task_one_hot")


def rows_of(env, values: torch.Tensor) -> torch.Tensor:
    """The environments' rows of values [W, E, ...] or [B, ...], [B, ...]."""
    flat = values.flatten(0, env.batch_dims - 1)
    return flat if getattr(env, "rows", None) is None else flat[env.rows]


def rollout(env, num_envs: int, steps: int, seed: int = 0) -> torch.Tensor:
    """First observations, then what steps of seeded random actions bring, with automatic resets: [steps + 1, B, 48].

    Idle rows are given actions that no environment gets; all that they tell is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    td, result = env.reset(), []
    for t in range(steps + 1):
        if t:
            action = torch.full((env.batch_size.numel(), 4), torch.nan)
            index = slice(None) if getattr(env, "rows", None) is None else env.rows
            action[index] = torch.rand(num_envs, 4, generator=generator) * 2 - 1
            td["action"] = action.view(*env.batch_size, 4)
            out, td = env.step_and_maybe_reset(td)
            now = out["next"]
        else:
            now = td.clone()
            now["reward"] = torch.zeros(*env.batch_size, 1)
        result.append(torch.cat([rows_of(env, now[name].float()) for name in ENTRIES], -1))
        check_idle_rows(env, now)
        check_idle_rows(env, td)
    return torch.stack(result)


def check_idle_rows(env, td) -> None:
    """Zero, hence of the first task, and never done."""
    rows = getattr(env, "rows", None)
    idle = torch.ones(env.batch_size.numel(), dtype=torch.bool)
    idle[slice(None) if rows is None else rows] = False
    for name in {*ENTRIES, "task_idx"} & set(td.keys()):
        values = td[name].flatten(0, env.batch_dims - 1)[idle]
        if name == "task_one_hot":
            assert (values == torch.tensor([1.0, 0.0, 0.0])).all()
        else:
            assert not values.any(), name


def test_workers_change_nothing() -> None:
    single = MetaWorldEnv(num_envs=6, seed=5, max_episode_steps=12, random_phase=True)
    expected = rollout(single, 6, 30)
    assert expected[..., 41].sum() > 10  # resets are part of what is compared
    for workers in (1, 2):
        env = make_env(num_workers=workers, envs_per_worker=6 // workers, seed=5, max_episode_steps=12)
        try:
            assert env.batch_size == (workers, 6 // workers) and env.rows is None
            assert torch.equal(rollout(env, 6, 30), expected)
        finally:
            env.close()


def test_workers_hold_any_number_of_environments_each() -> None:
    """Four environments of three tasks in a worker: the next worker goes on with the next task."""
    expected = rollout(MetaWorldEnv(num_envs=8, seed=5, max_episode_steps=12, random_phase=True), 8, 15)
    env = make_env(num_workers=2, envs_per_worker=4, seed=5, max_episode_steps=12)
    try:
        assert env.batch_size == (2, 4) and env.rows is None
        assert torch.equal(rollout(env, 8, 15), expected)
        assert env.reset()["task_idx"].tolist() == [[0, 1, 2, 0], [1, 2, 0, 1]]
    finally:
        env.close()


@pytest.mark.parametrize(
    ("workers", "shape", "rows"),
    [
        (2, (2, 4), [0, 1, 2, 3, 4, 5, 6]),
        (3, (3, 3), [0, 1, 2, 3, 4, 6, 7]),
        (9, (7, 1), None),  # no more workers than environments
    ],
)
def test_environments_that_neither_tasks_nor_workers_divide(workers, shape, rows) -> None:
    """In their rows the numbers of one batch, whatever idle rows are told to do; see also `check_idle_rows`."""
    options = {"seed": 5, "max_episode_steps": 12, "random_phase": True}
    single = MetaWorldEnv(num_envs=7, **options)
    env, other = (make_env(num_workers=w, num_envs=7, **options | {"seed": seed}) for w, seed in ((workers, 5), (4, 6)))
    probs = np.array([0.2, 0.3, 0.5])
    try:
        assert env.batch_size == shape and len(env.pids) == 0
        assert env.rows is None if rows is None else env.rows.tolist() == rows
        expected = rollout(single, 7, 30)
        assert expected[..., 41].sum() > 10
        assert torch.equal(rollout(env, 7, 30), expected)
        assert len(env.pids) == shape[0]
        for one in (single, env, other):
            one.set_task_probs(probs)
        assert torch.equal(rollout(env, 7, 15, seed=1), rollout(single, 7, 15, seed=1))
        # The state of all, to go on from in another number of workers.
        snapshot = env.snapshot()
        for name, array in single.snapshot().items():
            np.testing.assert_array_equal(snapshot[name], array, err_msg=name)
            assert len(array) == 7
        rollout(other, 7, 3, seed=9)  # another past
        other.restore(snapshot)
        single.restore(snapshot)
        continued = rollout(other, 7, 20, seed=2)
        assert torch.equal(continued[0, :, :39], torch.from_numpy(snapshot["observation"]).float())
        assert torch.equal(continued, rollout(single, 7, 20, seed=2))
    finally:
        env.close()
        other.close()


def test_a_policy_acts_for_one_half_while_the_other_simulates() -> None:
    """In one step the first half's worker is stopped until the second half's policy is called."""
    env = make_env(num_workers=3, num_envs=7)
    sizes = env.envs_per_group(2)
    assert sizes == [3, 4]  # one worker of three environments, two of two
    steps, late = [0, 0], []

    def give_up() -> None:
        late.append(True)
        os.kill(env.pids[0], signal.SIGCONT)

    timer = threading.Timer(20, give_up)

    def act(half: int, td) -> object:
        steps[half] += 1
        if steps[half] == 3 and half == 0:
            timer.start()
            os.kill(env.pids[0], signal.SIGSTOP)
        if steps[half] == 3 and half == 1:
            timer.cancel()
            assert not late, "the second half waits for the first one"
            os.kill(env.pids[0], signal.SIGCONT)
        return td.set("action", torch.rand(sizes[half], 4) - 0.5)

    try:
        env.reset()
        rollout = env.collect([lambda td, half=half: act(half, td) for half in (0, 1)], 6)
        assert steps == [6, 6] and rollout["next", "reward"].all()
    finally:
        timer.cancel()
        env.close()


def test_a_policy_that_fails_leaves_the_simulators_usable() -> None:
    """Also while the other half has not answered yet: its answers would pass for those of the next call."""
    env, calls = make_env(num_workers=2, num_envs=4, random_phase=False), []

    def act(td) -> object:
        calls.append(td)
        if len(calls) == 4:
            raise ZeroDivisionError
        return td.set("action", torch.zeros(2, 4))

    try:
        env.reset()
        with pytest.raises(ZeroDivisionError):
            env.collect([act, act], 5)
        assert env.snapshot()["elapsed"].tolist() == [2, 2, 1, 1]
        assert env.collect([act, act], 5)["next", "reward"].all()
        assert env.snapshot()["elapsed"].tolist() == [7, 7, 6, 6]
    finally:
        env.close()


def test_more_groups_than_workers_are_refused() -> None:
    env = make_env(num_workers=2, num_envs=4)
    with pytest.raises(InputError, match="2 workers cannot be divided into 3 groups"):
        env.envs_per_group(3)
    env.close(raise_if_closed=False)


def test_an_interruption_between_messages_closes_the_pool(monkeypatch) -> None:
    """The second worker has not been told to do anything: whoever waits for its answer waits for ever."""
    env, write, calls = make_env(num_workers=2, num_envs=4), os.write, []

    def interrupted(place: int, message: bytes) -> int:
        calls.append(place)
        if len(calls) == 4:  # of the second step
            raise KeyboardInterrupt
        return write(place, message)

    try:
        env.reset()
        env.collect(lambda td: td.set("action", torch.zeros(4, 4)), 3)
        monkeypatch.setattr("mtrl_vec.envs.channel.os.write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            env.collect(lambda td: td.set("action", torch.zeros(4, 4)), 3)
        assert env.is_closed
    finally:
        env.close(raise_if_closed=False)


def test_too_little_shared_memory_is_said_in_one_line(monkeypatch) -> None:
    """What torch raises where /dev/shm is full, which cannot be had here."""

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(
        InputError, match=r"^no shared memory for a rollout of 360 environments and 32 steps: it takes 4 MB"
    ):
        SharedRollout(360, 32, 3)


class CudaRuntime:
    """Registers memory without a GPU, as often as it is told to, see `torch.cuda.cudart`."""

    def __init__(self, accepts: int) -> None:
        self.accepts, self.registered = accepts, {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        if len(self.registered) == self.accepts:
            return 2
        self.registered[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0


def test_pinned_rollouts_are_registered_with_cuda_until_their_memory_is_freed(monkeypatch) -> None:
    runtime = CudaRuntime(accepts=100)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    shared = SharedRollout(6, 4, 3, pinned=True)
    rollout = shared.result()
    assert all(t.is_shared() for t in rollout.values(include_nested=True, leaves_only=True))
    assert runtime.registered == {t.data_ptr(): t.nbytes for t in rollout.values(include_nested=True, leaves_only=True)}
    del shared
    assert len(runtime.registered) == 11  # the rollout is still there
    del rollout
    assert not runtime.registered


def test_rollouts_that_cuda_does_not_pin_are_used_as_they_are(monkeypatch) -> None:
    runtime, launches = CudaRuntime(accepts=1), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    zeros = torch.zeros

    def pending_error(*size: int, **options: object) -> torch.Tensor:
        if "device" not in options:
            return zeros(*size, **options)
        launches.append(options["device"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", pending_error)
    with pytest.warns(UserWarning, match=r"^continuing without pinned rollouts: cudaHostRegister failed \(2\)$"):
        shared = SharedRollout(6, 4, 3, pinned=True)
    assert launches == ["cuda"] and shared.result().shape == (6, 4)


@pytest.mark.parametrize("call", ["step_and_maybe_reset", "step", "reset"])
def test_a_dead_worker_is_named(call) -> None:
    env = make_env(num_workers=2, envs_per_worker=3)
    try:
        td = env.reset()
        victim = env.pids[1]
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
        td["action"] = torch.zeros(2, 3, 4)
        with pytest.raises(WorkerDied, match=rf"worker 1 \(pid {victim}\)"):
            getattr(env, call)(td)
    finally:
        processes = list(env._workers)
        env.close()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["fly"]}, "unknown task"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"envs_per_worker": 0}, "envs_per_worker is 0"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"max_episode_steps": 0}, "max_episode_steps is 0"),
        ({"seed": -1}, "seed is -1: it must be between 0 and 4294967295"),
        ({"goals_seed": -1}, "goals_seed is -1: it must be between 0 and 4294967295"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_env(**arguments)


@pytest.mark.parametrize("given", [None, "5"])
def test_workers_wait_for_weeks_unless_told_otherwise(given) -> None:
    """TorchRL's give up after 10,000 s without a message."""
    program = "import mtrl_vec.envs, torchrl._utils; print(torchrl._utils.BATCHED_PIPE_TIMEOUT)"
    environment = {name: value for name, value in os.environ.items() if name != "BATCHED_PIPE_TIMEOUT"}
    environment |= {} if given is None else {"BATCHED_PIPE_TIMEOUT": given}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert float(found.stdout) == (2e6 if given is None else 5)


def test_a_script_that_fails_ends_with_its_error(tmp_path) -> None:
    """Instead of waiting for workers that nobody has closed."""
    script = tmp_path / "script.py"
    script.write_text(
        "from mtrl_vec import make_env\n"
        "if __name__ == '__main__':\n"
        "    env = make_env(num_workers=2, num_envs=4)\n"
        "    env.reset()\n"
        "    raise SystemExit('something else is wrong')\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "something else is wrong" in result.stderr
