"""The training loop: collect, advantages, update, log."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from mtrl_vec.checkpoint import BEST_NAME, CHECKPOINT_NAME, save_checkpoint
from mtrl_vec.config import TrainConfig
from mtrl_vec.envs import default_num_workers, make_env
from mtrl_vec.errors import Diverged, InputError
from mtrl_vec.evaluation import simulated_success_rates
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


RUN_FILES = {"config.json", "metrics.csv", "tensorboard"} | {
    Path(name).stem + suffix for name in (CHECKPOINT_NAME, BEST_NAME) for suffix in (".pt", ".tmp")
}


def prepare_run_dir(config: TrainConfig) -> Path:
    """Create the folder of a run and write its configuration there.

    Raises:
        InputError: there is a run already and ``overwrite`` is off, or something that is not a run, or no way to write.
    """
    folder = config.run_dir
    if folder is None:
        folder = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed}"
    try:
        present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if present and not config.overwrite:
            raise InputError(f"{folder} exists: choose another --run-dir, or replace it with --overwrite")
        foreign = [name for name in present if name not in RUN_FILES]
        if present and (foreign or not _is_run(folder)):
            what = f"it holds {foreign[0]}" if foreign else "its config.json is not a run's"
            raise InputError(f"{folder} is not only the folder of a run ({what}): choose another --run-dir")
        for name in present:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --run-dir") from error
    return folder


def _is_run(folder: Path) -> bool:
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"tasks", "total_frames", "seed"} <= values.keys()


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Keep torch to one thread. While the workers simulate, a second one costs them more than it gives the policy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        self.best_success = -1.0
        """Mean success over the tasks of the policy in ``best.pt``; negative before the first evaluation."""
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
            Diverged: a loss or a gradient is no longer finite.
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
        with contextlib.ExitStack() as closing:  # in reverse order, each even if another fails
            closing.callback(env.close, raise_if_closed=False)
            eval_env = self._make_eval_env(closing)
            log = closing.enter_context(contextlib.closing(RunLog(self.run_dir)))
            total = cfg.num_iterations * cfg.frames_per_batch
            display = closing.enter_context(contextlib.closing(ProgressDisplay(cfg.tasks, total, cfg.quiet)))
            closing.callback(self._save)
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
            self._loop(collector, eval_env, log, display)

    def _save(self) -> None:
        if self.frames:
            save_checkpoint(self.run_dir / CHECKPOINT_NAME, self._last_whole)
        else:
            shutil.rmtree(self.run_dir)  # a folder with nothing but settings would only be in the way

    def _make_eval_env(self, closing: contextlib.ExitStack) -> EnvBase | None:
        """Environments for the evaluations; their processes start at the first one and sleep between them."""
        cfg = self.config
        if not cfg.eval_interval:
            return None
        env = make_env(
            cfg.tasks,
            num_workers=self.num_workers,
            envs_per_worker=-(-cfg.eval_episodes // self.num_workers) * len(cfg.tasks),
            seed=cfg.seed,
            first_slot=cfg.num_envs,  # random streams that training does not use
            max_episode_steps=cfg.max_episode_steps,
            random_phase=False,
            rest_after_success=True,
        )
        closing.callback(env.close, raise_if_closed=False)
        return env

    def _evaluate(self, env: EnvBase) -> dict[str, float]:
        """Success rates of the policy as it is now, which is kept if none was better."""
        rates = simulated_success_rates(self.policy, env, self.config.max_episode_steps)
        results = {f"eval/{task}/success_rate": rate for task, rate in zip(self.config.tasks, rates, strict=True)}
        results["eval/mean_success_rate"] = mean = round(sum(rates) / len(rates), 6)  # 1/3 + 2/3 is no tie otherwise
        if mean >= self.best_success:  # of equals the later one, which has learned more
            self.best_success = mean
            kept = {name: self._last_whole[name] for name in ("config", "iteration", "frames", "policy")}
            save_checkpoint(self.run_dir / BEST_NAME, kept | {"evaluation": results})
        return results

    def _evaluation_due(self) -> bool:
        interval, batch = self.config.eval_interval, self.config.frames_per_batch
        last = self.iteration == self.config.num_iterations
        return last or self.frames // interval > (self.frames - batch) // interval

    def _loop(self, collector: Collector, eval_env: EnvBase | None, log: RunLog, display: ProgressDisplay) -> None:
        cfg, timer = self.config, Timer()
        episodes = EpisodeStatistics(cfg.tasks, cfg.num_envs, whole=not cfg.random_phase)
        rollouts = iter(collector)
        start = saved = time.perf_counter()
        while self.iteration < cfg.num_iterations:
            before = time.perf_counter()
            with timer("collect"), single_threaded():
                rollout = next(rollouts).flatten(0, 1)  # [W, E, T] -> [B, T]
            with timer("update"):
                metrics = self.ppo.add_advantages(rollout)
                metrics |= self.ppo.update(rollout, progress=self.iteration / cfg.num_iterations)
                values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
            if broken := [name for name, value in values.items() if not math.isfinite(value)]:
                raise Diverged(f"training diverged in iteration {self.iteration + 1}: {', '.join(broken)} not finite")
            episodes.update(rollout)
            self.iteration += 1
            self._last_whole = self._state()
            evaluation = dict.fromkeys([f"eval/{task}/success_rate" for task in cfg.tasks], math.nan)
            evaluation["eval/mean_success_rate"] = math.nan
            sps = cfg.frames_per_batch / (time.perf_counter() - before)
            if eval_env is not None and self._evaluation_due():
                with timer("evaluate"), single_threaded():
                    evaluation = self._evaluate(eval_env)

            now = time.perf_counter()
            row = {
                "iteration": self.iteration,
                "frames": self.frames,
                "time/elapsed": now - start,
                "time/sps": sps,
                "time/collect": timer.seconds["collect"],
                "time/update": timer.seconds["update"],
                "time/evaluate": timer.seconds.get("evaluate", 0.0),
                **episodes.summary(),
                **evaluation,
                **{f"train/{name}": value for name, value in values.items()},
                "train/action_std": float(self.policy.action_std().mean()),
                "train/unstable_episodes": episodes.unstable_episodes,
            }
            log.write(row)
            display.update(row)
            if now - saved > CHECKPOINT_SECONDS:
                self._save()
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
