"""The command ``eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mtrl_vec.commands.arguments import EvalCommand
from mtrl_vec.commands.output import check_json, write_json
from mtrl_vec.errors import InputError, tell
from mtrl_vec.files import sha256_of
from mtrl_vec.machine import available_cores
from mtrl_vec.policy import load_policy
from mtrl_vec.policy.checkpoint import BEST_NAME, checkpoint_name, checkpoints
from mtrl_vec.policy.export import OnnxPolicy
from mtrl_vec.policy.trained import choose_tasks
from mtrl_vec.tasks.official import NUM_GOALS, check_seeds, check_tasks, evaluate


def evaluate_checkpoints(command: EvalCommand) -> None:
    """Evaluate checkpoints; print a table of each, and write the results, as soon as they are there.

    Raises:
        InputError: a flag or checkpoint that does not work, or a task that is not Meta-World's.
        WorkerDied: a process ended on its own.
    """
    if not command.checkpoints:
        raise InputError("no checkpoint given: name one or more, for example runs/my-run or pretrained")
    check_json(command.json)
    check_seeds(command.seeds)
    policies = [OnnxPolicy.load(path) if path.suffix == ".onnx" else load_policy(path) for path in command.checkpoints]
    chosen = [choose_tasks(command.tasks, policy.tasks) for policy in policies]
    for tasks in chosen:
        check_tasks(tasks)
    num_workers = available_cores() if command.num_workers is None else command.num_workers
    console = Console()
    results: list[dict[str, Any]] = []
    for policy, tasks in zip(policies, chosen, strict=True):
        progress = ignore if command.quiet else show_progress
        scores = evaluate(policy, command.seeds, num_workers, progress, tasks)
        assert policy.file is not None
        about = {
            "checkpoint": str(policy.file),
            "sha256": sha256_of(policy.file),
            "frames": policy.frames,
            "seeds": list(command.seeds),
        }
        results.append(about | scores)
        goals = f"{NUM_GOALS * len(command.seeds)} goals a task"
        heading = f"{policy.file}, trained for {policy.frames:,} frames{newer(policy.file, policy.frames)}, on {goals}"
        console.print(heading, markup=False, highlight=False, soft_wrap=True)
        console.print(make_table(scores, tasks, command.seeds))
        write_json(command.json, results)


def newer(file: Path, frames: int) -> str:
    """Names the newest checkpoint of the run, if ``file`` is its best policy and from before that; else empty."""
    newest = checkpoints(file.parent)[:1] if file.name == BEST_NAME else []
    return "".join(f" (the newest is {path.name})" for path in newest if path.name != checkpoint_name(frames))


def ignore(done: int, total: int, result: str) -> None:
    """Show no progress."""


def show_progress(done: int, total: int, result: str) -> None:
    """Print the result of each task and seed on standard error as soon as it is there: an interruption loses none."""
    line = f"{done} of {total} done: {result}" if result else f"{NUM_GOALS} episodes each; failures take all 500 steps"
    tell(line)


def make_table(scores: Mapping[str, float], tasks: Sequence[str], seeds: Sequence[int]) -> Table:
    """Success rates with their intervals, and returns: a row per task, and the mean last; fits narrow terminals."""
    caption = f"success under Meta-World's protocol, seed {', '.join(map(str, seeds))}; Wilson 95 % intervals"
    table = Table(caption=caption)
    table.add_column("task", no_wrap=True)
    for heading in ("success", "95 % interval", "return"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in (*tasks, "mean"):
        at = "eval/mean" if name == "mean" else f"eval/{name}"
        rate = scores["eval/mean_success_rate" if name == "mean" else f"{at}/success_rate"]
        separator = "_" if name == "mean" else "/"
        low, high = (scores[f"{at}{separator}success_{end}"] for end in ("low", "high"))
        episode_return = "" if name == "mean" else f"{scores[f'{at}/return']:,.0f}"
        table.add_row(name, f"{rate:.3f}", f"{low:.2f}-{high:.2f}", episode_return, end_section=name == tasks[-1])
    return table
