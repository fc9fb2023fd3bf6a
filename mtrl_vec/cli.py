"""``python -m mtrl_vec``: the commands people type."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro

from mtrl_vec.checkpoint import find_checkpoint, load_trained
from mtrl_vec.config import PRESETS, TrainConfig
from mtrl_vec.errors import InputError, RunFailed

if TYPE_CHECKING:
    from mtrl_vec.trainer import Trainer

USAGE = """usage: python -m mtrl_vec COMMAND [--help] ...

commands:
  train   learn the tasks:              python -m mtrl_vec train --seed 1
  eval    Meta-World's own evaluation:  python -m mtrl_vec eval runs/my-run --seed 100
  profile where training's time goes:   python -m mtrl_vec profile --iterations 5
"""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a trained policy under Meta-World's official protocol: 50 goals per task, mean action."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint file; or the folder of a run, for its best policy; or 'pretrained', for the one that comes along."""
    seed: int = 100
    """Seed of Meta-World's goals, 1 or more."""
    json: Path | None = None
    """Also write the results to this file."""


@dataclass(frozen=True)
class ProfileArgs:
    """Train for a few iterations and tell where the time goes; leaves a trace for Perfetto."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    iterations: int = 5
    """Iterations to measure; some more are run before, to warm up, and one after, for the trace."""
    json: Path | None = None
    """Also write the numbers to this file."""


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the flags of ``train`` mean. Raises InputError where they make no sense."""
    preset, arguments = _split_preset(arguments)
    return _parse(
        TrainConfig,
        arguments,
        prog="python -m mtrl_vec train",
        default=PRESETS[preset],
        description="Train one policy on all tasks.\n\n"
        f"--preset NAME chooses other defaults, out of {', '.join(PRESETS)}. Shown: {preset}.\n\n"
        "Example: python -m mtrl_vec train --tasks push-v3 --total-frames 2000000",
    )


def train(arguments: Sequence[str]) -> int:
    """Train a policy; results go to the run's folder."""
    config = parse_train(arguments)
    from mtrl_vec.trainer import Trainer

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what schedulers send counts as Ctrl-C
    trainer = Trainer(config)
    workers = f"{trainer.num_workers} simulator process{'es' if trainer.num_workers > 1 else ''}"
    print(f"training {', '.join(config.tasks)} on {trainer.device}, {workers}: {trainer.run_dir}", flush=True)
    try:
        trainer.train()
    except KeyboardInterrupt:
        print(f"interrupted: {_saved(trainer)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except RunFailed as error:
        print(f"error: {error}; {_saved(trainer)}", file=sys.stderr)
        return 1
    print(f"done: {trainer.frames:,} frames; evaluate with: python -m mtrl_vec eval {trainer.run_dir}")
    return 0


def _saved(trainer: Trainer) -> str:
    if not trainer.frames:
        return "there was nothing to save yet"
    return f"{trainer.frames:,} frames saved in {trainer.run_dir}"


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a checkpoint and print a table."""
    args = _parse(
        EvalArgs,
        arguments,
        prog="python -m mtrl_vec eval",
        description=f"{EvalArgs.__doc__}\n\nExample: python -m mtrl_vec eval runs/my-run --seed 100 --json result.json",
    )
    from rich.console import Console
    from rich.table import Table

    from mtrl_vec import evaluation

    _check_json(args.json)
    file = find_checkpoint(args.checkpoint)
    policy, config, frames = load_trained(file)
    print(f"evaluating {file}, trained for {frames:,} frames, on {evaluation.NUM_GOALS} goals a task", flush=True)
    results = evaluation.evaluate(policy, config.tasks, args.seed)
    table = Table(title=f"{file}, seed {args.seed}, {evaluation.NUM_GOALS} goals a task")
    for heading in ("task", "success", "return"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in config.tasks:
        success, episode_return = results[f"eval/{task}/success_rate"], results[f"eval/{task}/return"]
        table.add_row(task, f"{success:.2f}", f"{episode_return:,.0f}")
    table.add_row("mean", f"{results['eval/mean_success_rate']:.3f}", "", style="bold")
    Console().print(table)
    _write_json(args.json, results | {"checkpoint": file.name, "frames": frames, "seed": args.seed})
    return 0


def profile(arguments: Sequence[str]) -> int:
    """Profile training and print a table."""
    given = list(arguments)
    preset, arguments = _split_preset(arguments)
    args = _parse(
        ProfileArgs,
        arguments,
        prog="python -m mtrl_vec profile",
        default=ProfileArgs(PRESETS[preset]),
        description=f"{ProfileArgs.__doc__} Takes the flags of train, --preset included.\n\n"
        "Example: python -m mtrl_vec profile --iterations 5 --json profile.json",
    )
    if args.iterations < 1:
        raise InputError(f"iterations is {args.iterations}: it must be positive")
    _check_json(args.json)
    from mtrl_vec import profiling
    from mtrl_vec.machine import machine, versions

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks about itself on the terminal
    config = args.config
    if config.run_dir is None:
        config = dataclasses.replace(config, run_dir=Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-profile")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = profiling.profile_training(config, args.iterations)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(profiling.describe(report)))
    about = {"command": shlex.join(["python", "-m", "mtrl_vec", "profile", *given]), **machine(), **versions()}
    _write_json(args.json, report | about)
    return 0


def _check_json(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError(f"--json {path}: give a file in an existing folder")


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another --json") from error


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"train": train, "eval": evaluate, "profile": profile}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else EXIT_BAD_INPUT
    command = COMMANDS.get(arguments[0])
    if command is None:
        return _fail(f"unknown command {arguments[0]!r}: known commands are {', '.join(COMMANDS)}")
    try:
        return command(arguments[1:])
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _split_preset(arguments: Sequence[str]) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    try:
        known, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"--preset needs a name: one of {', '.join(PRESETS)}") from error
    preset = known.preset or _preset_of_device(rest)
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: known presets are {', '.join(PRESETS)}")
    return preset, rest


def _preset_of_device(arguments: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--device", default="auto")
    with contextlib.suppress(argparse.ArgumentError):  # which the parser of all flags reports
        if parser.parse_known_args(list(arguments))[0].device == "cpu":
            return "cpu"
    return "gpu" if torch.cuda.is_available() else "cpu"


def _parse(cls, arguments, *, prog, description, default=None):  # type: ignore[no-untyped-def]
    options = {} if default is None else {"default": default}
    return tyro.cli(cls, args=list(arguments), prog=prog, description=description, **options)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT
