"""What several test modules share: small settings, random data, and comparing states to the last bit."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch.nn.functional import one_hot, silu

from mtrl_vec.config import TrainConfig
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.routing import TaskHeads

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

SIZES = {
    "num-envs": 12,
    "num-steps": 16,
    "num-minibatches": 2,
    "num-epochs": 2,
    "head": 16,
    "eval-interval": 0,
}
SMALL = ["--device", "cpu", "--torso", "32", "32", *(f"--{name}={value}" for name, value in SIZES.items())]
"""The same as flags of the command line."""


def tiny_config(**changes: object) -> TrainConfig:
    return TrainConfig.of(**(TINY | {"total_frames": 12 * 16} | changes))


def make_policy(config: TrainConfig) -> SharedPolicy:
    return SharedPolicy.for_tasks(config.policy, config.tasks)


def make_batch(policy: SharedPolicy, *shape: int, task: int | None = None) -> TensorDict:
    """Random observations of random tasks, or all of one task."""
    k = policy.num_tasks
    task_idx = torch.randint(k, shape) if task is None else torch.full(shape, task)
    observation = torch.randn(*shape, 39)
    task_one_hot = one_hot(task_idx, k).float()
    return TensorDict({"observation": observation, "task_idx": task_idx, "task_one_hot": task_one_hot}, shape)


def make_rollout(policy: SharedPolicy, envs: int, steps: int) -> TensorDict:
    """Random data in the collector's layout, without a done."""
    task_idx = (torch.arange(envs) % policy.num_tasks)[:, None].expand(envs, steps).contiguous()
    td = TensorDict(
        {
            "observation": torch.randn(envs, steps, 39),
            "task_idx": task_idx,
            "task_one_hot": one_hot(task_idx, policy.num_tasks).float(),
        },
        (envs, steps),
    )
    false = torch.zeros(envs, steps, 1, dtype=torch.bool)
    td["next"] = td.clone()
    td["next", "observation"] = torch.randn(envs, steps, 39)
    td["next"].update({"done": false, "terminated": false.clone(), "truncated": false.clone()})
    td["next", "reward"] = torch.rand(envs, steps, 1)
    td["next", "success"] = torch.rand(envs, steps, 1) < 0.3
    with torch.no_grad():
        policy.actor(td)
    return td


def loop_over_rows(heads: TaskHeads, x: torch.Tensor, task_idx: torch.Tensor) -> torch.Tensor:
    """What `TaskHeads` returns, row by row."""
    rows = []
    for row, k in zip(x, task_idx.tolist(), strict=True):
        hidden = silu(row @ heads.weight1[k] + heads.bias1[k])
        rows.append(hidden @ heads.weight2[k] + heads.bias2[k])
    return torch.stack(rows)


def assert_same(one: object, other: object, where: str = "") -> None:
    """Equal to the last bit, whatever is nested how."""
    if isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), where
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        assert one == other or (one != one and other != other), where
