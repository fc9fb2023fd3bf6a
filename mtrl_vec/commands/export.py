"""The command ``export``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.commands.arguments import ExportCommand
from mtrl_vec.commands.output import check_file, say, write
from mtrl_vec.errors import InputError, RunFailed
from mtrl_vec.policy import TrainedPolicy, load_policy
from mtrl_vec.policy.export import OnnxPolicy, to_onnx
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import resolve_tasks

TOLERANCE = 1e-5
"""By how much actions may differ, which are in [-1, 1]."""
_NUM_STEPS = 50


def export(command: ExportCommand) -> None:
    """Write a policy as an ONNX model, once its actions in onnxruntime are those of PyTorch.

    Raises:
        InputError: a checkpoint or file that does not work, or a missing library.
        RunFailed: the actions differ.
    """
    check_file("--onnx", command.onnx)
    if command.onnx.suffix != ".onnx":
        raise InputError(f"--onnx {command.onnx}: give a name that ends in .onnx")
    policy = load_policy(command.checkpoint)
    model = to_onnx(policy)
    observation, task_idx = observations(policy)
    gap = np.abs(OnnxPolicy(model).act(observation, task_idx) - policy.act(observation, task_idx)).max()
    if not gap <= TOLERANCE:
        raise RunFailed(f"actions of the ONNX model differ by {gap:.1g} from PyTorch's: {command.onnx} is not written")
    write("--onnx", command.onnx, model)
    differ = f"actions differ by at most {gap:.1g} from PyTorch's on {len(task_idx):,} observations"
    say(f"wrote {command.onnx}, {len(model) / 1e6:.1f} MB: {differ}", command.quiet)


def observations(policy: TrainedPolicy) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """What a policy sees in an episode of each of its tasks [n, 39], and of which task each row is [n]."""
    tasks = resolve_tasks(policy.tasks)
    sim = SimBatch(tasks, range(len(tasks)))
    rows = [sim.reset()]
    for _ in range(_NUM_STEPS):
        rows.append(sim.step(policy.act(rows[-1], sim.task_idx)).observation)
    return np.concatenate(rows).astype(np.float32), np.tile(sim.task_idx, len(rows))
