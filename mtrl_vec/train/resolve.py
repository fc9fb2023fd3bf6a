"""Settings that depend on the machine or on other settings, replaced by what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtrl_vec.config import TrainConfig
from mtrl_vec.envs.make import default_num_workers
from mtrl_vec.errors import InputError
from mtrl_vec.learn.device import resolve_device
from mtrl_vec.ranks import ALONE, Ranks

_OF_A_MACHINE = ("num_workers", "run_dir")
"""Fields of `RuntimeConfig` that may differ between ranks; it is the first one's folder that counts."""


def resolve(config: TrainConfig, ranks: Ranks = ALONE) -> TrainConfig:
    """The settings with ``auto`` and None defaults replaced by concrete values.

    Raises:
        InputError: CUDA is requested but missing, the environments cannot be spread evenly over the ranks, or there
            are too few simulator processes for two halves.
    """
    share, left = divmod(config.num_envs, ranks.size)
    if left:
        raise InputError(
            f"num_envs is {config.num_envs}: it must be a multiple of the {ranks.size} ranks, for example "
            f"--num-envs {(share + 1) * ranks.size}"
        )
    episodes = config.eval_episodes * config.num_tasks
    if config.eval_interval and episodes < ranks.size:
        raise InputError(
            f"eval_episodes is {config.eval_episodes}: {ranks.size} ranks need at least "
            f"{-(-ranks.size // config.num_tasks)} per task, one each"
        )
    device, halves = resolve_device(config.runtime.device).type, config.runtime.double_buffer
    # While the policy acts for one half, the other has to keep all cores busy; a GPU is expected to act too briefly.
    twice = 2 if halves and device == "cpu" and ranks.cores > 2 else 1
    workers = min(share, config.runtime.num_workers or twice * default_num_workers(ranks.cores))
    if halves and workers < 2:
        cause = f"num_envs is {config.num_envs}" if share < 2 else f"num_workers is {workers}"
        raise InputError(
            f"{cause}: double_buffer needs two simulator processes on each rank, one for each half; give more, or "
            "--no-double-buffer"
        )
    return config.replace(
        sampling=config.sampling.for_tasks(config.tasks),
        device=device,
        num_workers=workers,
        num_envs=config.num_envs,
        max_episode_steps=config.max_episode_steps,
        head=config.policy.head_width(config.num_tasks),
        target_kl=config.target_kl,
        final_kl_fraction=config.final_kl_fraction,
        exploration_delay=config.exploration_delay,
        total_frames=config.total_frames,
        eval_interval=config.eval_interval,
        eval_episodes=config.eval_episodes,
        task_weights=config.learner.task_weights or (1.0,) * config.num_tasks,
    )


def require_agreement(config: TrainConfig, ranks: Ranks) -> None:
    """Raises InputError, on all ranks, where the resolved settings of one are not those of the first."""
    expected = ranks.from_first(config.to_dict)

    def check() -> None:
        for name, value in _flat(config.to_dict()).items():
            other = _flat(expected).get(name)
            if value != other and name not in _OF_A_MACHINE:
                raise InputError(f"{name} is {value}, but {other} on the first rank: start all with the same settings")

    ranks.together(check)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in groups, without the groups."""
    groups = [value if isinstance(value, Mapping) else {name: value} for name, value in settings.items()]
    return {name: value for group in groups for name, value in group.items()}
