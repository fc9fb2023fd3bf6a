"""Settings of all tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import pytest
import torch

# Two cores at most, and simulators beside the learner: one thread is the fastest and the most reproducible.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_stray_runs() -> Iterator[None]:
    """A test that fails in the middle of a run would leave it to slow down all that follow."""
    yield
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it may be ending just now
            if "mtrl_vec" in process.cmdline():
                for stray in [process, *process.children(recursive=True)]:
                    stray.kill()
