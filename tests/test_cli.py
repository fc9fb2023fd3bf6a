"""The commands as people type them: bad input, interruptions, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from soak import shared_memory

from mtrl_vec.checkpoint import load_checkpoint
from mtrl_vec.cli import main
from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.video import choose_gl

SIZES = {
    "num-envs": 12,
    "num-steps": 16,
    "num-minibatches": 2,
    "num-epochs": 2,
    "head": 16,
    "eval-interval": 0,
}
SMALL = ["--device", "cpu", "--torso", "32", "32", *(f"--{name}={value}" for name, value in SIZES.items())]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "fly-v3"], "unknown task 'fly-v3': known tasks are reach-v3, push-v3, pick-place-v3"),
        (["--tasks", "push", "push-v3"], "task 'push-v3' is given twice"),
        (["--total-frames", "0"], "total_frames is 0: it must be positive"),
        (["--num-envs", "-3"], "num_envs is -3: it must be positive"),
        (["--num-envs", "100"], "num_envs is 100: it must be a multiple of 3"),
        (["--num-workers", "0"], "num_workers is 0: it must be positive"),
        (["--num-workers", "7"], "num_envs is 360: it must be a multiple of 21"),
        (["--num-minibatches", "7"], "num_minibatches is 7: it must divide the 11520 frames"),
        (["--gamma", "1.5"], "gamma is 1.5: it must be between 0 and 1"),
        (["--lr", "0"], "lr is 0.0: it must be positive"),
        (["--lr", "inf"], "lr is inf: it must be finite"),
        (["--goals-seed", "-1"], "goals_seed is -1: it must be between 0 and 4294967295"),
        (["--seed", "18446744073709551616"], "seed is 18446744073709551616: it must be between 0 and"),
        (["--eval-interval", "-1"], "eval_interval is -1: it must not be negative"),
        (["--eval-episodes", "0"], "eval_episodes is 0: it must be positive"),
        (["--preset", "best"], "unknown preset 'best': known presets are cpu, gpu, tutorial"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


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
    (run / "checkpoint-98.tmp").write_text("older, and torn")
    arguments = ["train", *SMALL, "--run-dir", str(run), "--overwrite", "--total-frames", "192", "--quiet"]
    assert main(arguments) == 0
    assert load_checkpoint(run)["frames"] == 192 and not list(run.glob("checkpoint-9*"))
    assert json.loads((run / "config.json").read_text())["total_frames"] == 192


def test_bad_checkpoints(capsys, tmp_path) -> None:
    garbage, foreign, torn = tmp_path / "garbage.pt", tmp_path / "foreign.pt", tmp_path / "torn.pt"
    garbage.write_bytes(b"not a checkpoint")
    torch.save({"state_dict": {}}, foreign)
    torch.save({"format": "mtrl_vec checkpoint 1", "config": TrainConfig().to_dict(), "x": torch.zeros(9999)}, torn)
    other = tmp_path / "other.pt"
    torch.save({"format": "mtrl_vec checkpoint 1", "config": TrainConfig().to_dict(), "policy": {}}, other)
    torn.write_bytes(torn.read_bytes()[:2000])
    odd = tmp_path / "odd.pt"
    torch.save({"format": "mtrl_vec checkpoint 1", "config": None}, odd)
    for path, message in [
        (tmp_path / "missing.pt", "no checkpoint at"),
        (tmp_path, "no checkpoint at"),
        (garbage, "not a readable checkpoint"),
        (torn, "not a readable checkpoint"),
        (foreign, "not a checkpoint of this package"),
        (other, "does not fit this version"),
        (odd, "does not fit this version"),
    ]:
        assert main(["eval", str(path)]) == 2, path
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_a_checkpoint_cannot_execute_code(capsys, tmp_path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"format": "mtrl_vec checkpoint 1", "config": Bomb()}, tmp_path / "bomb.pt")
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
    assert main(["fly"]) == 2
    assert (
        capsys.readouterr().err
        == "error: unknown command 'fly': known commands are train, eval, plot, video, profile\n"
    )
    assert main(["--help"]) == 0
    assert "python -m mtrl_vec train" in capsys.readouterr().out


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end within some seconds after the process that started them."""
    _, alive = psutil.wait_procs(processes, timeout=15)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def workers_of(processes: list[psutil.Process]) -> list[int]:
    """The simulators: children of the one that they are copies of."""
    about = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
            about[process.pid] = process.ppid(), "forkserver" in " ".join(process.cmdline())
    return [pid for pid, (parent, _) in about.items() if about.get(parent, (0, False))[1]]


def shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that they have mapped: semaphores, as all else there loses its name at once.

    Not all that is in there: other processes on the machine may come and go meanwhile.
    """
    if not Path("/dev/shm").exists():
        return set()
    found = {Path(path) for path in shared_memory(processes)}
    assert found
    return found


def left(files: set[Path]) -> set[Path]:
    return {path for path in files if path.exists()}


def at_ctrl_c() -> None:
    """As in a terminal, also where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until something has come of a process, which leads a group of its own; fails if it ends before, or takes long."""
    deadline = time.monotonic() + 180
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"the run took too long or ended: {process.stderr.read()}")
        time.sleep(0.01)


def rows_of(run: Path) -> int:
    """Iterations that its metrics tell of."""
    path = run / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def start_training(run: Path, *flags: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A long run in a process group of its own, some iterations in; and all of its processes."""
    command = [
        sys.executable,
        "-m",
        "mtrl_vec",
        "train",
        *SMALL,
        "--num-workers",
        "2",
        "--run-dir",
        str(run),
        "--quiet",
        *flags,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=at_ctrl_c)
    wait_for(lambda: rows_of(run) >= 3, process)
    return process, descendants(process.pid)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
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
    assert rows >= 3 and content["iteration"] - rows in (-1, 0)
    assert content["frames"] == content["iteration"] * 192


def start_workers(run: Path, count: int, *flags: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A run whose workers start, far from the end of its first iteration, in a group of its own; all its processes."""
    command = [sys.executable, "-u", "-m", "mtrl_vec", "train", *SMALL, "--num-steps", "8192", "--run-dir", str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *flags], **pipes, start_new_session=True, preexec_fn=at_ctrl_c)
    assert process.stdout.readline().startswith("training")
    wait_for(lambda: len(workers_of(descendants(process.pid))) >= count, process)
    return process, descendants(process.pid)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_all", [False, True])
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


def test_debug_shows_where_an_error_comes_from(capsys, tmp_path) -> None:
    assert main(["eval", str(tmp_path / "missing"), "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "find_checkpoint" in err and "error: no checkpoint at" in err.splitlines()[-1]


def test_video_from_the_command_line(capsys, tmp_path) -> None:
    pytest.importorskip("av", reason="needs av")
    try:
        choose_gl()
    except InputError as error:
        pytest.skip(str(error))
    assert main(["video", "pretrained", "--episodes", "1", "--out", str(tmp_path / "film.mp4")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'film.mp4'}\nwrote {tmp_path / 'film.gif'}\n"
    assert (tmp_path / "film.gif").read_bytes().startswith(b"GIF8")
    assert main(["video", "pretrained", "--episodes", "0"]) == 2
    assert main(["video", "pretrained", "--out", str(tmp_path / "missing" / "film")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_plot_from_the_command_line(capsys, tmp_path) -> None:
    curves = Path(__file__).parent.parent / "benchmarks" / "learning"
    assert main(["plot", str(curves / "seed1.csv"), str(curves / "overlap.csv"), "--out", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'both.png'}\nwrote {tmp_path / 'both.svg'}\n"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot"]) == 2
    assert main(["plot", str(tmp_path / "missing")]) == 2
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [
        " no run given",
        f" no run at {tmp_path / 'missing'}",
    ]
