"""``python -m mtrl_vec``: the commands people type."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro

from mtrl_vec.config import PRESETS, TrainConfig
from mtrl_vec.errors import InputError, RunFailed

# Everything else is imported by the command that needs it, so that --help is quick.
if TYPE_CHECKING:
    from mtrl_vec.trainer import Trainer

USAGE = """usage: python -m mtrl_vec COMMAND [--help] [--debug] ...

commands:
  train   learn the tasks:              python -m mtrl_vec train --seed 1
          go on after an interruption:  python -m mtrl_vec train --resume runs/my-run
  eval    Meta-World's own evaluation:  python -m mtrl_vec eval runs/my-run --seeds 100
  plot    learning curves:              python -m mtrl_vec plot runs/my-run runs/other --out curves
  video   watch a policy:               python -m mtrl_vec video pretrained --out video
  profile where training's time goes:   python -m mtrl_vec profile --iterations 5

Errors are one line; with --debug they come with a traceback.
"""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

CHECKPOINT_HELP = "checkpoint file; or the folder of a run, for its best policy; or 'pretrained', which comes along"


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate trained policies under Meta-World's official protocol: 50 goals per task and seed, mean action."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(help=f"Each a {CHECKPOINT_HELP}.")]
    seeds: tuple[int, ...] = (100,)
    """Seeds of Meta-World's goals, 1 or more; each is another 50 goals a task."""
    json: Path | None = None
    """Also write the results to this file."""
    quiet: bool = False
    """Show nothing but the table."""


@dataclass(frozen=True)
class PlotArgs:
    """Draw success and return of runs, over frames and over time. Runs that differ only in seed are one curve."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, or files like their metrics.csv."""
    out: Path = Path("learning")
    """Where to: gets the endings .png and .svg."""
    quiet: bool = False
    """Do not say what was written."""


@dataclass(frozen=True)
class VideoArgs:
    """Film a policy on each of its tasks, side by side: its mean actions, on fresh goals."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help=f"A {CHECKPOINT_HELP}.")]
    out: Path = Path("video")
    """Where to: gets the endings .mp4 and .gif."""
    episodes: int = 2
    """Episodes of each task, one after the other."""
    seed: int = 0
    """Of the goals."""
    quiet: bool = False
    """Do not say what was written."""


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
    return _parse_config(
        arguments,
        PRESETS[preset],
        f"--preset NAME chooses other defaults, out of {', '.join(PRESETS)}. Shown: {preset}.\n\n"
        "--resume FOLDER goes on with a run that was interrupted.\n\n"
        "Example: python -m mtrl_vec train --tasks push-v3 --total-frames 2000000",
    )


def _parse_config(arguments: Sequence[str], default: TrainConfig, about: str) -> TrainConfig:
    description = f"Train one policy on all tasks.\n\n{about}"
    return _parse(TrainConfig, arguments, prog="python -m mtrl_vec train", default=default, description=description)


def train(arguments: Sequence[str]) -> None:
    """Train a policy, or go on with it; results go to the run's folder."""
    folder, rest = _split_option("--resume", arguments, "the folder of a run")
    trainer = _new_trainer(rest) if folder is None else _resumed_trainer(Path(folder), rest)
    config = trainer.config
    workers = f"{trainer.num_workers} simulator process{'es' if trainer.num_workers > 1 else ''}"
    what = "training" if folder is None else f"after {trainer.frames:,} frames, going on with"
    if not config.quiet:
        print(f"{what} {', '.join(config.tasks)} on {trainer.device}, {workers}: {trainer.run_dir}", flush=True)
    try:
        trainer.train()
    except KeyboardInterrupt:
        print(f"interrupted: {_saved(trainer)}", file=sys.stderr)
        raise
    except RunFailed as error:
        raise RunFailed(f"{error}; {_saved(trainer)}") from error
    if trainer.saved_frames < trainer.frames:
        raise RunFailed(f"trained for {trainer.frames:,} frames, but {_saved(trainer)}")
    if not config.quiet:
        print(f"done: {trainer.frames:,} frames; evaluate with: python -m mtrl_vec eval {trainer.run_dir}")


