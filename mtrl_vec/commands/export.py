"""The command ``export``."""

from __future__ import annotations

import numpy as np

from mtrl_vec.commands.arguments import ExportCommand
from mtrl_vec.commands.output import check_file, say, write
from mtrl_vec.errors import RunFailed
from mtrl_vec.policy import load_policy
from mtrl_vec.policy.export import OnnxPolicy, to_onnx
from mtrl_vec.tasks.layout import OBSERVATION_SIZE

TOLERANCE = 1e-5
"""By how much actions may differ, which are in [-1, 1]."""
_NUM_ROWS = 1000


def export(command: ExportCommand) -> None:
    """Write a policy as an ONNX model, once its actions in onnxruntime are those of PyTorch.

    Raises:
        InputError: a checkpoint or file that does not work, or a missing library.
        RunFailed: the actions differ.
    """
    check_file("--onnx", command.onnx)
    policy = load_policy(command.checkpoint)
    model = to_onnx(policy)
    rng = np.random.default_rng(0)
    observation = rng.uniform(-1, 1, (_NUM_ROWS, OBSERVATION_SIZE)).astype(np.float32)
    task_idx = rng.integers(len(policy.tasks), size=_NUM_ROWS)
    gap = np.abs(OnnxPolicy(model).act(observation, task_idx) - policy.act(observation, task_idx)).max()
    if not gap <= TOLERANCE:
        raise RunFailed(f"actions of the ONNX model differ by {gap:.1g} from PyTorch's: {command.onnx} is not written")
    write("--onnx", command.onnx, model)
    differ = f"actions differ by at most {gap:.1g} from PyTorch's on {_NUM_ROWS:,} random observations"
    say(f"wrote {command.onnx}, {len(model) / 1e6:.1f} MB: {differ}", command.quiet)
