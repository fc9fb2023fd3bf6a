"""Replacing simulators that died, by hand: what is repeated, how often, and what is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mtrl_vec.errors import WorkerDied
from mtrl_vec.train.progress import Progress
from mtrl_vec.train.recovery import Recovery


def recovery_of(max_restarts: int, **counts: int) -> tuple[Recovery, Progress, list[str]]:
    """With what it counts and what it tells."""
    progress, told = Progress(frames_per_batch=1000, num_iterations=9, **counts), []
    recovery = Recovery(max_restarts, progress)
    recovery.notify = told.append
    return recovery, progress, told


def failing(times: int, calls: list[str], name: str, result: object = None) -> Callable[[], object]:
    """A function whose first calls lose a simulator each."""

    def function() -> object:
        calls.append(name)
        if calls.count(name) <= times:
            raise WorkerDied(f"worker {calls.count(name)} died in {name}")
        return result

    return function


def test_without_a_loss_nothing_is_repeated() -> None:
    recovery, progress, told = recovery_of(3)
    calls: list[str] = []
    assert recovery(failing(0, calls, "call", "rollout"), failing(0, calls, "restart")) == "rollout"
    assert (calls, progress.restarts, told) == (["call"], 0, [])


def test_a_restart_comes_before_each_repetition_and_is_told() -> None:
    recovery, progress, told = recovery_of(3, iteration=2)
    calls: list[str] = []
    assert recovery(failing(2, calls, "call", "rollout"), failing(0, calls, "restart")) == "rollout"
    assert calls == ["call", "restart", "call", "restart", "call"]
    assert progress.restarts == 2
    assert told == [
        "worker 1 died in call; continuing after 2,000 frames, restart 1 of at most 3",
        "worker 2 died in call; continuing after 2,000 frames, restart 2 of at most 3",
    ]


def test_restarts_are_counted_over_all_calls() -> None:
    recovery, progress, told = recovery_of(2)
    for number in (1, 2):
        calls: list[str] = []
        assert recovery(failing(1, calls, "call", number), failing(0, calls, "restart")) == number
        assert progress.restarts == number
        progress.iteration += 1
    calls = []
    with pytest.raises(WorkerDied, match=r"^worker 1 died in call, and --max-restarts is 2$"):
        recovery(failing(1, calls, "call"), failing(0, calls, "restart"))
    assert (calls, progress.restarts) == (["call"], 2)
    assert [message.split("; ")[1] for message in told] == [
        "continuing after 0 frames, restart 1 of at most 2",
        "continuing after 1,000 frames, restart 2 of at most 2",
    ]
    assert recovery(failing(0, calls, "other", "still works"), failing(0, calls, "restart")) == "still works"


def test_a_loss_in_a_restart_counts_too() -> None:
    recovery, progress, told = recovery_of(3)
    calls: list[str] = []
    assert recovery(failing(1, calls, "call", "rollout"), failing(2, calls, "restart")) == "rollout"
    assert calls == ["call", "restart", "restart", "restart", "call"]
    assert progress.restarts == 3
    assert [message.split(";")[0] for message in told] == [
        "worker 1 died in call",
        "worker 1 died in restart",
        "worker 2 died in restart",
    ]


def test_restarts_that_always_fail_end_at_the_limit() -> None:
    recovery, progress, told = recovery_of(2)
    calls: list[str] = []
    with pytest.raises(WorkerDied, match=r"^worker 2 died in restart, and --max-restarts is 2$"):
        recovery(failing(1, calls, "call"), failing(9, calls, "restart"))
    assert calls == ["call", "restart", "restart"] and progress.restarts == len(told) == 2


def test_none_are_allowed() -> None:
    recovery, progress, told = recovery_of(0)
    calls: list[str] = []
    with pytest.raises(WorkerDied, match=r"^worker 1 died in call, and --max-restarts is 0$"):
        recovery(failing(1, calls, "call"), failing(0, calls, "restart"))
    assert (calls, progress.restarts, told) == (["call"], 0, [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_other_errors_are_none_of_its_business(error) -> None:
    recovery, progress, told = recovery_of(3)
    calls: list[str] = []

    def call() -> None:
        raise error

    with pytest.raises(error):
        recovery(call, failing(0, calls, "restart"))
    assert (calls, progress.restarts, told) == ([], 0, [])


def test_restarts_before_a_resumption_are_counted_but_not_held_against_it() -> None:
    """The limit is one of this process: a run may be resumed as often as somebody wants to."""
    recovery, progress, told = recovery_of(1, restarts=7)
    calls: list[str] = []
    recovery(failing(1, calls, "call"), failing(0, calls, "restart"))
    assert progress.restarts == 8 and told[0].endswith("restart 1 of at most 1")
