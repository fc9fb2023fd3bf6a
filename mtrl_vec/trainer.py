"""The training loop: collect, advantages, update, log."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from mtrl_vec.acting import ActingPolicy
from mtrl_vec.checkpoint import BEST_NAME, CHECKPOINT_NAME, save_checkpoint
from mtrl_vec.config import TrainConfig
from mtrl_vec.device import resolve_device
from mtrl_vec.envs import default_num_workers, make_env
from mtrl_vec.errors import Diverged, InputError
from mtrl_vec.evaluation import simulated_success_rates
from mtrl_vec.metrics import EpisodeStatistics, ProgressDisplay, RunLog
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.ppo import PPO
from mtrl_vec.timing import Timer

CHECKPOINT_SECONDS = 60.0

SECTIONS = ("collect", "simulate", "infer", "transfer", "load", "advantages", "update", "evaluate")
"""Of the timer. Collecting is to simulate, with the way to the workers and back, to infer and transfer, and the work of
TorchRL's collector. A GPU has its work queued, and is waited for in infer, transfer and update."""


def resolve_num_workers(config: TrainConfig) -> int:
    """The workers asked for, or the most that suit the machine and share the environments and tasks evenly."""
    if config.num_workers is not None:
        return config.num_workers
    envs_per_task = config.num_envs // len(config.tasks)
    return max(w for w in range(1, default_num_workers() + 1) if envs_per_task % w == 0)


