"""The study of learning: what it reads from runs, and what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import curves
import learning
import numpy as np
import pytest
import torch

from helpers import make_batch, make_policy, tiny_config
from mtrl_vec.commands.curves import read_metrics
from mtrl_vec.commands.parsing import parse_train
from mtrl_vec.config import TrainConfig
from mtrl_vec.policy import load_policy
from mtrl_vec.policy.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint
from mtrl_vec.train.resolve import resolve


def resolved(flags: Sequence[str]) -> TrainConfig:
    """The settings that a run with these flags writes down."""
    return resolve(parse_train(flags))


def write_metrics(path: Path, successes: list[float], frames: int = 100) -> None:
    """A row of metrics every 90 seconds."""
    columns = [f"train/{task}/success_rate" for task in learning.TASK_NAMES]
    lines = [",".join(["frames", "time/elapsed", "time/evaluate", *columns])]
    for i, success in enumerate(successes, start=1):
        lines.append(",".join([str(i * frames), str(i * 90), str(i), *[str(success)] * 3]))
    path.write_text("\n".join(lines) + "\n")


def test_frames_and_minutes_until_a_success_rate_was_first_reached(tmp_path) -> None:
    write_metrics(tmp_path / "metrics.csv", [math.nan, 0.5, 0.92, 0.88, 0.97])
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert learning.first_reached(metrics, metrics["train/push-v3/success_rate"] >= 0.9) == (300, 4.5)
    assert all(
        math.isnan(value) for value in learning.first_reached(metrics, metrics["train/push-v3/success_rate"] >= 0.98)
    )


def test_only_a_finished_run_with_the_same_settings_counts_as_trained(tmp_path) -> None:
    wanted = resolved(["--seed", "1", "--total-frames", "250"])
    assert not learning.is_trained(tmp_path, wanted)
    (tmp_path / "config.json").write_text(json.dumps(wanted.replace(run_dir=tmp_path).to_dict()))
    write_metrics(tmp_path / "metrics.csv", [0.1, 0.2])
    assert not learning.is_trained(tmp_path, wanted)
    write_metrics(tmp_path / "metrics.csv", [0.1, 0.2, 0.3])
    assert learning.is_trained(tmp_path, wanted)
    assert not learning.is_trained(tmp_path, wanted.replace(seed=2))
    assert learning.is_trained(tmp_path, wanted.replace(num_workers=7, eval_interval=1000))
    for content in ("{", "[]", '{"seed": 1, "total_frames": 250}'):  # the last one of version 1
        (tmp_path / "config.json").write_text(content)
        assert not learning.is_trained(tmp_path, wanted)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"run_dir": Path("elsewhere"), "num_workers": 7, "eval_interval": 0, "quiet": True}, True),
        ({"precision": "bf16"}, False),
        ({"total_frames": 250}, False),
        ({"lr": 0.1}, False),
        ({"seed": 2}, False),
        ({"sampling": "meta"}, False),
    ],
)
def test_runs_are_the_same_if_they_learn_the_same_for_as_long(changes, same) -> None:
    config = resolved(["--seed", "1"])
    assert learning.is_same_run(config.replace(**changes), config) is same


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "FOLDER", tmp_path)
    monkeypatch.setattr(learning, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(curves, "draw", lambda folder, cells, out: None)
    return tmp_path


def row_of(name: str, success: float) -> learning.Row:
    row: learning.Row = {"cell": name, "frames": 2_000_000, "minutes": 5.0, "eval/mean_success_rate": success}
    for task in learning.TASK_NAMES:
        row |= {f"eval/{task}/success_rate": success}
        row |= {f"{task}/frames_to_{t}": math.nan if t > success else 5e5 for t in learning.THRESHOLDS}
        row |= {f"{task}/minutes_to_{t}": math.nan if t > success else 1.5 for t in learning.THRESHOLDS}
    return row


def test_finished_cells_are_skipped_and_the_others_written_as_they_end(folders, monkeypatch, capsys) -> None:
    measured = []

    def measure(name, flags, eval_seeds, **places):
        measured.append((name, flags))
        if name == "seed3":
            raise RuntimeError("out of memory")
        return row_of(name, 0.95)

    monkeypatch.setattr(learning, "measure", measure)
    monkeypatch.setattr("sys.argv", ["learning.py", "--seeds", "1", "2"])
    assert learning.main() == 0
    table = capsys.readouterr().out
    assert "| seed1 | 0.950 | 0.950 | 0.950 | 0.950 | 2.0M | 5.0 | 0.50M (1.5 min) | never |" in table
    longer = learning.cells(learning.Args(suite="MT50", seeds=(1,), total_frames=12_000_000))
    assert longer == {"seed1-12M": ["--tasks", "MT50", "--seed", "1", "--total-frames", "12000000"]}
    longer = learning.cells(learning.Args(suite="MT10", seeds=(), total_frames=2_000_000, ablation=True))
    assert longer["free-std-2M"][-3:] == ["--no-hold-std", "--total-frames", "2000000"]
    some = {"ablation": True, "ablation_seeds": (1, 3), "only": ("free-std",)}
    assert learning.cells(learning.Args(suite="MT10", seeds=(), **some)) == {
        "free-std": ["--tasks", "MT10", "--seed", "1", "--no-hold-std"],
        "free-std-seed3": ["--tasks", "MT10", "--seed", "3", "--no-hold-std"],
    }
    monkeypatch.setattr("sys.argv", ["learning.py", "--ablation", "--only", "free-std"])
    assert learning.main() == 2 and "the ablation of MT3 has no such cell" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["learning.py", "--seeds", "2", "4", "3"])
    with pytest.raises(RuntimeError):
        learning.main()
    assert [name for name, _ in measured] == ["seed1", "seed2", "seed4", "seed3"]
    assert measured[2][1] == ["--seed", "4"]
    cells = [line.split(",")[0] for line in (folders / "results.csv").read_text().splitlines()]
    assert cells == ["cell", "seed1", "seed2", "seed4"]


def test_the_picture_has_the_seeds_of_the_default_length(folders, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda folder, cells, out: drawn.extend(cells))
    monkeypatch.setattr("sys.argv", ["learning.py", "--report-only"])
    names = ["six-epochs-seed1", "seed2", "seed1-1M", "no-popart", "seed10"]
    for present, expected in ((names, ["seed2", "seed10"]), (names[2:4], ["seed1-1M"])):
        learning.write_results([row_of(name, 1.0) for name in present], folders / "results.csv")
        assert learning.main() == 0
        assert drawn == expected
        drawn.clear()


def test_a_cell_is_trained_evaluated_and_shipped(folders, monkeypatch) -> None:
    """With the commands replaced by what they leave behind; a second try does not train again but only evaluates."""
    ran = []

    def run(command, *arguments):
        ran.append(command)
        if command == "train":
            run_dir = Path(arguments[-1])
            run_dir.mkdir(parents=True)
            config = resolved(arguments)
            (run_dir / "config.json").write_text(json.dumps(config.to_dict()))
            write_metrics(run_dir / "metrics.csv", [0.5, 0.95, 0.96], frames=-(-config.total_frames // 3))
            save_checkpoint(run_dir / "best.pt", {"frames": 123, "policy": {}})
        else:
            if len(ran) == 2:
                raise KeyboardInterrupt
            assert arguments[1:4] == ("--seeds", "40", "60")
            scores = {f"eval/{task}/success_rate": 0.5 for task in learning.TASK_NAMES}
            scores |= {"eval/mean_success_rate": 0.5, "checkpoint": "runs/seed5/best.pt", "frames": 123}
            Path(arguments[-1]).write_text(json.dumps([scores]))

    monkeypatch.setattr(learning, "run", run)
    package = folders / "package"
    package.mkdir()
    monkeypatch.setattr(learning, "PACKAGE", package)
    arguments = ["learning.py", "--seeds", "5", "--eval-seeds", "40", "60"]
    monkeypatch.setattr("sys.argv", arguments)
    assert learning.main() == 130
    assert learning.main() == 0
    assert ran == ["train", "eval", "eval"]
    kept = curves.read(folders)["seed5"]
    metrics = read_metrics(folders / "runs" / "seed5" / "metrics.csv")
    assert kept.keys() == metrics.keys()
    np.testing.assert_array_equal(kept["frames"], metrics["frames"])
    monkeypatch.setattr("sys.argv", [*arguments, "--ship", "seed5"])
    assert learning.main() == 0
    provenance = json.loads((package / "pretrained.json").read_text())
    assert provenance["eval/push-v3/success_rate"] == "0.5"
    assert provenance["push-v3/minutes_to_0.9"] == "3.0"
    assert provenance["command"] == "python -m mtrl_vec train --seed 5"
    assert load_checkpoint(package / "pretrained.pt")["frames"] == 123
    save_checkpoint(folders / "runs" / "seed5" / "best.pt", {"frames": 124, "policy": {}})
    assert learning.main() == 2
    assert load_checkpoint(package / "pretrained.pt")["frames"] == 123


@pytest.mark.parametrize("suite", PRETRAINED)
def test_the_pretrained_policies_are_in_the_package_and_of_their_tasks(suite) -> None:
    name = PRETRAINED[suite]
    assert load_policy(name).tasks == learning.task_names(suite)
    provenance = json.loads((learning.PACKAGE / f"{name}.json").read_text())
    assert provenance["sha256"] == hashlib.sha256((learning.PACKAGE / f"{name}.pt").read_bytes()).hexdigest()
    rates = [float(provenance[f"eval/{task}/success_rate"]) for task in learning.task_names(suite)]
    assert np.mean(rates) > 0.9 and (suite == "MT50" or min(rates) > 0.9)


@pytest.mark.parametrize(("of_its_size", "weights"), [(0.8, "float16"), (0.2, "float16, without the critic")])
def test_a_large_policy_is_shipped_smaller(folders, monkeypatch, of_its_size, weights) -> None:
    config = tiny_config(tasks=("push", "reach"))
    policy = make_policy(config)
    run_dir = folders / "runs" / "seed5"
    run_dir.mkdir(parents=True)
    save_checkpoint(run_dir / "best.pt", {"config": config.to_dict(), "frames": 9, "policy": policy.state_dict()})
    row = row_of("seed5", 0.95) | {"sha256": hashlib.sha256((run_dir / "best.pt").read_bytes()).hexdigest()}
    learning.write_results([row], folders / "results.csv")
    monkeypatch.setattr(learning, "PACKAGE", folders)
    monkeypatch.setattr(learning, "LARGEST", of_its_size * (run_dir / "best.pt").stat().st_size)
    learning.ship("seed5", "MT3")
    shipped = load_checkpoint(folders / "pretrained.pt")
    assert any(name.startswith("critic") for name in shipped["policy"]) == ("critic" not in weights)
    assert shipped["policy"]["torso.module.layers.0.weight"].dtype == torch.float16
    provenance = json.loads((folders / "pretrained.json").read_text())
    assert provenance["weights"] == weights
    assert provenance["sha256"] == hashlib.sha256((folders / "pretrained.pt").read_bytes()).hexdigest()
    state = make_batch(policy, 20)
    ours, theirs = (
        p.distribution(*state.select("observation", "task_one_hot", "task_idx").values())
        for p in (load_policy(folders / "pretrained.pt").module, policy)
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2e-3)


def test_interrupted_training_is_resumed_and_with_other_settings_starts_anew(tmp_path, monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(learning, "run", lambda *arguments: ran.append(arguments))
    run_dir = tmp_path / "seed1"
    learning.train(run_dir, ["--seed", "1"])
    assert ran.pop() == ("train", "--seed", "1", "--run-dir", str(run_dir))
    run_dir.mkdir()
    state = {"config": resolved(["--seed", "1"]).to_dict(), "rollouts": {}}
    save_checkpoint(run_dir / "checkpoint-5.pt", state)
    learning.train(run_dir, ["--seed", "1"])
    assert ran.pop() == ("train", "--resume", str(run_dir))
    learning.train(run_dir, ["--seed", "1", "--lr", "0.1"])
    assert ran.pop() == ("train", "--seed", "1", "--lr", "0.1", "--run-dir", str(run_dir))
    assert not run_dir.exists() and len(list(tmp_path.glob("seed1-until-*/checkpoint-5.pt"))) == 1
    run_dir.mkdir()
    save_checkpoint(run_dir / "checkpoint-5.pt", {"config": state["config"]})  # a policy, but no run
    assert not learning.is_resumable(run_dir, resolved(["--seed", "1"]))


def flat(config: TrainConfig) -> dict[str, object]:
    """The settings of all groups by name."""
    found: dict[str, object] = {}
    for name, value in config.to_dict().items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def test_the_ablation_changes_one_thing_at_a_time() -> None:
    """Every cell is a valid configuration that differs from the reference by what its name says."""
    cells = learning.cells(learning.Args(seeds=(1,), ablation=True, alone=True, variants=True))
    settings = {name: flat(parse_train(flags)) for name, flags in cells.items()}
    reference = settings["seed1"]
    changed = {name: {k for k, v in values.items() if v != reference[k]} for name, values in settings.items()}
    assert changed.pop("seed1") == set()
    assert len(changed.pop("tutorial")) > 10
    assert changed.pop("gpu-preset") == {
        *("num_envs", "total_frames", "num_epochs", "num_minibatches", "device", "cuda_graphs"),
    }
    assert changed.pop("bf16-seed2") == changed.pop("bf16-seed3") == {"seed", "precision"}
    assert len(changed) == 10
    assert all(len(fields) == 1 for fields in changed.values()), changed


@pytest.mark.parametrize(("suite", "count"), [("MT10", 10), ("MT50", 50)])
def test_so_do_those_of_more_tasks_but_for_the_plain_control(suite, count) -> None:
    cells = learning.cells(learning.Args(suite=suite, seeds=(1, 2), ablation=True, alone=True))
    settings = {name: flat(parse_train(flags)) for name, flags in cells.items()}
    reference = settings.pop("seed1")
    assert len(reference["tasks"]) == count and settings.pop("seed2") == reference | {"seed": 2}
    changed = {name: {k for k in reference if values.get(k) != reference[k]} for name, values in settings.items()}
    alone = {name: changed.pop(name) for name in list(changed) if name.endswith("-alone")}
    assert len(alone) == count and all(fields == {"tasks", "total_frames"} for fields in alone.values())
    plain = {"noise_correlation", "hold_std", "bounded_mean", "popart", "method", "direct_features"}
    assert changed.pop("plain") == plain
    assert len(changed) == 7 and all(len(fields) == 1 for fields in changed.values()), changed
