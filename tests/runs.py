"""Training runs of seconds in this process: whole ones, interrupted ones and resumed ones, and comparing them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from helpers import tiny_config
from mtrl_vec.policy.checkpoint import checkpoints, load_checkpoint
from mtrl_vec.train import Trainer

# Short episodes and evaluations, so that resets, statistics of episodes and best.pt are part of what is compared.
SETTINGS = {"total_frames": 6 * 192, "max_episode_steps": 20, "eval_interval": 384, "eval_episodes": 2}

PARTS = (
    *("progress", "policy", "acting", "learner", "rollouts", "pipeline"),
    *("statistics", "task_sampling", "evaluation"),
)
"""What a run continues from, as it is named in a checkpoint of its whole state."""


def train(run_dir: Path, **changes: object) -> Trainer:
    trainer = Trainer(tiny_config(run_dir=run_dir, **SETTINGS | changes))
    trainer.train()
    return trainer


def train_until_interrupted(run_dir: Path, after: int, **changes: object) -> None:
    """Ctrl-C in the middle of iteration ``after + 1``, when its rollout has been collected."""
    trainer = Trainer(tiny_config(run_dir=run_dir, **SETTINGS | changes))
    learn, calls = trainer.learner.learn, []

    def learn_or_interrupt(*args, **options):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return learn(*args, **options)

    trainer.learner.learn = learn_or_interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def resume(run_dir: Path, **changes: object) -> Trainer:
    torch.manual_seed(12345)  # nothing of the process that was interrupted may be needed
    trainer = Trainer.resume(run_dir, **changes)
    trainer.train()
    return trainer


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, but for times and memory."""
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def whole_state(run_dir: Path) -> dict[str, object]:
    """What the newest checkpoint holds, but for what says where and how long, and how often workers were replaced."""
    content = load_checkpoint(checkpoints(run_dir)[0])
    assert content.keys() >= set(PARTS)
    content["progress"] = {k: v for k, v in content["progress"].items() if k not in ("elapsed", "restarts")}
    return {k: v for k, v in content.items() if k not in ("config", "seconds")}
