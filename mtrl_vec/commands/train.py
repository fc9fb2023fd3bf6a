"""The command ``train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtrl_vec.commands.arguments import parse, peek
from mtrl_vec.errors import InputError, RunFailed

if TYPE_CHECKING:
    from mtrl_vec.train import Trainer


def train(arguments: Sequence[str]) -> None:
    """Train a policy, or continue a run; results go to the run's folder.

    Args:
        arguments: ``train`` and its flags.

    Raises:
        InputError: bad flags, or nothing to resume.
        RunFailed: the run cannot continue.
        KeyboardInterrupt: Ctrl-C.
    """
    folder = None if {"-h", "--help"} & set(arguments) else peek("--resume", arguments)
    trainer = _new(arguments) if folder is None else _resumed(Path(folder), arguments)
    config = trainer.config
    workers = f"{config.runtime.num_workers} simulator process{'es' if config.runtime.num_workers != 1 else ''}"
    what = "training" if folder is None else f"after {trainer.frames:,} frames, continuing with"
    if not config.runtime.quiet:
        print(f"{what} {', '.join(config.tasks)} on {trainer.device}, {workers}: {trainer.run_dir}", flush=True)
    try:
        trainer.train()
    except KeyboardInterrupt:
        print(f"interrupted: {_saved(trainer)}", file=sys.stderr)
        raise
    except RunFailed as error:
        raise RunFailed(f"{error}; {_saved(trainer)}") from error
    if trainer.checkpoints.saved_frames < trainer.frames:
        raise RunFailed(f"trained for {trainer.frames:,} frames, but {_saved(trainer)}")
    if not config.runtime.quiet:
        print(f"done: {trainer.frames:,} frames; evaluate with: python -m mtrl_vec eval {trainer.run_dir}")


def _new(arguments: Sequence[str]) -> Trainer:
    config = parse(arguments).config()
    from mtrl_vec.train import Trainer  # takes seconds, unlike a line about a bad flag

    return Trainer(config)


def _resumed(folder: Path, arguments: Sequence[str]) -> Trainer:
    from mtrl_vec.policy.checkpoint import load_latest
    from mtrl_vec.train import Trainer
    from mtrl_vec.train.run_dir import changed, resumed_config

    checkpoint, problems = load_latest(folder)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if peek("--preset", arguments) is not None:
        raise InputError(f"--preset does not go with --resume: the run in {folder} keeps its settings")
    before = resumed_config(folder, checkpoint)
    command = parse(arguments, resumed=before)
    # First of all, since other defaults of the run would not go with other tasks or another method.
    if command.environment.tasks != before.tasks:
        raise changed("tasks", command.environment.tasks, folder, before.tasks)
    if command.sampling.task_sampling != before.sampling.name:
        raise changed("task_sampling", command.sampling.task_sampling, folder, before.sampling.name)
    config = command.config()
    if config.runtime.run_dir != folder or config.runtime.overwrite:
        flag = "--overwrite" if config.runtime.overwrite else "--run-dir"
        raise InputError(f"{flag} does not go with --resume: the run continues in {folder}")
    return Trainer(config, checkpoint=checkpoint)


def _saved(trainer: Trainer) -> str:
    checkpoints = trainer.checkpoints
    if not trainer.frames:
        return "there was nothing to save yet"
    if not checkpoints.saved_frames:
        return f"nothing is saved: {checkpoints.problem}"
    problem = f"{checkpoints.problem}; " if checkpoints.problem else ""
    where = f"{checkpoints.saved_frames:,} frames saved in {trainer.run_dir}"
    return f"{problem}{where}, continue with --resume {trainer.run_dir}"
