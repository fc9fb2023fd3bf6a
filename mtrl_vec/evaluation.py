"""How good a policy is: Meta-World's official evaluation, and a quick one in our own simulator while training.

The official one (`evaluate`) uses Meta-World's own environments and its own ``metaworld.evaluation``. Each task is
tried on its 50 goals once, with the mean action; an episode succeeds if any of its steps does. It ends there, so that
these returns are not comparable with those of training, whose episodes go on to the time limit.

The quick one (`simulated_success_rates`) counts success alike, on fresh goals, in all worker processes at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym
import metaworld  # noqa: F401  (registers its environments with gymnasium)
import numpy as np
import torch
from metaworld.evaluation import Agent, evaluation
from numpy.typing import NDArray
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from mtrl_vec.acting import ActingPolicy
from mtrl_vec.config import MAX_SEED
from mtrl_vec.errors import InputError
from mtrl_vec.policy import SharedPolicy

NUM_GOALS = 50


def make_official_envs(tasks: Sequence[str], seed: int) -> gym.vector.AsyncVectorEnv:
    """Meta-World's vector environment: task ``k`` in environment ``k``, on its 50 goals of benchmark seed ``seed + k``.

    Two of its defaults would spoil the protocol. A seed of 0 counts as no seed, so it is refused here. And the default
    task selection draws goals with replacement; the pseudorandom one visits each once, but only if told to at resets.

    Raises:
        InputError: seed below 1.
    """
    if not 1 <= seed <= MAX_SEED - len(tasks):
        raise InputError(f"seed is {seed}: Meta-World takes 0 for 'no seed', so give 1 or more, up to 32 bits")
    envs = gym.make_vec(
        "Meta-World/custom-mt-envs",
        vector_strategy="async",
        envs_list=list(tasks),
        seed=seed,
        task_select="pseudorandom",
    )
    assert isinstance(envs, gym.vector.AsyncVectorEnv)
    envs.call("toggle_sample_tasks_on_reset", True)
    return envs


class OfficialAgent:
    """A policy as ``metaworld.evaluation`` wants it: row ``k`` of its observations is task ``k``."""

    def __init__(self, policy: SharedPolicy, num_tasks: int) -> None:
        self._policy = policy
        self._task_idx = torch.arange(num_tasks)

    def eval_action(self, observations: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean actions [K, 4] for observations [K, 39], clipped to the action space."""
        return mean_action(self._policy, observations, self._task_idx).astype(np.float64)

    def reset(self, env_mask: NDArray[np.bool_]) -> None:
        """Nothing to forget between episodes."""


@torch.no_grad()
def mean_action(policy: SharedPolicy, observation: NDArray, task_idx: torch.Tensor) -> NDArray[np.float32]:
    """The policy's mean actions [n, 4], clipped to [-1, 1], for observations [n, 39] of tasks [n]."""
    one_hot = torch.nn.functional.one_hot(task_idx, policy.num_tasks).float()
    loc, _ = policy.distribution(torch.as_tensor(observation, dtype=torch.float32), one_hot, task_idx)
    return loc.clamp(-1, 1).numpy()


def simulated_success_rates(acting: ActingPolicy, env: EnvBase, num_tasks: int, num_steps: int) -> list[float]:
    """Share of environments per task that succeed at any of ``num_steps`` steps with the mean action, [K].

    Args:
        acting: the policy, with its mean actions.
        env: environments of all tasks, see `mtrl_vec.envs.make_env`; they are reset first.
        num_tasks: ``K``.
        num_steps: their time limit.
    """
    state = env.reset()
    success = torch.zeros(state["success"].shape, dtype=torch.bool)
    for _ in range(num_steps):
        state = step_mdp(env.step(acting(state)))
        success |= state["success"]
        if success.all():
            break
    task_idx = state["task_idx"]
    return [success[task_idx == k].float().mean().item() for k in range(num_tasks)]


def evaluate(policy: SharedPolicy, tasks: Sequence[str], seed: int) -> dict[str, float]:
    """Run the official evaluation of a policy.

    Args:
        policy: on the CPU.
        tasks: those it was trained on, in that order.
        seed: of Meta-World's goals, 1 or more.

    Returns:
        See `run_protocol`.

    Raises:
        InputError: seed below 1.
    """
    return run_protocol(OfficialAgent(policy, len(tasks)), tasks, seed)


def run_protocol(agent: Agent, tasks: Sequence[str], seed: int) -> dict[str, float]:
    """``metaworld.evaluation`` of any agent on the 50 goals per task that ``seed`` gives.

    Returns:
        ``eval/<task>/success_rate`` and ``eval/<task>/return`` (mean over 50 episodes) and ``eval/mean_success_rate``.

    Raises:
        InputError: seed below 1.
    """
    envs = make_official_envs(tasks, seed)
    try:
        mean_success, _, successes, returns = evaluation(agent, envs, num_episodes=NUM_GOALS)
    finally:
        envs.close()
    results: dict[str, float] = {}
    for task in tasks:
        results[f"eval/{task}/success_rate"] = float(successes[task])
        results[f"eval/{task}/return"] = float(np.mean(returns[task]))
    results["eval/mean_success_rate"] = mean_success
    return results
