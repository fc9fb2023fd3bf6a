"""What is logged: columns, the files they go to, and memory."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import tiny_config
from mtrl_vec.commands.cli import main
from mtrl_vec.train.log import RunLog
from mtrl_vec.train.metrics import COLUMNS, column_names, resident_megabytes

TASKS = ("reach-v3", "push-v3", "pick-place-v3")


def test_columns_of_several_tasks() -> None:
    names = column_names(["a", "b"])
    assert len(names) == len(set(names)) == len(COLUMNS) + sum("<task>" in name for name in COLUMNS)
    assert names.index("train/b/return") == names.index("train/a/return") + 1


def test_a_log_takes_all_columns_and_no_others(tmp_path) -> None:
    log = RunLog(tmp_path, tiny_config(), 0, 0, lambda message: None)
    row = dict.fromkeys(column_names(TASKS), 1.0) | {"frames": 192}
    log.write(row)
    for wrong in ({k: v for k, v in row.items() if k != "train/lr"}, row | {"more": 1.0}):
        with pytest.raises(ValueError, match=r"train/lr|more"):
            log.write(wrong)
    log.close()


@pytest.mark.parametrize("written", [0, 10, None], ids=["nothing", "a part", "all"])
@pytest.mark.parametrize("interrupted", [True, False], ids=["an interruption", "a full disk"])
def test_what_was_written_of_a_row_is_not_written_again(tmp_path, written, interrupted) -> None:
    log = RunLog(tmp_path, tiny_config(), 0, 0, lambda message: None)
    file, row = log._file, dict.fromkeys(column_names(TASKS), 1.0) | {"frames": 192}
    log.write(row)

    class File:
        tell = file.tell

        def write(self, data: bytes) -> int:
            count = file.write(data[:written])
            if interrupted:
                raise KeyboardInterrupt
            return count

    log._file = File()
    with contextlib.suppress(KeyboardInterrupt):
        log.write(row)
    log._file = file
    log.close()
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.startswith("iteration,") and len(rows) == 2 and rows[0] == rows[1]


def test_tensorboard_has_the_numbers_of_the_file_also_after_a_resumption(tmp_path) -> None:
    config = tiny_config(tasks=("push",))
    columns = column_names(config.tasks)
    log = RunLog(tmp_path, config, 0, 0, lambda message: None)
    for i in (1, 2, 3):
        log.write(dict.fromkeys(columns, float(i)) | {"iteration": i, "frames": 192 * i})
    log.close()
    log = RunLog(tmp_path, config, 2, 2 * 192, lambda message: None)  # from a checkpoint after the second
    log.write(dict.fromkeys(columns, 30.0) | {"iteration": 3, "frames": 3 * 192})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/push-v3/return")]
    assert curve == [(192, 1.0), (384, 2.0), (576, 30.0)]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["iteration", "1", "2", "3"]
    assert lines[-1].split(",")[columns.index("train/lr")] == "30"


def test_memory_of_this_and_other_processes() -> None:
    ballast = torch.ones(50_000_000)  # 200 MB
    own = resident_megabytes([])
    assert own > 200 and resident_megabytes([os.getpid()]) == pytest.approx(2 * own, rel=0.1)
    assert resident_megabytes([2**22 - 1]) == pytest.approx(own, rel=0.1)  # one that is not there
    del ballast
    assert resident_megabytes([]) < own - 150


def test_wandb_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "--wandb", "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: --wandb needs wandb: pip install 'mtrl_vec[wandb]'\n"
    assert not (tmp_path / "run").exists()


def test_wandb_gets_every_number(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_config(wandb=True)
    log = RunLog(tmp_path, config, 0, 0, lambda message: None)
    log.write(dict.fromkeys(column_names(TASKS), 1.0) | {"iteration": 1, "frames": 192})
    summary = dict(log._wandb.experiment.summary)
    log.close()
    assert summary["train/lr"] == 1.0 and list((tmp_path / "wandb").iterdir())