TRACE_NAME = "trace.json.gz"
RUN_FILES = {"config.json", "metrics.csv", "tensorboard", TRACE_NAME} | {
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
        timer: counts the sections of an iteration.

    Raises:
        InputError: a device that is not there, or a run folder that exists.
    """

    def __init__(self, config: TrainConfig, timer: Timer | None = None) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.num_workers = resolve_num_workers(config)
        self.run_dir = prepare_run_dir(config)
        torch.manual_seed(config.seed)
        self.timer = timer or Timer()
        self.policy = SharedPolicy(config).to(self.device)
        self.acting = ActingPolicy(self.policy, config, self.timer, lagging=config.overlap)
        self.ppo = PPO(config, self.policy, self.timer, self.acting.previous)
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
        with contextlib.ExitStack() as closing:  # in reverse order, each even if another fails
            closing.callback(self._remove_if_empty)
            iterate = closing.enter_context(self.running())
            evaluate = closing.enter_context(self._evaluating())
            log = closing.enter_context(contextlib.closing(RunLog(self.run_dir)))
            total = cfg.num_iterations * cfg.frames_per_batch
            display = closing.enter_context(contextlib.closing(ProgressDisplay(cfg.tasks, total, cfg.quiet)))
            closing.callback(self._save)  # first of all, before anything can hang
            self._loop(iterate, evaluate, log, display)

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[], tuple[TensorDictBase, dict[str, float]]]]:
        """Start the simulators. Gives a function that runs one iteration: a rollout [B, T] and the metrics of learning.

        With ``overlap`` it learns from a rollout while the next one is collected, by a policy that is one iteration
        behind; the learner's thread is mostly in torch, which lets the collecting one run. The first two iterations do
        one after the other all the same: torch does not compile and capture in one thread while another one computes.
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
        env.timer = self.timer
        with contextlib.ExitStack() as closing:
            closing.callback(env.close, raise_if_closed=False)
            rollouts = iter(
                Collector(
                    env,
                    self.acting,
                    frames_per_batch=cfg.frames_per_batch,
                    trust_policy=True,
                    track_traj_ids=False,  # the done flags say it all, and this is cheaper
                    use_buffers=False,
                    auto_register_policy_transforms=False,
                )
            )

            def collect() -> TensorDictBase:
                with self.timer("collect"), single_threaded():
                    return next(rollouts).flatten(0, 1)  # [W, E, T] -> [B, T]

            def learn(rollout: TensorDictBase) -> dict[str, float]:
                return self.ppo.learn(rollout, progress=self.iteration / cfg.num_iterations)

            def one_after_the_other() -> tuple[TensorDictBase, dict[str, float]]:
                rollout = collect()
                return rollout, learn(rollout)

            ahead: list[TensorDictBase] = []
            calls = itertools.count()

            def at_once() -> tuple[TensorDictBase, dict[str, float]]:
                rollout = ahead.pop() if ahead else collect()
                more, alone = self.iteration + 1 < cfg.num_iterations, next(calls) < 2
                learning = None if alone else learner.submit(learn, rollout)
                if more:
                    ahead.append(collect())
                metrics = learn(rollout) if learning is None else learning.result()
                self.acting.catch_up()
                return rollout, metrics

            if cfg.overlap:
                # A new thread takes as many as any other has set last, which may be the one of collecting.
                threads = (torch.get_num_threads(),)
                learner = closing.enter_context(ThreadPoolExecutor(1, "learner", torch.set_num_threads, threads))
            yield at_once if cfg.overlap else one_after_the_other

    def _save(self) -> None:
        if self.frames:
            save_checkpoint(self.run_dir / CHECKPOINT_NAME, self._last_whole)

    def _remove_if_empty(self) -> None:
        if not self.frames:
            shutil.rmtree(self.run_dir)  # a folder with nothing but settings would only be in the way

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[Callable[[], list[float]]]:
        """Gives a function that returns success rates. Its processes start with the first call, and sleep between."""
        cfg = self.config
        acting = ActingPolicy(self.policy, cfg, Timer(), mean=True)
        with contextlib.ExitStack() as closing:

            @functools.cache
            def pool() -> EnvBase:
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

            yield lambda: simulated_success_rates(acting, pool(), len(cfg.tasks), cfg.max_episode_steps)

    def _keep_if_best(self, rates: list[float]) -> dict[str, float]:
        """Save the policy if none did better so far. Returns the evaluation's metrics."""
        results = {f"eval/{task}/success_rate": rate for task, rate in zip(self.config.tasks, rates, strict=True)}
        results["eval/mean_success_rate"] = mean = round(sum(rates) / len(rates), 6)  # 1/3 + 2/3 is no tie otherwise
        if mean >= self.best_success:  # of equals the later one, which has learned more
            self.best_success = mean
            kept = {name: self._last_whole[name] for name in ("config", "iteration", "frames", "policy")}
            save_checkpoint(self.run_dir / BEST_NAME, kept | {"evaluation": results})
        return results

    def _evaluation_due(self) -> bool:
        interval, batch = self.config.eval_interval, self.config.frames_per_batch
        if not interval:
            return False
        last = self.iteration == self.config.num_iterations
        return last or self.frames // interval > (self.frames - batch) // interval

    def _loop(
        self,
        iterate: Callable[[], tuple[TensorDictBase, dict[str, float]]],
        evaluate: Callable[[], list[float]],
        log: RunLog,
        display: ProgressDisplay,
    ) -> None:
        cfg, timer = self.config, self.timer
        episodes = EpisodeStatistics(cfg.tasks, cfg.num_envs, whole=not cfg.random_phase)
        start = saved = time.perf_counter()
        while self.iteration < cfg.num_iterations:
            before = time.perf_counter()
            rollout, values = iterate()
            if broken := [name for name, value in values.items() if not math.isfinite(value)]:
                raise Diverged(f"training diverged in iteration {self.iteration + 1}: {', '.join(broken)} not finite")
            episodes.update(rollout)
            self.iteration += 1
            self._last_whole = self._state()
            sps = cfg.frames_per_batch / (time.perf_counter() - before)
            evaluation = dict.fromkeys([f"eval/{task}/success_rate" for task in cfg.tasks], math.nan)
            evaluation["eval/mean_success_rate"] = math.nan
            if self._evaluation_due():
                with timer("evaluate"), single_threaded():
                    evaluation = self._keep_if_best(evaluate())

            now = time.perf_counter()
            row = {
                "iteration": self.iteration,
                "frames": self.frames,
                "time/elapsed": now - start,
                "time/sps": sps,
                **{f"time/{section}": timer.seconds.get(section, 0.0) for section in SECTIONS},
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
