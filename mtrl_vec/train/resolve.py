"""Settings that depend on the machine or on other settings, replaced by what they come to."""

from __future__ import annotations

from mtrl_vec.config import TrainConfig
from mtrl_vec.envs.make import default_num_workers
from mtrl_vec.learn.device import resolve_device


def resolve(config: TrainConfig) -> TrainConfig:
    """The settings with ``auto`` and None defaults replaced by concrete values.

    Raises:
        InputError: CUDA is requested but missing.
    """
    workers = config.runtime.num_workers or default_num_workers()
    return config.replace(
        sampling=config.sampling.for_tasks(config.tasks),
        device=resolve_device(config.runtime.device).type,
        num_workers=min(workers, config.num_envs),
        num_envs=config.num_envs,
        max_episode_steps=config.max_episode_steps,
        total_frames=config.total_frames,
        eval_interval=config.eval_interval,
        eval_episodes=config.eval_episodes,
        task_weights=config.learner.task_weights or (1.0,) * config.num_tasks,
    )