def _new_trainer(arguments: Sequence[str]) -> Trainer:
    config = parse_train(arguments)
    from mtrl_vec.trainer import Trainer

    return Trainer(config)


def _resumed_trainer(folder: Path, arguments: Sequence[str]) -> Trainer:
    from mtrl_vec.checkpoint import load_latest
    from mtrl_vec.runs import resumed_config
    from mtrl_vec.trainer import Trainer

    checkpoint, problems = load_latest(folder)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if _split_option("--preset", arguments, "a name")[0] is not None:
        raise InputError(f"--preset does not go with --resume: the run in {folder} keeps its settings")
    default = resumed_config(folder, checkpoint)
    config = _parse_config(arguments, default, f"Shown: what the run in {folder} goes on with.")
    if config.run_dir != folder or config.overwrite:
        flag = "--overwrite" if config.overwrite else "--run-dir"
        raise InputError(f"{flag} does not go with --resume: the run goes on in {folder}")
    return Trainer(config, checkpoint=checkpoint)


def _saved(trainer: Trainer) -> str:
    if not trainer.frames:
        return "there was nothing to save yet"
    if not trainer.saved_frames:
        return f"nothing is saved: {trainer.problem}"
    problem = f"{trainer.problem}; " if trainer.problem else ""
    return (
        problem + f"{trainer.saved_frames:,} frames saved in {trainer.run_dir}, go on with --resume {trainer.run_dir}"
    )


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate checkpoints and print a table."""
    example = "python -m mtrl_vec eval runs/my-run pretrained --seeds 100 200 --json results.json"
    args = _parse_with_example(EvalArgs, arguments, "eval", example)
    if not args.checkpoints:
        raise InputError("no checkpoint given: name one or more, for example runs/my-run or pretrained")
    from mtrl_vec import evaluation
    from mtrl_vec.trained import load_policy

    _check_file("--json", args.json)
    evaluation.check_seeds(args.seeds)
    policies = [load_policy(path) for path in args.checkpoints]
    results: list[dict[str, Any]] = []
    for policy in policies:
        if not args.quiet:
            goals = f"{evaluation.NUM_GOALS * len(args.seeds)} goals a task"
            print(f"evaluating {policy.file}, trained for {policy.frames:,} frames, on {goals}", flush=True)
        scores = evaluation.evaluate(policy, args.seeds)
        results.append({"checkpoint": str(policy.file), "frames": policy.frames, "seeds": list(args.seeds)} | scores)
    _print_table(results, args.seeds)
    _write_json(args.json, results)


def _print_table(results: Sequence[dict[str, Any]], seeds: Sequence[int]) -> None:
    """Success rates with their intervals, and returns; a row per task and checkpoint, for narrow terminals as well."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        caption=f"success under Meta-World's protocol, seed {', '.join(map(str, seeds))}; Wilson 95 % intervals"
    )
    for heading in ("checkpoint", "task", "success", "95 %", "return"):
        table.add_column(heading, justify="left" if heading in ("checkpoint", "task") else "right", overflow="fold")
    for result in results:
        name = result["checkpoint"]
        for key in result:
            if key.endswith("/success_rate"):
                at = key.removesuffix("/success_rate")
                interval = f"{result[f'{at}/success_low']:.2f}-{result[f'{at}/success_high']:.2f}"
                success, episode_return = f"{result[key]:.3f}", f"{result[f'{at}/return']:,.0f}"
                table.add_row(name, at.removeprefix("eval/"), success, interval, episode_return)
                name = ""
        interval = f"{result['eval/mean_success_low']:.2f}-{result['eval/mean_success_high']:.2f}"
        table.add_row(
            "", "mean", f"{result['eval/mean_success_rate']:.3f}", interval, "", style="bold", end_section=True
        )
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # in a file nothing has to be folded
    console.print(table)


