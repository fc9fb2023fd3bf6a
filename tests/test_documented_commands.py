"""Every command that README and documentation show runs, in the order in which the pages show them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fake_hub import client_settings, local_hub
from mtrl_vec.policy.checkpoint import BEST_NAME, find_checkpoint
from test_readme import documented_commands

RUN = "runs/my-run"
TRAINED = "runs/trained"
"""A copy of the run whose policy succeeds: others take all steps of an evaluation, and have nothing to record."""
SMALL = {"MT10": "MT3", "MT50": "MT3", "pretrained-mt10": "pretrained"}
"""Three tasks take the place of ten and fifty, with which other tests and .ci/run do the same."""
FEW = {
    "train": ["--eval-interval", "0"],
    "video": ["--episodes", "1"],
    "record": ["--episodes", "1", "--image-size", "64"],
}
"""Flags with which the commands do the same with less."""


def shortened(command: list[str], folder: Path) -> list[str]:
    """A command as shown, but for the length of what it does, and for folders outside of its own."""
    words = [word.replace("/shared/", f"{folder}/shared/").replace("runs/new", RUN) for word in command]
    words = [SMALL.get(word, word) for word in words]
    if words[0] != "train":
        words = [TRAINED if word == RUN else word for word in words]
    if "--help" in words:
        return words
    few = FEW.get(words[0], [])
    if words[0] == "train":
        few = [*few, "--total-frames", "50000" if "--resume" in words else "1"]  # a run is at least one iteration
    for flag, value in zip(few[::2], few[1::2], strict=True):
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


@pytest.mark.slow
def test_every_documented_command_runs(tmp_path) -> None:
    done: list[list[str]] = []
    with local_hub() as (hub, address):
        settings = os.environ | client_settings(address, tmp_path / "hf") | {"OMP_NUM_THREADS": "1"}
        for command in (shortened(words, tmp_path) for words in documented_commands()):
            if command in done:
                continue
            result = subprocess.run(
                [sys.executable, "-m", "mtrl_vec", *command],
                cwd=tmp_path,
                env=settings,
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert result.returncode == 0, (command, result.stderr[-2000:])
            done.append(command)
            if not (tmp_path / TRAINED).exists() and (tmp_path / RUN).exists():
                shutil.copytree(tmp_path / RUN, tmp_path / TRAINED)
                shutil.copy(find_checkpoint(Path("pretrained")), tmp_path / TRAINED / BEST_NAME)
        assert sorted(hub.files) == ["my-name/mt10", "owner/name"]
    assert len(done) > 15
