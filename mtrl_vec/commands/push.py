"""The command ``push``: a policy and its model card to the Hugging Face Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrl_vec.commands.arguments import PushCommand
from mtrl_vec.commands.output import say
from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError, first_line
from mtrl_vec.files import sha256_of
from mtrl_vec.policy import TrainedPolicy, load_policy
from mtrl_vec.policy.checkpoint import load_checkpoint, save_checkpoint
from mtrl_vec.policy.hub import POLICY_FILE, PREFIX, upload
from mtrl_vec.tasks.suite import TASK_SETS
from mtrl_vec.train.warm_start import policy_of

RESULTS_FILE = "results.json"
"""Name of the results in the repository."""


def push(command: PushCommand) -> None:
    """Upload a policy, its card, and its results if they are given. Raises InputError."""
    policy = load_policy(command.checkpoint)
    content = policy_of(load_checkpoint(policy.file))
    results = None if command.results is None else read_results(command.results, policy)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, POLICY_FILE)
        save_checkpoint(file, content)
        files = {"README.md": card(command.repository, content, results).encode(), POLICY_FILE: file.read_bytes()}
    if results is not None:
        files[RESULTS_FILE] = (json.dumps(results, indent=2) + "\n").encode()
    outdated = () if results else (RESULTS_FILE,)  # of a policy that was there before
    where = upload(command.repository, files, outdated=outdated, private=command.private)
    say(f"pushed {', '.join(files)} to {where}: load_policy('{PREFIX}{command.repository}') loads it", command.quiet)


def read_results(path: Path, policy: TrainedPolicy) -> dict[str, Any]:
    """The results of a policy in a file of ``eval --json``. Raises InputError."""
    digest = sha256_of(policy.file)
    try:
        (results,) = [one for one in json.loads(path.read_text()) if one["sha256"] == digest]
        _table(policy.tasks, results)
    except OSError as error:
        raise InputError(f"cannot read --results {path} ({error.strerror}): give what eval --json wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        problem = f"does not hold the results of {policy.file} once ({first_line(error)})"
        raise InputError(f"--results {path} {problem}: give what eval --json wrote for it") from error
    return {**results, "checkpoint": POLICY_FILE}  # not a folder of this machine


def card(repository: str, content: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
    """The model card: metadata for the hub, what the policy does and how well, how to use it, where it is from.

    Args:
        repository: ``owner/name``.
        content: of the checkpoint.
        results: of the official evaluation, if there was one.
    """
    config = TrainConfig.from_dict(content["config"])
    sets = [name for name, tasks in TASK_SETS.items() if tuple(task.name for task in tasks) == config.tasks]
    what = f"Meta-World's {sets[0]}" if sets else ", ".join(config.tasks)
    call = f'policy(observation, "{config.tasks[0]}")  # [39] -> [4]'
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    lines = [
        *_metadata(repository, sets[0] if sets else "Meta-World", results),
        f"# {repository}",
        "",
        f"A policy for {what}, trained with PPO by mtrl_vec. One network for all of its tasks: a shared torso, and a "
        "head for each task.",
        "",
        "```python",
        "from mtrl_vec import load_policy  # mtrl_vec with its extra 'hub'",
        "",
        f'policy = load_policy("{PREFIX}{repository}")',
        f"action = {call}",
        "```",
        "",
        "## Results",
        "",
        *(_table(config.tasks, results) if results else ["Not evaluated under Meta-World's protocol.", ""]),
        "## Training",
        "",
        f"* {content['frames']:,} environment steps over all tasks, seed {config.seed}",
        f"* Tasks: {', '.join(config.tasks)}",
        f"* Versions: {versions}",
        f"* All settings are in `{POLICY_FILE}`.",
    ]
    return "\n".join(lines) + "\n"


def _metadata(repository: str, dataset: str, results: Mapping[str, Any] | None) -> list[str]:
    """What the hub reads, in YAML."""
    lines = ["---", "library_name: mtrl_vec", "pipeline_tag: reinforcement-learning", "tags:"]
    tags = ("reinforcement-learning", "robotics", "meta-world", "multi-task", "ppo")
    lines += [f"- {tag}" for tag in tags]
    if results:
        lines += [
            "model-index:",
            f"- name: {json.dumps(repository.split('/')[-1])}",
            "  results:",
            "  - task:",
            "      type: reinforcement-learning",
            "      name: reinforcement-learning",
            "    dataset:",
            f"      name: {dataset}",
            f"      type: {dataset}",
            "    metrics:",
            "    - type: success_rate",
            f"      value: {results['eval/mean_success_rate']:.4f}",
            "      name: success rate",
        ]
    return [*lines, "---", ""]


def _table(tasks: tuple[str, ...], results: Mapping[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, results["seeds"]))
    rows = ["| task | success | 95 % interval |", "|---|---:|---:|"]
    for task in (*tasks, "mean"):
        at = f"eval/{task}/success" if task != "mean" else "eval/mean_success"
        rate, low, high = (results[f"{at}_{end}"] for end in ("rate", "low", "high"))
        rows.append(f"| {task} | {rate:.3f} | {low:.2f} to {high:.2f} |")
    protocol = f"Meta-World's own evaluation: 50 goals per task and seed ({seeds}), mean action, success at any step; "
    return [protocol + "Wilson's intervals.", "", *rows, ""]