def plot(arguments: Sequence[str]) -> None:
    """Draw learning curves."""
    args = _parse_with_example(PlotArgs, arguments, "plot", "python -m mtrl_vec plot runs/a runs/b --out curves")
    if not args.runs:
        raise InputError("no run given: name the folders of one or more runs, for example runs/my-run")
    from mtrl_vec.plotting import plot_runs

    _say_written(plot_runs(args.runs, args.out), args.quiet)


def video(arguments: Sequence[str]) -> None:
    """Film a policy."""
    args = _parse_with_example(VideoArgs, arguments, "video", "python -m mtrl_vec video pretrained --out video")
    if args.episodes < 1:
        raise InputError(f"episodes is {args.episodes}: it must be positive")
    from mtrl_vec.trained import load_policy
    from mtrl_vec.video import record

    policy = load_policy(args.checkpoint)
    out = args.out.with_suffix("") if args.out.suffix in (".mp4", ".gif") else args.out
    _say_written(record(policy, policy.tasks, out, episodes=args.episodes, seed=args.seed), args.quiet)


def profile(arguments: Sequence[str]) -> None:
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
    _check_file("--json", args.json)
    from mtrl_vec import profiling
    from mtrl_vec.machine import machine, versions

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks about itself on the terminal
    config = args.config
    if config.run_dir is None:
        config = dataclasses.replace(config, run_dir=Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-profile")
    report = profiling.profile_training(config, args.iterations)
    print("\n".join(profiling.describe(report)))
    about = {"command": shlex.join(["python", "-m", "mtrl_vec", "profile", *given]), **machine(), **versions()}
    _write_json(args.json, report | about)


def _say_written(files: Sequence[Path], quiet: bool) -> None:
    if not quiet:
        print("\n".join(f"wrote {file}" for file in files))


def _check_file(flag: str, path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError(f"{flag} {path}: give a file in an existing folder")


def _write_json(path: Path | None, content: object) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another --json") from error


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "plot": plot,
    "video": video,
    "profile": profile,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug, arguments = "--debug" in arguments, [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else EXIT_BAD_INPUT
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(f"error: unknown command {arguments[0]!r}: known commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what schedulers send counts as Ctrl-C
    try:
        command(arguments[1:])
    except (InputError, RunFailed) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _split_option(flag: str, arguments: Sequence[str], meaning: str) -> tuple[str | None, list[str]]:
    """The value of an option that decides what the others mean, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest="value")
    try:
        known, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{flag} needs {meaning}") from error
    return known.value, rest


def _split_preset(arguments: Sequence[str]) -> tuple[str, list[str]]:
    preset, rest = _split_option("--preset", arguments, f"a name: one of {', '.join(PRESETS)}")
    preset = preset or _preset_of_device(rest)
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: known presets are {', '.join(PRESETS)}")
    return preset, rest


def _preset_of_device(arguments: Sequence[str]) -> str:
    with contextlib.suppress(InputError):  # which the parser of all flags reports
        if _split_option("--device", arguments, "a name")[0] == "cpu":
            return "cpu"
    return "gpu" if torch.cuda.is_available() else "cpu"


def _parse_with_example(cls, arguments, command, example):  # type: ignore[no-untyped-def]
    description = f"{cls.__doc__}\n\nExample: {example}"
    return _parse(cls, arguments, prog=f"python -m mtrl_vec {command}", description=description)


def _parse(cls, arguments, *, prog, description, default=None):  # type: ignore[no-untyped-def]
    options = {} if default is None else {"default": default}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(cls, args=list(arguments), prog=prog, description=description, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(f"{_first_part(box.getvalue())}: see {prog} --help") from end


def _first_part(box: str) -> str:
    """What tyro says in the first part of the box that it draws around a message and its explanations."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:-1]]  # without the title and the bottom
    texts = itertools.dropwhile(_is_rule, lines)
    return " ".join(itertools.takewhile(lambda line: not _is_rule(line), texts)).removesuffix(".") or "cannot be read"


def _is_rule(line: str) -> bool:
    return not line.strip("─-+ ")
