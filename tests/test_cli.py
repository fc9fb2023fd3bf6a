"""The commands as people type them: bad input, interruptions, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import SMALL
from mtrl_vec.commands.cli import main
from mtrl_vec.commands.output import own_command
from mtrl_vec.commands.parsing import RENAMED, parse_train
from mtrl_vec.commands.stage import choose_gl
from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.policy.checkpoint import load_checkpoint
from processes import (
    left,
    rows_of,
    shared_memory_of,
    start_training,
    start_workers,
    still_running,
    workers_of,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "fly-v3"], "unknown task 'fly-v3': name a set (MT3, MT10, MT50) or tasks of MT50"),
        (["--tasks", "push", "push-v3"], "task 'push-v3' is given twice"),
        (["--total-frames", "0"], "total_frames is 0: it must be positive"),
        (["--tasks", "MT10", "door-open"], "task 'door-open-v3' is given and is in MT10: name each task once"),
        (
            ["--tasks", "MT50", "--num-envs", "40", "--task-sampling", "uniform"],
            "num_envs is 40: it must be at least the 50 tasks: with --task-sampl",
        ),
        (["--num-envs", "-3"], "num_envs is -3: it must be positive"),
        (["--num-workers", "0"], "num_workers is 0: it must be positive"),
        (["--num-minibatches", "0"], "num_minibatches is 0: it must be positive"),
        (["--num-minibatches", "11521"], "num_minibatches is 11521: it must be at most the 11520 frames of a rollout"),
        (["--gamma", "1.5"], "gamma is 1.5: it must be between 0 and 1"),
        (["--lr", "0"], "lr is 0.0: it must be positive"),
        (["--lr", "inf"], "lr is inf: it must be finite"),
        (["--critic-coeff", "0"], "critic_coeff is 0.0: it must be positive"),
        (["--clip-epsilon", "1.5"], "clip_epsilon is 1.5: it must be between 0 and 1"),
        (["--noise-correlation", "1"], "noise_correlation is 1.0: it must be less than 1"),
        (["--goals-seed", "-1"], "goals_seed is -1: it must be between 0 and 4294967295"),
        (["--seed", "18446744073709551616"], "seed is 18446744073709551616: it must be between 0 and 4294967295"),
        (["--eval-interval", "-1"], "eval_interval is -1: it must not be negative"),
        (["--eval-episodes", "0"], "eval_episodes is 0: it must be positive"),
        (["--preset", "best"], "invalid choice 'best' for argument '--preset'. Expected one of ('cpu', 'gpu', 'tut"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--schedule", "--schedule is now called --task-sampling"),
        ("--share-floor", "--share-floor is now called --min-task-prob (with difficulty: --min-task-weight)"),
        ("--balance", "--balance is now called --gradient-method"),
        ("--relative-inputs", "--relative-inputs is now called --relative-features"),
        ("--no-relative-inputs", "--no-relative-inputs is now called --no-relative-features"),
    ],
)
@pytest.mark.parametrize("command", ["train", "profile"])
@pytest.mark.parametrize("spelling", ["{} x", "{}=x", "--num-envs 12 {}"])
def test_flags_of_earlier_versions_name_the_ones_of_today(flag, message, command, spelling, capsys, tmp_path) -> None:
    new = message.split(" is now called ")[1]
    for old in {flag, flag.replace("-", "_").replace("__", "--", 1)}:
        assert main([command, *spelling.format(old).split(), "--run-dir", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "run").exists()
    for name in re.findall(r"--[a-z-]+", new):  # and there they are
        assert main([command, name, "no such value", "again"]) == 2
        assert f"Unrecognized options: {name}" not in capsys.readouterr().err


def test_every_renamed_flag_is_tested() -> None:
    test = test_flags_of_earlier_versions_name_the_ones_of_today
    (tested,) = (mark.args[1] for mark in test.pytestmark if mark.args[0] == ("flag", "message"))
    assert {flag: message.split(" is now called ")[1] for flag, message in tested} == RENAMED


@pytest.mark.parametrize("flags", [["--num-envs", "100"], ["--num-workers", "7"], ["--num-minibatches", "7"]])
def test_numbers_need_not_divide_each_other(flags) -> None:
    config = parse_train(flags)
    assert config.minibatch_size * config.learner.num_minibatches <= config.frames_per_batch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(capsys, tmp_path) -> None:
    assert main(["train", "--device", "cuda", "--run-dir", str(tmp_path / "run")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_kept(capsys, tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("mine")
    assert main(["train", "--run-dir", str(run)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (run / "config.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["thesis.tex", "config.json"])
def test_overwrite_replaces_nothing_but_runs(capsys, tmp_path, name) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TrainConfig().to_dict()))  # a run's, in the first case
    (folder / name).write_text("{}")
    assert main(["train", "--run-dir", str(folder), "--overwrite"]) == 2
    err = capsys.readouterr().err
    assert "is not only the folder of a run" in err and err.count("\n") == 1
    assert (folder / name).read_text() == "{}"


def test_overwrite_replaces_a_run(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(TrainConfig().to_dict()))
    (run / "checkpoint-99.pt").write_text("old")
    for torn in ("checkpoint-98.pt.tmp", "config.json.tmp", "metrics.csv.tmp", "best.pt.tmp"):
        (run / torn).write_text("torn")
    (run / "checkpoint-97.damaged").write_text("older")
    arguments = ["train", *SMALL, "--run-dir", str(run), "--overwrite", "--total-frames", "192", "--quiet"]
    assert main(arguments) == 0
    assert load_checkpoint(run)["frames"] == 192 and not list(run.glob("checkpoint-9*"))
    assert json.loads((run / "config.json").read_text())["runtime"]["total_frames"] == 192
    assert not list(run.glob("*.tmp"))


def test_bad_checkpoints(capsys, tmp_path) -> None:
    today = {"format": "mtrl_vec checkpoint", "version": 2, "config": TrainConfig().to_dict()}
    contents = {
        "foreign": {"state_dict": {}},
        "torn": today | {"x": torch.zeros(9999)},
        "other": today | {"policy": {}, "frames": 1},
        "odd": today | {"config": None},
        "newer": today | {"version": 7},
        "unnumbered": today | {"version": "2"},
        "old and odd": {"format": "mtrl_vec checkpoint 1", "config": None},
        "old and foreign": {"format": "mtrl_vec checkpoint 0", "config": None},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
    garbage, torn = tmp_path / "garbage.pt", tmp_path / "torn.pt"
    garbage.write_bytes(b"not a checkpoint")
    torn.write_bytes(torn.read_bytes()[:2000])
    for name, message in [
        ("missing", "no checkpoint at"),
        ("garbage", "not a readable checkpoint"),
        ("torn", "not a readable checkpoint"),
        ("foreign", "not a checkpoint of this package"),
        ("unnumbered", "not a checkpoint of this package"),
        ("old and foreign", "not a checkpoint of this package"),
        ("other", "does not fit this version"),
        ("odd", "does not fit this version"),
        ("old and odd", "does not fit this version"),
        ("newer", "does not fit this version of mtrl_vec (it has version 7 of the format, and this package reads up"),
    ]:
        assert main(["eval", str(tmp_path / f"{name}.pt")]) == 2, name
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, name
    assert main(["eval", str(tmp_path)]) == 2  # a folder without checkpoints
    err = capsys.readouterr().err
    assert "no checkpoint at" in err and err.count("\n") == 1


def test_a_checkpoint_cannot_execute_code(capsys, tmp_path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for version in ({"format": "mtrl_vec checkpoint", "version": 2}, {"format": "mtrl_vec checkpoint 1"}):
        torch.save(version | {"config": Bomb()}, tmp_path / "bomb.pt")
        assert main(["eval", str(tmp_path / "bomb.pt")]) == 2
        assert not (tmp_path / "executed").exists()
        assert capsys.readouterr().err.count("\n") == 1


def test_folders_that_cannot_be_written(capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", "--run-dir", str(tmp_path / "file" / "run")]) == 2
    assert "choose another --run-dir" in capsys.readouterr().err
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_text("")
    assert main(["eval", str(checkpoint), "--json", str(tmp_path / "missing" / "out.json")]) == 2
    assert "give a file in an existing folder" in capsys.readouterr().err


def test_unknown_command_and_usage(capsys) -> None:
    for arguments in (["fly"], ["fly", "--help"], []):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and "".join(arguments[:1]) in err
        assert all(command in err for command in ("train", "eval", "plot", "video", "profile"))
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert "python -m mtrl_vec" in out and all(command in out for command in ("train", "eval", "plot", "video"))


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interruption_saves_and_leaves_nothing_behind(tmp_path, sent) -> None:
    process, children = start_training(tmp_path / "run")
    shared = shared_memory_of(children)
    assert len(workers_of(children)) == 2
    # A terminal sends Ctrl-C to every process of the group; a scheduler sends SIGTERM to the one it started.
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    content = load_checkpoint(tmp_path / "run")
    assert f"interrupted: {content['frames']:,} frames saved" in err
    assert "Traceback" not in err
    assert not still_running(children)
    assert not left(shared)
    # metrics.csv and checkpoint tell of the same number of whole iterations, unless it came between the two.
    rows = rows_of(tmp_path / "run")
    assert rows >= 3 and content["progress"]["iteration"] - rows in (-1, 0)
    assert content["frames"] == content["progress"]["iteration"] * 192


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_the_workers_start(tmp_path, sent, to_all) -> None:
    process, children = start_workers(tmp_path / "run", 1)
    os.killpg(process.pid, sent) if to_all else process.send_signal(sent)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert err == "interrupted: there was nothing to save yet\n"
    assert not (tmp_path / "run").exists()
    assert not still_running(children)


def test_a_worker_that_dies_while_it_starts(tmp_path) -> None:
    process, children = start_workers(tmp_path / "run", 2, "--num-workers", "2", "--max-restarts", "0")
    os.kill(workers_of(children)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1
    assert err.startswith("error: simulation worker 1") and err.endswith("there was nothing to save yet\n")
    assert not still_running(children)


def test_a_worker_that_dies_ends_the_run_after_saving(tmp_path) -> None:
    process, children = start_training(tmp_path / "run", "--max-restarts", "0")
    victim = workers_of(children)[1]
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1
    assert f"error: simulation worker 1 (pid {victim}) died" in err
    assert "Traceback" not in err
    assert load_checkpoint(tmp_path / "run")["frames"] >= 3 * 192
    assert not still_running(children)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--foo", "3"], "Unrecognized options: --foo, 3"),
        (["--total-frames", "many"], "Error parsing --total-frames"),
        (["--device", "tpu"], "invalid choice 'tpu' for argument '--device'"),
        (["--torso", "3"], "Missing value for argument '--torso'"),
    ],
)
def test_flags_that_make_no_sense_are_one_line_too(arguments, message, capsys) -> None:
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert err.endswith("see python -m mtrl_vec train --help\n")


@pytest.mark.parametrize("command", ["train", "eval", "plot", "video", "profile"])
def test_every_command_explains_itself_with_an_example(command, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code
    out = " ".join(capsys.readouterr().out.split())
    assert f"Example: python -m mtrl_vec {command}" in out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_commands_and_flags(shell, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--tyro-print-completion", shell])
    assert not end.value.code
    out = capsys.readouterr().out
    assert all(word in out for word in ("train", "doctor", "total-frames", "cagrad"))


def test_debug_shows_where_an_error_comes_from(capsys, tmp_path) -> None:
    assert main(["eval", str(tmp_path / "missing"), "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "find_checkpoint" in err and "error: no checkpoint at" in err.splitlines()[-1]


@pytest.mark.slow
def test_video_from_the_command_line(capsys, tmp_path) -> None:
    pytest.importorskip("av", reason="needs av")
    try:
        choose_gl()
    except InputError as error:
        pytest.skip(str(error))
    assert main(["video", "pretrained", "--tasks", "push", "--episodes", "1", "--out", str(tmp_path / "film.mp4")]) == 0
    first, *wrote = capsys.readouterr().out.splitlines()
    assert first == "filming 1 task: 150 steps at most, each 0.07 s per task if there is no GPU"
    assert wrote == [f"wrote {tmp_path / 'film.mp4'}", f"wrote {tmp_path / 'film.gif'}"]
    assert (tmp_path / "film.gif").read_bytes().startswith(b"GIF8")
    assert main(["video", "pretrained", "--tasks", "hammer"]) == 2
    assert main(["video", "pretrained", "--episodes", "0"]) == 2
    assert main(["video", "pretrained", "--out", str(tmp_path / "missing" / "film")]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_plot_from_the_command_line(capsys, tmp_path) -> None:
    for name in ("seed1", "overlap"):
        header = "frames,time/elapsed,train/push-v3/success_rate,train/push-v3/return"
        (tmp_path / f"{name}.csv").write_text(f"{header}\n1000000,60,0.1,10\n2000000,120,0.9,90\n")
    files = [str(tmp_path / f"{name}.csv") for name in ("seed1", "overlap")]
    assert main(["plot", *files, "--out", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'both.png'}\nwrote {tmp_path / 'both.svg'}\n"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot"]) == 2
    assert main(["plot", str(tmp_path / "missing")]) == 2
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [
        " no run given",
        f" no run at {tmp_path / 'missing'}",
    ]


@pytest.mark.parametrize(
    ("text", "number"), [("2000000", 2_000_000), ("2_000_000", 2_000_000), ("2e6", 2_000_000), ("2M", 2_000_000)]
)
def test_whole_numbers_can_be_written_in_short(text, number) -> None:
    assert parse_train(["--total-frames", text]).total_frames == number
    assert parse_train([f"--total-frames={text}", "--goals-seed", "3"]).total_frames == number
    assert parse_train(["--torso", "1e2", "0.2k"]).policy.torso == (100, 200)
    assert parse_train(["--lr", "2e-4", "--goals-seed", "None"]).environment.goals_seed is None


@pytest.mark.parametrize("text", ["2.5", "1e999999999", "inf", "nan", "many", "M", "", "2e-3"])
def test_other_numbers_are_refused(text, capsys) -> None:
    assert main(["train", "--total-frames", text]) == 2
    err = capsys.readouterr().err
    assert "--total-frames" in err and repr(text) in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--total-frame", "5"], "did you mean --total-frames?"),
        (["train", "--no-popar"], "did you mean --no-popart?"),
        (["train", "--task-samplin=success"], "did you mean --task-sampling?"),
        (["eval", "pretrained", "--seed", "5"], "did you mean --seeds?"),
        (["export", "pretrained", "--onx", "a"], "did you mean --onnx?"),
        (["video", "--checkpoint", "runs/a"], "see python -m mtrl_vec video --help"),
        (["train", "--tasks", "pick-plac"], "did you mean pick-place-v3?"),
        (["train", "--xyzzy", "5"], "see python -m mtrl_vec train --help"),
    ],
)
def test_what_was_perhaps_meant(arguments, suggested, capsys) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.endswith(f"{suggested}\n") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_openmp_threads_soon_sleep_unless_told_otherwise(given, spins) -> None:
    """Torch's OpenMP library looks at the environment once, when torch is imported."""
    program = """
import os, sys
from mtrl_vec.commands.cli import main
print("torch" in sys.modules, main(["fly"]), os.environ.get("GOMP_SPINCOUNT"))
"""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=inherited | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "2", spins]


def test_the_doctor_says_what_is_here(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MTRL_VEC_CACHE", str(tmp_path / "models"))
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "doctor.json").read_text())
    assert found["versions"]["torch"] == torch.__version__ and torch.__version__ in out
    assert f"{len(os.sched_getaffinity(0))} cores" in found["machine"]["processor"]
    assert found["training"]["compiled models"] == str(tmp_path / "models")
    assert found["training"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("MUJOCO_GL", "nothing")
    assert main(["doctor"]) == 0
    assert "does not work" in capsys.readouterr().out
    assert main(["doctor", "--json", str(tmp_path / "none" / "doctor.json")]) == 2


def test_the_command_that_is_named_can_be_called(monkeypatch, tmp_path) -> None:
    command = tmp_path / "venv" / "bin" / "mtrl-vec"
    monkeypatch.setattr(sys, "executable", str(command.with_name("python")))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_command() == "python -m mtrl_vec"
    command.parent.mkdir(parents=True)
    command.touch(mode=0o755)
    assert own_command() == str(command)
    monkeypatch.chdir(tmp_path)
    assert own_command() == "venv/bin/mtrl-vec"
    monkeypatch.setenv("PATH", str(command.parent))
    assert own_command() == "mtrl-vec"
