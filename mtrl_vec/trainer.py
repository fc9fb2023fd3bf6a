"""The training loop: collect, advantages, update, log."""

from __future__ import annotations

import copy
import json
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torchrl.collectors import Collector

from mtrl_vec.checkpoint import CHECKPOINT_NAME, save_checkpoint
from mtrl_vec.config import TrainConfig
from mtrl_vec.envs import default_num_workers, make_env
from mtrl_vec.errors import InputError
from mtrl_vec.metrics import EpisodeStatistics, ProgressDisplay, RunLog, Timer
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.ppo import PPO

CHECKPOINT_SECONDS = 60.0


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA when there is one. Raises InputError when CUDA is asked for and missing."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError("device is cuda: PyTorch finds no CUDA device here; use --device cpu, or auto")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def resolve_num_workers(config: TrainConfig) -> int:
    """The workers asked for, or the most that suit the machine and share the environments and tasks evenly."""
    if config.num_workers is not None:
        return config.num_workers
    envs_per_task = config.num_envs // len(config.tasks)
    return max(w for w in range(1, default_num_workers() + 1) if envs_per_task % w == 0)


def prepare_run_dir(config: TrainConfig) -> Path:
    """Create the folder of a run and write its configuration there.

    Raises:
        InputError: there is a run (or anything else) already, and ``overwrite`` is off.
    """
    folder = config.run_dir
    if folder is None:
        folder = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not config.overwrite:
            raise InputError(f"{folder} exists: choose another --run-dir, or replace it with --overwrite")
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is not the folder of a run: it is not replaced; choose another --run-dir")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --run-dir") from error
    return folder


class Trainer:
    """Trains one policy. ``Trainer(config).train()`` runs from start to end and leaves its results in ``run_dir``.

    Args:
        config: what to train.

    Raises:
        InputError: a device that is not there, or a run folder that exists.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.num_workers = resolve_num_workers(config)
        self.run_dir = prepare_run_dir(config)
        torch.manual_seed(config.seed)
        self.policy = SharedPolicy(config).to(self.device)
        self.ppo = PPO(config, self.policy)
        self.iteration = 0
        self._last_whole: dict[str, Any] = self._state()

    @property
    def frames(self) -> int:
        """Environment steps learned from in whole iterations, as in the checkpoint."""
        return self._last_whole["frames"]

    def train(self) -> None:
        """Run all iterations. On an interruption or a failure the last whole iteration is saved, then the error raised.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            WorkerDied: a simulation worker ended on its own.
        """
        cfg = self.config
        env = make_env(
            cfg.tasks,
            num_workers=self.num_workers,
            envs_per_worker=cfg.num_envs // self.num_workers,
            seed=cfg.seed,
            goals_seed=cfg.goals_seed,
            max_episode_steps=cfg.max_episode_steps,
            random_phase=cfg.random_phase,
        )
        collector = None
        log, display = (
            RunLog(self.run_dir),
            ProgressDisplay(cfg.tasks, cfg.num_iterations * cfg.frames_per_batch, cfg.quiet),
        )
        try:
            collector = Collector(
                env,
                self.policy.actor,
                frames_per_batch=cfg.frames_per_batch,
                policy_device=self.device,
                storing_device=self.device,
                env_device="cpu",
                track_traj_ids=False,  # the done flags say it all, and this is cheaper
                use_buffers=False,
                auto_register_policy_transforms=False,
            )
            self._loop(collector, log, display)
        finally:
            save_checkpoint(self.run_dir / CHECKPOINT_NAME, self._last_whole)
            display.close()
            log.close()
            if collector is not None:
                collector.shutdown()
            elif not env.is_closed:
                env.close()

    def _loop(self, collector: Collector, log: RunLog, display: ProgressDisplay) -> None:
        cfg, timer = self.config, Timer()
        episodes = EpisodeStatistics(cfg.tasks, cfg.num_envs, whole=not cfg.random_phase)
        rollouts = iter(collector)
        start = saved = time.perf_counter()
        while self.iteration < cfg.num_iterations:
            before = time.perf_counter()
            with timer("collect"):
                rollout = next(rollouts).flatten(0, 1)  # [W, E, T] -> [B, T]
            with timer("update"):
                metrics = self.ppo.add_advantages(rollout)
                metrics |= self.ppo.update(rollout, progress=self.iteration / cfg.num_iterations)
                values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
            episodes.update(rollout)
            self.iteration += 1
            self._last_whole = self._state()

            now = time.perf_counter()
            row = {
                "iteration": self.iteration,
                "frames": self.frames,
                "time/elapsed": now - start,
                "time/sps": cfg.frames_per_batch / (now - before),
                "time/collect": timer.seconds["collect"],
                "time/update": timer.seconds["update"],
                **episodes.summary(),
                **{f"train/{name}": value for name, value in values.items()},
                "train/action_std": float(self.policy.action_std().mean()),
                "train/unstable_episodes": episodes.unstable_episodes,
            }
            log.write(row)
            display.update(row)
            if now - saved > CHECKPOINT_SECONDS:
                save_checkpoint(self.run_dir / CHECKPOINT_NAME, self._last_whole)
                saved = now

    def _state(self) -> dict[str, Any]:
        """A copy of all that has been learned, as plain tensors and values."""
        state = {
            "config": self.config.to_dict(),
            "iteration": self.iteration,
            "frames": self.iteration * self.config.frames_per_batch,
            "policy": self.policy.state_dict(),
            "reward_scale": self.ppo.reward_scale.state_dict(),
            "optimizer": self.ppo.optimizer.state_dict(),
            "lr": self.ppo.lr,
        }
        return copy.deepcopy(state)
