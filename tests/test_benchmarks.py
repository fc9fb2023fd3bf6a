"""The benchmarks of the learner: what they time is what it is called, and they run."""

from __future__ import annotations

from pathlib import Path

import learner
import pytest
import ranks
import routing
import torch

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.policy.routing import TaskHeads


def test_gathered_weights_equal_the_policys_own_routing() -> None:
    torch.manual_seed(0)
    heads, x, task_idx = TaskHeads(5, 16, 8, 4, 1.0), torch.randn(30, 16), torch.randint(5, (30,))
    torch.testing.assert_close(routing.gather_weights(heads, x, task_idx), heads.split(x, task_idx))


def test_routing_times_every_way_and_marks_the_best() -> None:
    rows = routing.measure(routing.Args(num_tasks=(3,), batch_sizes=(24, 48), seconds=0.0, device="cpu"))
    assert [(r["batch_size"], r["way"]) for r in rows] == [
        (size, way) for size in (24, 48) for way in ("gathered", "bmm", "split", "grouped")
    ]
    assert all(r["seconds"] > 0 for r in rows)
    table = routing.report(rows).splitlines()
    assert len(table) == 4 and table[2].startswith("| 3 | 24 |") and table[2].count("**") == 2


def test_the_learner_is_timed_eagerly_in_both_precisions() -> None:
    variants = ("eager_fp32", "eager_bf16")
    sizes = {"minibatch_sizes": (24,), "num_envs": (6,)}
    results = learner.measure(learner.Args(**sizes, variants=variants, rounds=1, device="cpu"))
    for name in variants:
        assert results[f"update_samples_per_second/24/{name}"] > 0
        assert results[f"inference_seconds/6/{name}"] > 0
    assert "| eager_bf16 |" in learner.report(results)


def test_weak_scaling_by_hand(monkeypatch) -> None:
    """36 sums of 10 ms in 2 s, 2 ms of it latency; 32 draws of 1 ms for the environments of a rank."""
    monkeypatch.setattr(ranks, "draw_seconds", lambda environments: {180: 0.001}[environments])
    sent = {"milliseconds": 10.0, "milliseconds_empty": 2.0, "bytes": 1}
    found = ranks.weak_scaling(TrainConfig(), {"iteration": 2.0, "frames": 360 * 32}, sent)
    # Alone 1.608 s. Eight ranks: 14 messages of a ring, so 14 ms latency and 14 ms transfer a sum; 1.008 s and 0.224 s.
    assert found[2] == pytest.approx(0.804)
    assert found[8] == pytest.approx(1.608 / 2.840)
    assert list(found) == [2, 8, 64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minibatch_sizes": (100,)}, "multiple of 24"),
        ({"variants": ("eager_fp16",)}, "no variant 'eager_fp16'"),
        ({"rounds": 0}, "rounds is 0"),
        ({"json": Path("nowhere/out.json")}, "existing folder"),
    ],
)
def test_bad_input(changes, message) -> None:
    with pytest.raises(InputError, match=message):
        learner.measure(learner.Args(**changes, device="cpu"))
