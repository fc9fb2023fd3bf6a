"""Meta-World's official evaluation, in its own environments and by its own ``metaworld.evaluation``.

Each task is tried on its 50 goals once, with the mean action; an episode succeeds if any of its steps does. It ends
there, so that these returns are not comparable with those of training, whose episodes run to the time limit.

Shapes: ``K`` tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import gymnasium as gym
import metaworld  # noqa: F401  (registers its environments with gymnasium)
import numpy as np
from metaworld.evaluation import Agent, evaluation
from numpy.typing import NDArray
from scipy.stats import binomtest

from mtrl_vec.errors import InputError
from mtrl_vec.tasks.suite import TASKS

NUM_GOALS = 50
MAX_SEED = 2**32 - 1 - len(TASKS)
"""Seeds have 32 bits, and task ``k`` gets the goals of ``seed + k``."""


class Policy(Protocol):
    """What `evaluate` evaluates, for example a `mtrl_vec.policy.TrainedPolicy`."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that it knows."""

    def act(self, observation: NDArray[np.floating], task_idx: NDArray[np.integer]) -> NDArray[np.float32]:
        """Mean actions [n, 4] for observations [n, 39] of the tasks at positions [n]."""


def make_official_envs(tasks: Sequence[str], seed: int) -> gym.vector.AsyncVectorEnv:
    """Meta-World's vector environment: task ``k`` in environment ``k``, on its 50 goals of benchmark seed ``seed + k``.

    Two of its defaults would spoil the protocol. A seed of 0 counts as no seed, so it is refused here. And the default
    task selection draws goals with replacement; the pseudorandom one visits each once, but only if told to at resets.

    Raises:
        InputError: see `check_seeds`.
    """
    check_seeds([seed])
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
    """A policy as ``metaworld.evaluation`` expects it: row ``k`` of its observations is task ``k``."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._task_idx = policy, np.arange(len(policy.tasks))

    def eval_action(self, observations: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean actions [K, 4] for observations [K, 39], clipped to the action space."""
        return self._policy.act(observations, self._task_idx).astype(np.float64)

    def reset(self, env_mask: NDArray[np.bool_]) -> None:
        """Nothing to forget between episodes."""


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises InputError where Meta-World would not take these seeds as such."""
    for seed in seeds:
        if not 1 <= seed <= MAX_SEED:
            raise InputError(f"seed is {seed}: Meta-World takes 0 for 'no seed', so give 1 or more, up to 32 bits")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds are {', '.join(map(str, seeds)) or 'none'}: give one or more, each once")


def evaluate(policy: Policy, seeds: Sequence[int]) -> dict[str, float]:
    """Run the official evaluation of a policy, on 50 goals per task and seed.

    Args:
        policy: for example from `mtrl_vec.load_policy`.
        seeds: of Meta-World's goals, 1 or more each.

    Returns:
        As `run_protocol`, means over the seeds; and with each success rate the ends of its 95 % interval (Wilson 1927),
        ``eval/<task>/success_low`` and ``_high``, and ``eval/mean_success_low`` and ``_high`` of all tasks' episodes.

    Raises:
        InputError: see `check_seeds`.
    """
    check_seeds(seeds)
    scores = [run_protocol(OfficialAgent(policy), policy.tasks, seed) for seed in seeds]
    results = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    episodes = NUM_GOALS * len(seeds)
    for task in policy.tasks:
        low, high = wilson_interval(results[f"eval/{task}/success_rate"], episodes)
        results |= {f"eval/{task}/success_low": low, f"eval/{task}/success_high": high}
    low, high = wilson_interval(results["eval/mean_success_rate"], episodes * len(policy.tasks))
    return results | {"eval/mean_success_low": low, "eval/mean_success_high": high}


def wilson_interval(rate: float, episodes: int) -> tuple[float, float]:
    """95 % confidence interval (Wilson 1927) of a success rate over a number of episodes."""
    interval = binomtest(round(rate * episodes), episodes).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


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
