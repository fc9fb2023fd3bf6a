"""Everything that only a GPU can show: tests, learner, routing, profiles, and whole training runs.

Needs nothing but Python's standard library itself, so that it also starts on a bare machine without a network, where
packages come as a folder of wheels. Every step is a process of its own with a time limit. One that fails or takes too
long does not stop the others, and what was there already is not lost: a table of all steps is printed at the end. A
plan ends in its time: the last steps get what is left of it, or are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("-m", "mtrl_vec", "train", "--quiet", "--overwrite")
PROFILE = ("-m", "mtrl_vec", "profile", "--overwrite", "--preset", "gpu")
EAGER = ("--compile", "off", "--cuda-graphs")
SPARE = 40
"""Seconds of a plan for ending a step that takes too long, and for packing the results."""
NO_TIME = "left out: no time left"


@dataclass(frozen=True)
class Step:
    """A command of the interpreter that this runs in."""

    command: Sequence[str]
    """With ``{out}`` for the folder of results."""
    limit: int
    """Seconds."""
    shows: str
    needs: str | None = None
    """A package that it cannot do without, and that is not one of ours."""


VERSIONS = """
import mujoco, platform, torch, torchrl
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}; Python {platform.python_version()}, torch {torch.__version__}, torchrl {torchrl.__version__}", end=", ")
print(f"mujoco {mujoco.__version__}, CUDA {torch.version.cuda}")
"""

STEPS = {
    "versions": Step(("-c", VERSIONS), 60, "what it ran on"),
    "tests": Step(
        ("-m", "pytest", "-q", "tests/test_cuda.py", "-m", "not compiles"),
        180,
        "graphs and kernels against the eager path",
        needs="pytest",
    ),
    "profile": Step(
        (*PROFILE, *EAGER, "--run-dir", "{out}/profile", "--json", "{out}/profile.json"),
        120,
        "where an iteration's time goes, with graphs",
    ),
    "learner": Step(
        ("benchmarks/learner.py", "--minibatch-sizes", "7680", "--rounds", "3", "--json", "{out}/learner.json"),
        420,
        "updates eager, graphed and compiled, in fp32 and bf16",
    ),
    "train": Step(
        (*TRAIN, "--preset", "gpu", *EAGER, "--total-frames", "2000000", "--run-dir", "{out}/train"),
        240,
        "three tasks, 2M frames",
    ),
    "eval": Step(("-m", "mtrl_vec", "eval", "{out}/train", "--json", "{out}/eval.json"), 240, "its official success"),
    "profile-compiled": Step(
        (*PROFILE, "--run-dir", "{out}/profile-compiled", "--json", "{out}/profile-compiled.json"),
        240,
        "the same, compiled",
    ),
    "profile-overlap": Step(
        (*PROFILE, *EAGER, "--overlap", "--run-dir", "{out}/profile-overlap", "--json", "{out}/profile-overlap.json"),
        120,
        "the same, with collecting and learning at the same time",
    ),
    "profile-halves": Step(
        (
            *(*PROFILE, *EAGER, "--double-buffer"),
            *("--run-dir", "{out}/profile-halves", "--json", "{out}/profile-halves.json"),
        ),
        120,
        "as in profile, acting for one half of the simulators while the other simulates",
    ),
    "routing": Step(
        ("benchmarks/routing.py", "--json", "{out}/routing.json"),
        240,
        "ways to route rows to heads, by number of tasks",
    ),
    "tests-compiled": Step(
        ("-m", "pytest", "-q", "tests/test_cuda.py", "-m", "compiles"),
        540,
        "compiled code against the eager path",
        needs="pytest",
    ),
    "learner-sizes": Step(
        (
            *("benchmarks/learner.py", "--minibatch-sizes", "1920", "30720", "122880", "--rounds", "3"),
            *("--variants", "graphed_bf16", "compiled_graphed_bf16", "--json", "{out}/learner-sizes.json"),
        ),
        420,
        "updates by size",
    ),
    "train-mt10": Step(
        (*TRAIN, "--preset", "gpu", *EAGER, "--tasks", "MT10", "--total-frames", "3600000", "--run-dir", "{out}/mt10"),
        420,
        "ten tasks, 3.6M frames",
    ),
    "eval-mt10": Step(
        ("-m", "mtrl_vec", "eval", "{out}/mt10", "--json", "{out}/eval-mt10.json"), 240, "its official success"
    ),
    "scaling": Step(
        ("benchmarks/scaling.py", "--json", "{out}/scaling.json"), 240, "what the model of other machines predicts here"
    ),
    "task-sampling-cost": Step(
        (
            *("benchmarks/task_sampling_cost.py", "--rounds", "10", "--json", "{out}/task_sampling_cost.json"),
            "--flags=--precision bf16 --cuda-graphs",
        ),
        420,
        "what methods of gradients and sampling cost",
    ),
}

PLANS = {
    10: ("versions", "tests", "profile", "train", "eval"),
    20: ("versions", "tests", "profile", "learner", "train", "eval", "profile-compiled", "profile-overlap"),
    40: tuple(STEPS),
}
"""Steps by the minutes that there are on one machine with 16 cores."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    plans = "\n".join(f"  {minutes} minutes: {' '.join(steps)}" for minutes, steps in PLANS.items())
    steps = "\n".join(f"  {name:<20}{step.limit:>4} s  {step.shows}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        description="Run what only a GPU can show, step by step; results and logs go to one folder.",
        epilog=f"steps, with their time limits:\n{steps}\n\nplans:\n{plans}\n\n"
        "On a bare machine: python3 benchmarks/gpu.py --wheels FOLDER --minutes 10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=int, choices=PLANS, default=10, help="which plan, and how long it may take (default: 10)"
    )
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="run these steps instead of a plan")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default: runs/gpu)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="unpack wheels from here and use them")
    chosen = parser.parse_args(argv)
    for name in chosen.steps or ():
        if name not in STEPS:
            parser.error(f"there is no step {name!r}: choose from {', '.join(STEPS)}")
    if chosen.wheels and not list(chosen.wheels.glob("*.whl")):
        parser.error(f"there are no wheels in {chosen.wheels}")
    return chosen


