"""The command ``eval``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mtrl_vec.commands.arguments import EvalCommand
from mtrl_vec.commands.output import check_json, write_json
from mtrl_vec.errors import InputError
from mtrl_vec.policy import load_policy
from mtrl_vec.tasks.official import NUM_GOALS, check_seeds, evaluate


def evaluate_checkpoints(command: EvalCommand) -> None:
    """Evaluate checkpoints and print a table. Raises InputError."""
    if not command.checkpoints:
        raise InputError("no checkpoint given: name one or more, for example runs/my-run or pretrained")
    check_json(command.json)
    check_seeds(command.seeds)
    policies = [load_policy(path) for path in command.checkpoints]
    results: list[dict[str, Any]] = []
    for policy in policies:
        if not command.quiet:
            goals = f"{NUM_GOALS * len(command.seeds)} goals a task"
            print(f"evaluating {policy.file}, trained for {policy.frames:,} frames, on {goals}", flush=True)
        scores = evaluate(policy, command.seeds)
        about = {"checkpoint": str(policy.file), "frames": policy.frames, "seeds": list(command.seeds)}
        results.append(about | scores)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # in a file nothing has to be folded
    console.print(make_table(results, command.seeds))
    write_json(command.json, results)


def make_table(results: Sequence[dict[str, Any]], seeds: Sequence[int]) -> Table:
    """Success rates with their intervals, and returns; a row per task and checkpoint, for narrow terminals as well."""
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
    return table
