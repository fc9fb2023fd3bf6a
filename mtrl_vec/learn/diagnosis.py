"""Why a run's numbers are no longer finite: computes one minibatch once more and looks at everything on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import Diverged, InputError
from mtrl_vec.learn.loss import LEARNING_KEYS, MinibatchLoss
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.checkpoint import load_checkpoint, save_checkpoint


def diagnose(config: TrainConfig, policy_state: Mapping[str, Tensor], minibatch: Mapping[str, Tensor]) -> str:
    """The first non-finite tensor in the order of computation, and the tasks affected: on the CPU, without compiling.

    Args:
        config: of the run.
        policy_state: the policy before the optimiser step.
        minibatch: what the step was to learn from, `mtrl_vec.learn.loss.LEARNING_KEYS`, [n, ...] each.

    Returns:
        Part of a sentence, such as ``advantage of push-v3 (12 of 640 frames)``.
    """
    policy = SharedPolicy.for_tasks(config.policy, config.tasks)
    policy.load_state_dict(policy_state)
    batch = TensorDict({key: minibatch[key].cpu() for key in LEARNING_KEYS}, len(minibatch["task_idx"]))
    return next(_problems(config, policy, batch), "nothing that recomputing it on the CPU shows")


def _problems(config: TrainConfig, policy: SharedPolicy, batch: TensorDict) -> Iterator[str]:
    yield from (f"{name} of the policy" for name, tensor in policy.state_dict().items() if not _finite(tensor))
    task_idx = batch["task_idx"]
    for key in LEARNING_KEYS:
        yield from _by_task(key, batch[key], task_idx, config.tasks)
    inputs = batch["observation"], batch["task_one_hot"], task_idx
    with torch.no_grad():
        yield from _by_task("state_value", policy.value(*inputs), task_idx, config.tasks)
        for name, tensor in zip(("mean action", "action_std"), policy.distribution(*inputs), strict=True):
            yield from _by_task(name, tensor, task_idx, config.tasks)
    total, metrics = MinibatchLoss(config, policy)(batch)
    yield from (name for name, tensor in metrics.items() if not _finite(tensor))
    total.backward()
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            yield f"the gradient of {name}"
    norms = [p.grad.norm() for p in policy.parameters() if p.grad is not None]
    if not _finite(torch.stack(norms).norm()):
        yield "the norm of the gradient"


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _by_task(name: str, rows: Tensor, task_idx: Tensor, tasks: tuple[str, ...]) -> Iterator[str]:
    broken = ~rows.reshape(len(rows), -1).isfinite().all(1)
    if broken.any():
        counts = [(task, int((task_idx == k).sum()), int(broken[task_idx == k].sum())) for k, task in enumerate(tasks)]
        yield f"{name} of " + ", ".join(f"{task} ({n} of {all_} frames)" for task, all_, n in counts if n)


def explained(error: Diverged, config: TrainConfig, when: str, dump: Path) -> str:
    """The error's message with a diagnosis. What reproduces it goes into a file, if that can be written."""
    found = diagnose(config, **error.minibatch)
    message = f"{error} in {when}: not finite is {found}"
    try:
        save_checkpoint(dump, {"config": config.to_dict(), **error.minibatch})
        message += f" ({dump} reproduces it: see mtrl_vec.learn.diagnosis)"
    except OSError as problem:
        message += f" (and {dump} cannot be written: {problem.strerror})"
    return message


def reproduce(path: Path) -> str:
    """`diagnose` what a run has left in ``diverged.pt``.

    Raises:
        InputError: see `mtrl_vec.policy.checkpoint.load_checkpoint`; also another kind of checkpoint.
    """
    content = load_checkpoint(path)
    if "minibatch" not in content:
        raise InputError(f"{path} holds no minibatch: give the diverged.pt of a run")
    return diagnose(TrainConfig.from_dict(content["config"]), content["policy_state"], content["minibatch"])
