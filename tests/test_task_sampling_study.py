"""The study of task sampling: what it reads from runs, what it skips and goes on with, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import curves
import learning
import numpy as np
import pytest
import task_sampling
import task_sampling_cost

from mtrl_vec.commands.parsing import parse_train
from mtrl_vec.errors import InputError
from mtrl_vec.policy.checkpoint import save_checkpoint
from mtrl_vec.train.resolve import resolve

REACH, PUSH, PICK_PLACE = learning.TASK_NAMES


def metrics_of(reach: list[float], others: list[float], fraction: list[float]) -> dict[str, np.ndarray]:
    """Metrics of a run: success of reach and of the others, and how much of the frames pick-place has.

    Push has a tenth, reach the rest of them; and reach is evaluated once, third, with success on 65 %.
    """
    rows = np.arange(1, len(reach) + 1)
    success = {f"train/{task}/success_rate": np.array(others) for task in (PUSH, PICK_PLACE)}
    columns = {"frames": 100 * rows, "time/elapsed": 90.0 * rows, "time/sps": 10.0 * rows**2}
    rest = {
        f"train/{PICK_PLACE}/frame_fraction": np.array(fraction),
        f"train/{PUSH}/frame_fraction": np.full(len(rows), 0.1),
        f"train/{REACH}/frame_fraction": (0.9 - np.array(fraction)).round(6),
        f"eval/{REACH}/success_rate": np.where(rows == 3, 0.65, np.nan),
    }
    return columns | success | rest | {f"train/{REACH}/success_rate": np.array(reach)}


def test_figures_by_hand() -> None:
    metrics = metrics_of(
        [math.nan, 0.5, 0.9, 0.8, 0.6, 0.7], [0.0, 0.9, 0.9, 0.95, 1, 1], [0.3, 0.3, 0.5, 0.6, 0.85, 0.4]
    )
    assert task_sampling.first_success(metrics, 0.9) == (300, 4.5)  # 0.9, 0.9, 0.9
    assert all(math.isnan(value) for value in task_sampling.first_success(metrics, 0.95))
    assert task_sampling.first_success(metrics, 0.6, np.min) == (300, 4.5)  # the lower one: -, 0.5, 0.9
    assert task_sampling.steps_per_second(metrics) == 125.0  # of 10, 40, 90, 160, 250, 360
    # Once reach was at 0.9, pick-place had most of the frames twice.
    assert task_sampling.forgetting(metrics, REACH, PICK_PLACE) == 0.6
    # Not sampled at all, its rate in training says nothing; and the evaluation does.
    unseen = metrics_of([0.9, 0.9, 0.5, 1], [0, 0, 0, 1], [0, 0.9, 0.9, 0.9])
    assert task_sampling.forgetting(unseen, REACH, PICK_PLACE) == 0.65
    assert math.isnan(task_sampling.first_success(unseen, 0.9)[0])
    again = metrics_of([1.0] * 12, [1.0] * 12, [0.0, *[0.3] * 11])
    assert task_sampling.first_success(again, 0.9) == (1100, 16.5)  # after ten with all tasks
    assert math.isnan(task_sampling.forgetting(metrics_of([0.5, 0.5], [0, 0], [1, 1]), REACH, PICK_PLACE))
    assert math.isnan(task_sampling.forgetting(metrics_of([1, 0.5], [0, 0], [0.3, 0.3]), REACH, PICK_PLACE))


def test_screening_first_and_finals_by_seed() -> None:
    cells = task_sampling.cells(
        task_sampling.Args(only=("uniform", "meta"), finalists=("uniform", "pcgrad"), final_frames=7_500_000)
    )
    assert list(cells) == ["uniform", "meta", *(f"{n}-7.5M-seed{s}" for s in (1, 2, 3) for n in ("uniform", "pcgrad"))]
    meta, pcgrad = (parse_train(cells[name]) for name in ("meta", "pcgrad-7.5M-seed3"))
    assert (meta.sampling.name, meta.seed, meta.total_frames) == ("meta", 1, 2_000_000)
    assert (pcgrad.learner.gradient_method, pcgrad.seed, pcgrad.total_frames) == ("pcgrad", 3, 7_500_000)
    assert pcgrad.sampling.name == "uniform" and pcgrad.learner.target_kl == 0.02 and not pcgrad.policy.popart
    (groups,) = task_sampling.finals([{"cell": name} for name in cells]).values()
    assert {name: list(group) for name, group in groups.items()} == {"uniform": [1, 2, 3], "pcgrad": [1, 2, 3]}
    assert list(task_sampling.cells(task_sampling.Args())) == list(task_sampling.METHODS)


def test_finals_by_hand() -> None:
    rows = []
    for seed, frames in ((1, 500_000), (2, 700_000)):
        success = {f"eval/{task}/success_rate": "0.96" for task in learning.TASK_NAMES}
        times = {
            "frames_to_mean_0.9": str(frames),
            "frames_to_all_0.98": str(frames + 100_000),
            "minutes_to_mean_0.9": "1.5",
            "steps_per_second": str(frames / 100),
        }
        rows.append({"cell": f"meta-5M-seed{seed}", **success, **times})
    finals = task_sampling.finals([{"cell": "meta"}, *rows, {"cell": "meta-1M-seed1"}])
    assert list(finals) == ["5M", "1M"]
    lines = task_sampling.report_finals(finals["5M"]).splitlines()
    success = "0.960 (0.960 to 0.960)"
    expected = [
        "meta",
        "2",
        success,
        success,
        success,
        "0.60M (0.50 to 0.70)",
        "0.70M (0.60 to 0.80)",
        "1.5 (1.5 to 1.5)",
    ]
    assert lines[2:] == [f"| {' | '.join(expected)} | 6,000 (5,000 to 7,000) |"]


def test_finals_that_got_nowhere() -> None:
    success = {f"eval/{task}/success_rate": "1" for task in learning.TASK_NAMES}
    rest = success | {"minutes_to_mean_0.9": "nan", "steps_per_second": "9"}
    rows = [rest | final(400_000, math.nan) | {"cell": "meta-1M-seed1"}]
    rows += [rest | final(math.nan, math.nan) | {"cell": "meta-1M-seed2"}]
    line = task_sampling.report_finals(task_sampling.finals(rows)["1M"]).splitlines()[-1]
    assert "| 0.40M (0.40 to 0.40, 1 of 2) | never | never | 9 (9 to 9) |" in line


def final(frames_to_mean: float, frames_to_all: float, frames: int = 1000) -> dict[str, object]:
    return {"frames_to_mean_0.9": str(frames_to_mean), "frames_to_all_0.98": str(frames_to_all), "frames": str(frames)}


def test_pairs_by_hand() -> None:
    uniform = {seed: final(400, 500) for seed in (1, 2, 3, 4, 5, 6, 9)}
    twice_as_fast = {seed: final(200, 500) for seed in (6, 5, 4, 3, 2, 1, 7)}
    twice_as_fast[5] = final(800, math.nan)  # never, so not before 1,000
    two_seeds = {seed: final(200, 200) for seed in (1, 2)}
    groups = {"meta": twice_as_fast, "uniform": uniform, "popart": two_seeds}
    (line,) = task_sampling.report_pairs(groups).splitlines()[2:]
    # 2^(-5/6 + 1/6), and 2^(1/6). Of 64 ways to choose the signs of six equal logarithms, those with at most one that
    # differs from the rest have as large a mean; a single one that is not zero has it always.
    to_mean = ["0.63 (0.50 to 2.00)", "5 / 0 / 1", f"{(2 + 12) / 64:.3f}"]
    to_all = ["1.12 (1.00 to 2.00, 1 never)", "0 / 5 / 1", "1.000"]
    assert line == f"| {' | '.join(['meta / uniform', '6', *to_mean, *to_all])} |"
    assert task_sampling.report_pairs({"uniform": uniform, "popart": two_seeds}) == ""
    assert task_sampling.report_pairs({"meta": twice_as_fast}) == ""


def test_chance_by_hand() -> None:
    assert task_sampling.chance(np.array([1.0, 2.0, 3.0])) == 2 / 8  # all plus or all minus
    # The sum is 4. Of the eight sums, 6 and 4 and their opposites are as far from zero.
    assert task_sampling.chance(np.array([-1.0, 2.0, 3.0])) == 4 / 8


@pytest.fixture
def ran(tmp_path, monkeypatch) -> list[tuple[str, ...]]:
    """The commands that were run, which leave behind what they do; the third one, a training, is interrupted."""
    commands: list[tuple[str, ...]] = []

    def run(command, *arguments):
        commands.append((command, *arguments))
        if command == "eval":
            scores = {f"eval/{task}/success_rate": 0.96 for task in learning.TASK_NAMES}
            scores |= {"eval/mean_success_rate": 0.96, "checkpoint": "best.pt", "frames": 123}
            Path(arguments[-1]).write_text(json.dumps([scores]))
            return
        run_dir = Path(arguments[-1])
        if arguments[0] != "--resume":
            run_dir.mkdir(parents=True)
            config = resolve(parse_train(arguments)).to_dict()
            (run_dir / "config.json").write_text(json.dumps(config))
            save_checkpoint(run_dir / "checkpoint-1.pt", {"config": config, "rollouts": {}})
            if len(commands) == 3:
                raise KeyboardInterrupt
        metrics = metrics_of([0.5, 0.95], [0.8, 0.97], [0.3, 0.3]) | {"time/evaluate": np.ones(2)}
        metrics["frames"] = np.array([400_000, 2_000_000])
        lines = [",".join(metrics), *(",".join(map(str, row)) for row in zip(*metrics.values(), strict=True))]
        (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
        save_checkpoint(run_dir / "best.pt", {"frames": 123, "policy": {}})

    monkeypatch.setattr(learning, "run", run)
    monkeypatch.setattr(task_sampling, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(task_sampling, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(curves, "draw", lambda folder, cells, out: None)
    return commands


def study(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["task_sampling.py", *arguments])
    return task_sampling.main()


def test_finished_cells_are_skipped_and_an_interrupted_one_goes_on(ran, tmp_path, monkeypatch, capsys) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(curves, "draw", lambda folder, cells, out: drawn.append((out.name, *cells)))
    assert study(monkeypatch, "--only", "uniform", "progress") == 130
    cells = [line.split(",")[0] for line in (tmp_path / "results" / "results.csv").read_text().splitlines()]
    assert cells == ["cell", "uniform"]
    capsys.readouterr()
    assert study(monkeypatch, "--only", "uniform", "progress") == 0
    progress = str(tmp_path / "runs" / "progress")
    assert [command[:3] for command in ran] == [
        ("train", "--target-kl", "0.02"),
        ("eval", str(tmp_path / "runs" / "uniform"), "--seeds"),
        ("train", "--target-kl", "0.02"),
        ("train", "--resume", progress),
        ("eval", progress, "--seeds"),
    ]
    table = capsys.readouterr().out
    assert "| uniform | 0.960 | 0.960 | 0.960 | 0.960 | 2.0M | 2.00M | 3.0 | 25 |  |" in table
    assert "| progress | 0.960 |" in table
    assert study(monkeypatch, "--report-only") == 0
    assert capsys.readouterr().out == table and len(ran) == 5
    assert study(monkeypatch, "--only", "uniform", "--finalists", "meta", "--final-seeds", "7") == 0
    assert parse_train(ran[5][1:]).sampling.name == "meta" and parse_train(ran[5][1:]).seed == 7
    assert [command[:5] for command in ran[6:]] == [
        ("eval", str(tmp_path / "runs" / "meta-5M-seed7"), "--seeds", "100", "200"),
    ]
    assert capsys.readouterr().out.startswith(table)
    assert drawn[-2:] == [("screening.png", "uniform", "progress"), ("finals-5M.png", "meta-5M-seed7")]
    assert list(curves.read(tmp_path / "results")) == ["uniform", "progress", "meta-5M-seed7"]


def test_what_is_refused(ran, monkeypatch, capsys) -> None:
    for arguments, message in {
        ("--report-only",): "nothing has been measured yet",
        ("--only", "best"): "unknown method 'best': known are uniform, random",
        ("--finalists", "best"): "unknown method 'best'",
        ("--finalists", "meta", "--final-seeds"): "final_seeds is empty",
        ("--finalists", "meta", "--final-seeds", "-1"): "seed is -1",
        ("--finalists", "meta", "--final-frames", "0"): "total_frames is 0",
    }.items():
        assert study(monkeypatch, *arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert study(monkeypatch, "--only", "uniform") == 0
    assert study(monkeypatch, "--only", "uniform", "--screen-frames", "3000000") == 2
    assert "has other flags" in capsys.readouterr().err


def test_costs_are_ratios_to_uniform_sampling() -> None:
    small = "--num-envs 6 --num-workers 1 --num-steps 8 --num-epochs 1 --num-minibatches 2"
    results = task_sampling_cost.measure(task_sampling_cost.Args(rounds=1, only=("meta", "cagrad"), flags=small))
    assert results["ratio/uniform"] == results["update_ratio/uniform"] == 1
    table = task_sampling_cost.report(results).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| uniform", "| uniform, again", "| meta", "| cagrad"]
    for name in ("meta", "cagrad"):
        assert results[f"ratio/{name}"] == pytest.approx(results[f"seconds/{name}"] / results["seconds/uniform"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"only": ("best",)}, "unknown method 'best'"),
        ({"json": Path("no/x")}, "folder"),
    ],
)
def test_costs_of_bad_input(changes, message) -> None:
    with pytest.raises(InputError, match=message):
        task_sampling_cost.measure(task_sampling_cost.Args(**changes))