def unpack(wheels: Path, folder: Path) -> None:
    """Unpack wheels that are not there yet. (As good as installing them: nothing here needs their scripts.)"""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def run(name: str, out: Path, environment: dict[str, str], seconds_left: float) -> tuple[str, float, str]:
    """Run a step: its outcome, seconds, and the last line that it printed."""
    step, log = STEPS[name], out / f"{name}.log"
    log.unlink(missing_ok=True)  # of an earlier run
    limit = int(min(step.limit, seconds_left))
    if limit < 1:
        return NO_TIME, 0.0, ""
    if step.needs and importlib.util.find_spec(step.needs) is None and not (out / "site" / step.needs).exists():
        return f"left out: no {step.needs}", 0.0, ""
    command = [sys.executable, *(part.replace("{out}", str(out)) for part in step.command)]
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            outcome = f"exit {code}" if (code := process.wait(limit)) else "done"
        except subprocess.TimeoutExpired:
            outcome = f"over {limit} s"
            stop(process)
        except KeyboardInterrupt:
            stop(process)
            raise
    lines = log.read_text(errors="replace").strip().splitlines()
    return outcome, time.monotonic() - start, lines[-1].strip() if lines else ""


def stop(process: subprocess.Popen) -> None:
    """End a step with all its workers."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its group has its number
    process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    end = math.inf if chosen.steps else time.monotonic() + 60 * chosen.minutes - SPARE
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if chosen.wheels:
        unpack(chosen.wheels, out / "site")
        paths.insert(1, str(out / "site"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    results = {}
    try:
        for name in chosen.steps or PLANS[chosen.minutes]:
            print(f"{name}: {STEPS[name].shows}", flush=True)
            results[name] = run(name, out, environment, end - time.monotonic())
            if results[name][0] != "done" and (log := out / f"{name}.log").exists():
                print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    except KeyboardInterrupt:
        return 130
    finally:
        (out / "steps.json").write_text(json.dumps(results, indent=1))
        pack(out)
        print("\n| step | outcome | s | last line |\n|---|---|---:|---|")
        for name, (outcome, seconds, last) in results.items():
            print(f"| {name} | {outcome} | {seconds:.0f} | {last[:110]} |")
    outcomes = [outcome for outcome, *_ in results.values()]
    return 0 if all(o == "done" or (o.startswith("left out") and o != NO_TIME) for o in outcomes) else 1


def pack(out: Path) -> None:
    """Everything but weights and packages in one file, ``results.tar.gz``."""
    part = out / "results.tar.gz.part"
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted(out.rglob("*")):
            inside = path.relative_to(out)
            if path.is_file() and path.suffix not in (".pt", ".part", ".gz") and inside.parts[0] != "site":
                archive.add(path, arcname=str(inside))
    shutil.move(part, out / "results.tar.gz")


if __name__ == "__main__":
    sys.exit(main())
