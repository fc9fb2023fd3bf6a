"""The command ``train``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrl_vec.commands.output import own_command
from mtrl_vec.commands.parsing import parse, peek
from mtrl_vec.errors import InputError, RunFailed, tell
from mtrl_vec.processes import num_ranks

if TYPE_CHECKING:
    from mtrl_vec.config import TrainConfig
    from mtrl_vec.ranks import Ranks
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
    ranks = _join(arguments)
    folder = None if {"-h", "--help"} & set(arguments) else peek("--resume", arguments)
    trainer = _new(arguments, ranks) if folder is None else _resumed(Path(folder), arguments, ranks)
    if trainer is None:
        return
    config, says = trainer.config, trainer.ranks.first
    workers = f"{config.runtime.num_workers} simulator process{'es' if config.runtime.num_workers != 1 else ''}"
    if trainer.ranks.size > 1:
        workers = f"{trainer.ranks.size} ranks with {workers} each"
    what = f"after {trainer.frames:,} frames, continuing with" if trainer.frames else "training"
    if says and not config.runtime.quiet:
        print(f"{what} {', '.join(config.tasks)} on {trainer.device}, {workers}: {trainer.run_dir}", flush=True)
    try:
        trainer.train()
    except KeyboardInterrupt:
        if says:
            tell(f"interrupted: {_saved(trainer)}")
        raise
    except RunFailed as error:
        error.args = (f"{error}; {_saved(trainer)}",)
        raise
    if trainer.checkpoints.saved_frames < trainer.frames:
        raise RunFailed(f"trained for {trainer.frames:,} frames, but {_saved(trainer)}")
    trainer.ranks.close()
    if says and not config.runtime.quiet:
        print(f"done: {trainer.frames:,} frames; evaluate with: {own_command()} eval {trainer.run_dir}")


def _join(arguments: Sequence[str]) -> Ranks | None:
    """The ranks that torchrun has started; None if this process is alone, which need not wait for torch."""
    if num_ranks() == 1 or {"-h", "--help"} & set(arguments):
        return None
    from mtrl_vec.torchrun import join

    return join(peek("--device", arguments) or "auto")


def _new(arguments: Sequence[str], ranks: Ranks | None) -> Trainer | None:
    """A new run; or that of the same launch of torchrun before a restart, and None if that is complete."""

    def parsed() -> TrainConfig:
        return parse(arguments).config()

    config = parsed() if ranks is None else ranks.together(parsed)
    from mtrl_vec.policy.checkpoint import checkpoints  # takes seconds, unlike a line about a bad flag
    from mtrl_vec.ranks import ALONE
    from mtrl_vec.train import Trainer
    from mtrl_vec.train.run_dir import run_of_this_launch

    ranks = ranks or ALONE
    folder = ranks.from_first(lambda: run_of_this_launch(config.runtime.run_dir))
    if folder is None:
        return Trainer(config, ranks=ranks)
    if not ranks.from_first(lambda: checkpoints(folder)):
        return Trainer(config.replace(run_dir=folder, overwrite=True), ranks=ranks)
    checkpoint = _latest(folder, ranks)
    if checkpoint["progress"]["iteration"] >= config.num_iterations:
        if ranks.first:
            print(f"done: {folder} has its {checkpoint['frames']:,} frames already")
        return None
    return Trainer(config.replace(run_dir=folder, overwrite=False), checkpoint=checkpoint, ranks=ranks)


def _resumed(folder: Path, arguments: Sequence[str], ranks: Ranks | None) -> Trainer:
    from mtrl_vec.ranks import ALONE
    from mtrl_vec.train import Trainer

    ranks = ranks or ALONE
    checkpoint = _latest(folder, ranks)
    config = ranks.together(lambda: _continued(folder, arguments, checkpoint))
    return Trainer(config, checkpoint=checkpoint, ranks=ranks)


def _latest(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The newest readable checkpoint of a run; tells of others that are not."""
    from mtrl_vec.policy.checkpoint import load_latest

    checkpoint, problems = ranks.from_first(lambda: load_latest(folder))
    for problem in problems if ranks.first else ():
        tell(f"warning: {problem}")
    return checkpoint


def _continued(folder: Path, arguments: Sequence[str], checkpoint: Mapping[str, Any]) -> TrainConfig:
    """The settings that a run continues with, given the flags."""
    from mtrl_vec.train.run_dir import changed, resumed_config

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
    return config


def _saved(trainer: Trainer) -> str:
    checkpoints = trainer.checkpoints
    if not trainer.frames:
        return "there was nothing to save yet"
    if not checkpoints.saved_frames:
        return f"nothing is saved: {checkpoints.problem}"
    problem = f"{checkpoints.problem}; " if checkpoints.problem else ""
    where = f"{checkpoints.saved_frames:,} frames saved in {trainer.run_dir}"
    return f"{problem}{where}, continue with --resume {trainer.run_dir}"
