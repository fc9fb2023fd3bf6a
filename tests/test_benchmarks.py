"""The benchmarks of the learner: what they time is what it is called, and they run."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import gpu
import learner
import pytest
import ranks
import routing
import scaling
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
    config = TrainConfig.of(num_epochs=6, num_minibatches=6)
    found = ranks.weak_scaling(config, {"iteration": 2.0, "frames": 360 * 32}, sent)
    # Alone 1.608 s. Eight ranks: 14 messages of a ring, so 14 ms latency and 14 ms transfer a sum; 1.008 s and 0.224 s.
    assert found[2] == pytest.approx(0.804)
    assert found[8] == pytest.approx(1.608 / 2.840)
    assert list(found) == [2, 8, 64]


def test_steps_for_a_gpu_fail_alone_and_end_in_time(tmp_path, monkeypatch, capsys) -> None:
    """And find what is in wheels."""
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "answer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("answer.py", "value = 42")
    steps = {
        "broken": gpu.Step(("-c", "raise SystemExit('it is broken')"), 60, "nothing"),
        "endless": gpu.Step(("-c", "import time; print('it began', flush=True); time.sleep(60)"), 5, "nothing"),
        "fine": gpu.Step(("-c", "import answer, mtrl_vec; print(f'{answer.value}')"), 60, "the answer"),
        "impossible": gpu.Step(("-c", ""), 60, "nothing", needs="no_such_package"),
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    out, wheels = tmp_path / "out", str(tmp_path / "wheels")
    assert gpu.main(["--steps", *steps, "--out", str(out), "--wheels", wheels]) == 1
    rows = [line.split(" | ") for line in capsys.readouterr().out.split("|---|\n")[1].splitlines()]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("| broken", "exit 1", "it is broken |"),
        ("| endless", "over 5 s", "it began |"),
        ("| fine", "done", "42 |"),
        ("| impossible", "left out: no no_such_package", " |"),
    ]
    with tarfile.open(out / "results.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["broken.log", "endless.log", "fine.log", "steps.json"]
    assert gpu.main(["--steps", "fine", "--out", str(out), "--wheels", wheels]) == 0
    monkeypatch.setattr(gpu, "PLANS", {1: ("endless", "fine")})
    monkeypatch.setattr(gpu, "SPARE", 58)
    assert gpu.main(["--minutes", "1", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "| endless | over 1 s |" in printed and "| fine | left out: no time left |" in printed
    monkeypatch.setattr(gpu, "PLANS", {1: ("fine",)})
    monkeypatch.setattr(gpu, "SPARE", 60)
    assert gpu.main(["--minutes", "1", "--out", str(out)]) == 1  # what was planned has not been done
    assert "42" not in capsys.readouterr().out  # of the step's earlier log
    with pytest.raises(SystemExit):
        gpu.main(["--steps", "fien"])
    assert "there is no step 'fien'" in capsys.readouterr().err


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


def test_the_model_of_scaling_by_hand() -> None:
    """360 environments, 32 steps and 6 epochs on 4 cores with 3 workers; learning is half serial."""
    parts = scaling.Parts(
        simulate=1e-4, infer=5e-6, snapshot=1e-5, advantages=1e-6, one_thread=30e3, two_threads=40e3,
        parent=(1e-4, 1e-5), sum=(1e-4, 1e-3),
    )  # fmt: skip
    config = TrainConfig.of(num_epochs=6, num_minibatches=6)
    # Collecting 0.44936 s: 32 steps of 12 ms, 0.13 ms and 1.8 ms, and a snapshot of 3.6 ms. Learning 1.45152 s: 11,520
    # frames of 1 us, and six samples at 48,000 a second.
    assert scaling.predict(parts, config, cores=4) == scaling.Prediction(pytest.approx(6060.35, abs=0.01), "updates")
    # Two ranks of two cores and two workers, with 36 sums; and a GPU, which takes over acting and learning.
    # 0.64104 s and 1.73952 s, and 36 ms of sums.
    both = scaling.predict(parts, config, cores=4, ranks=2)
    assert both.speed == pytest.approx(9534.21, abs=0.01)
    # Four such ranks: 36 sums of three times 0.1 ms and of 1.5 times 0.9 ms, 59.4 ms.
    four = scaling.predict(parts, config, cores=8, ranks=4)
    assert four.speed == pytest.approx(4 * 11520 / (0.64104 + 1.73952 + 0.0594), abs=0.01)
    # 0.40136 s, 2.304 ms of advantages, and 36 steps of 0.25 ms, since 1,920 samples take less; 76,800 take 3.84 ms.
    on_gpu = scaling.predict(parts, config, cores=4, gpu=scaling.Gpu())
    assert on_gpu.speed == pytest.approx(11520 / 0.412664, abs=0.1) and on_gpu.bound == "simulation"
    large = scaling.predict(parts, config.replace(num_steps=32 * 40), cores=4, gpu=scaling.Gpu())
    assert large.speed == pytest.approx(40 * 11520 / (40 * 0.39776 + 0.0036 + 40 * 0.002304 + 36 * 3.84e-3), rel=1e-6)
