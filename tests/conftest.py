"""Shared settings of the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import pytest
import torch

from mtrl_vec.config import TrainConfig

# Two cores at most, and simulators beside the learner: one thread is the fastest and the most reproducible.
torch.set_num_threads(1)

TINY = {
    "num_envs": 12,
    "num_steps": 16,
    "num_minibatches": 2,
    "num_epochs": 2,
    "torso": (32, 32),
    "head": 16,
    "eval_interval": 0,
    "quiet": True,
    "device": "cpu",
}
"""A training run of seconds."""


def tiny_config(**changes: object) -> TrainConfig:
    return TrainConfig(**(TINY | {"total_frames": 12 * 16} | changes))


@pytest.fixture(autouse=True)
def no_stray_runs() -> Iterator[None]:
    """A test that fails in the middle of a run would leave it to slow down all that follow."""
    yield
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it may be ending just now
            if "mtrl_vec" in process.cmdline():
                for stray in [process, *process.children(recursive=True)]:
                    stray.kill()
