"""The profile: its arithmetic, and that it tells of what was run."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from helpers import SMALL, tiny_config
from mtrl_vec.commands import profile
from mtrl_vec.commands.cli import main
from mtrl_vec.config import PRESETS
from mtrl_vec.learn.device import autocast


@pytest.mark.parametrize("tasks", [("reach",), ("reach", "push", "pick-place")])
def test_operations_per_sample_counted_by_hand(tasks) -> None:
    config = tiny_config(tasks=tasks, torso=(32, 24), head=16, direct_features=True)
    inputs = 34 + len(tasks)
    first = 32 * inputs
    # Second layer of the torso; both heads' first, of whose inputs 40 are an observation's 34 and zeros; and second.
    others = 24 * 32 + 2 * 16 * (24 + 40) + 4 * 16 + 1 * 16
    # A multiplication and an addition each; forward, gradient of the weights, and gradient of the inputs but for the
    # first layer's.
    assert profile.flops_per_sample(config) == 2 * (2 * first + 3 * others)


def test_the_union_of_intervals() -> None:
    assert profile._covered([(5, 6), (0, 2), (1, 3), (1.5, 2.5)]) == 4


def test_precision_is_what_the_settings_say_and_rounds_products_only() -> None:
    """Nothing goes by the device that happens to be there: the preset for a GPU asks for bf16."""
    assert {name: preset.runtime.precision for name, preset in PRESETS.items()} == {
        "cpu": "fp32",
        "gpu": "bf16",
        "tutorial": "fp32",
    }
    x = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (x @ x).dtype == dtype and (x + x).dtype == torch.float32


def test_the_profile_adds_up_and_leaves_a_trace(tmp_path, capsys) -> None:
    out = tmp_path / "profile.json"
    arguments = [*SMALL, "--run-dir", str(tmp_path / "run"), "--iterations", "2", "--json", str(out)]
    assert main(["profile", *arguments]) == 0
    report = json.loads(out.read_text())
    parts = [report.get(f"seconds/{name}", 0.0) for name in profile.PARTS]
    assert 0.8 * report["seconds/total"] < sum(parts) <= 1.001 * report["seconds/total"]
    assert report["operators_per_step"] > 50
    assert (report["frames_per_batch"], report["optimiser_steps"]) == (192, 4)
    printed = capsys.readouterr().out
    assert "bound by" in printed and f"{report['steps_per_second']:,.0f} steps/s" in printed
    with gzip.open(tmp_path / "run" / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("simulate") == 16 and names.count("infer") == 16 and names.count("update") == 1


def test_bad_input_is_one_line(tmp_path, capsys) -> None:
    assert main(["profile", "--iterations", "0"]) == 2
    assert capsys.readouterr().err == "error: iterations is 0: it must be positive\n"
    assert main(["profile", "--json", str(tmp_path / "nowhere" / "out.json")]) == 2
    assert "give a file in an existing folder" in capsys.readouterr().err
