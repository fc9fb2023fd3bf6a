"""How good a policy is: Meta-World's official evaluation, and a quick one in our own simulator while training.

The official one (`evaluate`) uses Meta-World's own environments and its own ``metaworld.evaluation``. Each task is
tried on its 50 goals once, with the mean action; an episode succeeds if any of its steps does. It ends there, so that
these returns are not comparable with those of training, whose episodes go on to the time limit.

The quick one (`simulated_success_rates`) counts success alike, on goals of its own, in all worker processes at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym
import metaworld  # noqa: F401  (registers its environments with gymnasium)
import numpy as np
import torch
from metaworld.evaluation import Agent, evaluation
from numpy.typing import NDArray
from scipy.stats import binomtest
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from mtrl_vec.acting import ActingPolicy
from mtrl_vec.config import MAX_SEED, TrainConfig
from mtrl_vec.envs import make_env
from mtrl_vec.errors import InputError
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.tasks import TASKS
from mtrl_vec.timing import Timer
from mtrl_vec.trained import TrainedPolicy, policy_actions
from mtrl_vec.workers import SimulatorPool

NUM_GOALS = 50


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
    """A policy as ``metaworld.evaluation`` wants it: row ``k`` of its observations is task ``k``."""

    def __init__(self, policy: SharedPolicy, num_tasks: int) -> None:
        self._policy = policy
        self._task_idx = torch.arange(num_tasks)

    def eval_action(self, observations: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean actions [K, 4] for observations [K, 39], clipped to the action space."""
        rows = torch.as_tensor(observations, dtype=torch.float32)
        return policy_actions(self._policy, rows, self._task_idx).astype(np.float64)

    def reset(self, env_mask: NDArray[np.bool_]) -> None:
        """Nothing to forget between episodes."""


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


class Evaluation:
    """The quick evaluation of the policy in training, by processes that start with the first one and sleep between.

    Every time on the same goals, ``eval_episodes`` a task, which training does not see: two policies of a run differ in
    what they can do, not in what they were asked, and a run that is resumed evaluates as one that went through.

    Args:
        config: of the run.
        policy: as it is in training.
        num_workers: processes.
    """

    def __init__(self, config: TrainConfig, policy: SharedPolicy, num_workers: int) -> None:
        self._config, self._num_workers = config, num_workers
        self._acting = ActingPolicy(policy, config, Timer(), mean=True)
        self._pool: SimulatorPool | None = None

    def __call__(self) -> list[float]:
        """Success rates per task, [K]. Raises `WorkerDied`."""
        cfg = self._config
        if self._pool is None:
            self.start()
        assert self._pool is not None
        self._pool.set_seed(cfg.seed, static_seed=True)
        return simulated_success_rates(self._acting, self._pool, len(cfg.tasks), cfg.max_episode_steps)

    def start(self) -> None:
        """Start the processes, in place of those that run. Raises `WorkerDied`."""
        self.close()
        cfg = self._config
        self._pool = make_env(
            cfg.tasks,
            num_workers=self._num_workers,
            envs_per_worker=-(-cfg.eval_episodes // self._num_workers) * len(cfg.tasks),
            first_slot=cfg.num_envs,  # random streams that training does not use
            max_episode_steps=cfg.max_episode_steps,
            random_phase=False,
            rest_after_success=True,
        )
        self._pool.start()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close(raise_if_closed=False)
            self._pool = None


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises InputError where Meta-World would not take these seeds as such."""
    for seed in seeds:
        if not 1 <= seed <= MAX_SEED - len(TASKS):
            raise InputError(f"seed is {seed}: Meta-World takes 0 for 'no seed', so give 1 or more, up to 32 bits")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds are {', '.join(map(str, seeds)) or 'none'}: give one or more, each once")


def evaluate(policy: TrainedPolicy, seeds: Sequence[int]) -> dict[str, float]:
    """Run the official evaluation of a policy, on 50 goals per task and seed.

    Args:
        policy: from `mtrl_vec.trained.load_policy`.
        seeds: of Meta-World's goals, 1 or more each.

    Returns:
        As `run_protocol`, means over the seeds; and with each success rate the ends of its 95 % interval (Wilson 1927),
        ``eval/<task>/success_low`` and ``_high``, and ``eval/mean_success_low`` and ``_high`` of all tasks' episodes.

    Raises:
        InputError: see `check_seeds`.
    """
    check_seeds(seeds)
    agent = OfficialAgent(policy.module, len(policy.tasks))
    scores = [run_protocol(agent, policy.tasks, seed) for seed in seeds]
    results = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    episodes = NUM_GOALS * len(seeds)
    for task in policy.tasks:
        low, high = wilson_interval(results[f"eval/{task}/success_rate"], episodes)
        results |= {f"eval/{task}/success_low": low, f"eval/{task}/success_high": high}
    low, high = wilson_interval(results["eval/mean_success_rate"], episodes * len(policy.tasks))
    return results | {"eval/mean_success_low": low, "eval/mean_success_high": high}


def wilson_interval(rate: float, episodes: int) -> tuple[float, float]:
    """Where a success rate lies with 95 % confidence (Wilson 1927), given that of so many episodes."""
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
