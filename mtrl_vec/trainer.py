"""The training loop: collect, advantages, update, log; and going on after an interruption or a fault."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from mtrl_vec.acting import ActingPolicy
from mtrl_vec.balance import norms_and_cosines
from mtrl_vec.checkpoint import (
    BEST_NAME,
    DUMP_NAME,
    checkpoint_name,
    load_latest,
    random_states,
    remove_old_checkpoints,
    save_checkpoint,
    set_random_states,
)
from mtrl_vec.collecting import Collection, single_threaded
from mtrl_vec.config import TrainConfig
from mtrl_vec.device import resolve_device
from mtrl_vec.diagnosis import explained
from mtrl_vec.display import ProgressDisplay
from mtrl_vec.errors import Diverged, WorkerDied
from mtrl_vec.evaluation import Evaluation
from mtrl_vec.machine import versions
from mtrl_vec.metrics import SECTIONS, EpisodeStatistics, resident_megabytes
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.ppo import PPO
from mtrl_vec.runs import RunLog, changes, continue_run_dir, prepare_run_dir, require_wandb, resumed_config
from mtrl_vec.schedule import TaskStatistics, make_schedule
from mtrl_vec.timing import Timer
from mtrl_vec.workers import default_num_workers

T = TypeVar("T")
Iterate = Callable[[], dict[str, float]]


def resolve_num_workers(config: TrainConfig) -> int:
    """The workers asked for, or the most that suit the machine and share the environments and tasks evenly."""
    if config.num_workers is not None:
        return config.num_workers
    envs_per_task = config.num_envs // len(config.tasks)
    return max(w for w in range(1, default_num_workers() + 1) if envs_per_task % w == 0)


class Trainer:
    """Trains one policy. ``Trainer(config).train()`` runs from start to end and leaves its results in ``run_dir``.

    ``Trainer.resume(run_dir).train()`` goes on where a run was interrupted: on the CPU to the last bit.

    Args:
        config: what to train.
        timer: counts the sections of an iteration.
        checkpoint: whole state of a run to go on from, as `mtrl_vec.checkpoint.load_latest` returns it, in the folder
            that ``config`` names.

    Raises:
        InputError: a device that is not there, a run folder that exists, or a checkpoint that does not fit.
    """

    def __init__(
        self, config: TrainConfig, timer: Timer | None = None, *, checkpoint: Mapping[str, Any] | None = None
    ) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.num_workers = resolve_num_workers(config)
        if config.wandb:
            require_wandb()
        place = prepare_run_dir(config) if checkpoint is None else continue_run_dir(config, checkpoint)
        self.run_dir, self.lock = place
        torch.manual_seed(config.seed)
        self.timer = timer or Timer()
        self.policy = SharedPolicy(config).to(self.device)
        self.acting = ActingPolicy(self.policy, config, self.timer, lagging=config.overlap)
        self.ppo = PPO(config, self.policy, self.timer, self.acting.previous)
        self.collection = Collection(config, self.num_workers, self.acting, self.timer)
        self.episodes = EpisodeStatistics(config.tasks, config.num_envs, whole=not config.random_phase)
        self.schedule = make_schedule(config)
        self.iteration = 0
        self.best_success = -1.0
        """Mean success over the tasks of the policy in ``best.pt``; negative before the first evaluation."""
        self.saved_frames = 0
        """Of the last checkpoint that was written."""
        self.problem = ""
        """Why the last checkpoint could not be written, if so."""
        self._counts = {"skipped_updates": 0, "restarts": 0}
        self._restarts_left = config.max_restarts
        self._elapsed = 0.0
        self._changes = ""
        self._ahead: TensorDictBase | None = None  # the next rollout, where it is collected while learning
        self._last_whole: dict[str, Any] | None = None if checkpoint is None else dict(checkpoint)
        if checkpoint is not None:
            self._restore()
            self.saved_frames = self.frames
            self._changes = changes(config, checkpoint)
            self._counts, self._elapsed = dict(checkpoint["counts"]), checkpoint["elapsed"]
            self.timer.seconds |= checkpoint["seconds"]

    @classmethod
    def resume(cls, run_dir: Path | str, **changes: Any) -> Trainer:
        """Go on with a run from its newest readable checkpoint.

        Args:
            run_dir: its folder.
            changes: settings to change, out of `mtrl_vec.config.HOW_NOT_WHAT`; for example ``total_frames``.

        Raises:
            InputError: nothing to go on from, or a change that would make it another run.
        """
        checkpoint, problems = load_latest(Path(run_dir))
        for problem in problems:
            warnings.warn(problem, stacklevel=2)
        return cls(dataclasses.replace(resumed_config(Path(run_dir), checkpoint), **changes), checkpoint=checkpoint)

    @property
    def frames(self) -> int:
        """Environment steps learned from in whole iterations."""
        return 0 if self._last_whole is None else self._last_whole["frames"]

    def train(self) -> None:
        """Run all iterations. On an interruption or a failure the last whole iteration is saved, then the error raised.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            WorkerDied: simulation workers ended on their own more often than ``max_restarts`` allows.
            Diverged: loss or gradients are no longer finite.
        """
        cfg = self.config
        with contextlib.ExitStack() as closing:  # in reverse order, each even if another fails
            closing.enter_context(self.lock)
            closing.callback(self._remove_if_empty)
            total = cfg.num_iterations * cfg.frames_per_batch
            display = closing.enter_context(
                contextlib.closing(ProgressDisplay(cfg.tasks, total, cfg.quiet, self.frames))
            )
            log = RunLog(self.run_dir, cfg, self.iteration, self.frames, display.note)
            closing.enter_context(contextlib.closing(log))
            iterate = closing.enter_context(self.running())
            evaluate = closing.enter_context(contextlib.closing(Evaluation(cfg, self.policy, self.num_workers)))
            closing.callback(self._save, log)  # first of all, before anything can hang
            if self.iteration:
                log.event(f"resumed after {self.frames:,} frames{self._changes}")
            try:
                self._loop(iterate, evaluate, log, display)
            except Diverged as error:
                raise explained(error, cfg, f"iteration {self.iteration + 1}", self.run_dir / DUMP_NAME) from error

    @contextlib.contextmanager
    def running(self) -> Iterator[Iterate]:
        """Start the simulators. Gives a function that runs one iteration, and returns the metrics of learning.

        It practises what the schedule has decided on, and lets it see what came of it.

        With ``overlap`` it learns from a rollout while the next one is collected, by a policy that is one iteration
        behind; the learner's thread is mostly in torch, which lets the collecting one run. The first two iterations do
        one after the other all the same: torch does not compile and capture in one thread while another one computes.
        """

        def learn(rollout: TensorDictBase) -> dict[str, float]:
            return self.ppo.learn(rollout, progress=self.iteration / self.config.num_iterations)

        def one_after_the_other() -> tuple[TensorDictBase, dict[str, float]]:
            rollout = self.collection.collect()
            return rollout, learn(rollout)

        learned = itertools.count()
        alone = next(learned) < 2

        def at_once() -> tuple[TensorDictBase, dict[str, float]]:
            nonlocal alone
            rollout = self.collection.collect() if self._ahead is None else self._ahead
            more = self.iteration + 1 < self.config.num_iterations
            learning = None if alone else learner.submit(learn, rollout)
            try:
                self._ahead = self.collection.collect() if more else None
            finally:
                if learning is not None:
                    wait([learning])  # also if a worker has died: it must not go on learning in the background
            metrics = learn(rollout) if learning is None else learning.result()
            alone = next(learned) < 2
            self.acting.catch_up()
            return rollout, metrics

        with contextlib.ExitStack() as closing:
            closing.callback(self.collection.close)
            self._start_simulators()
            if self.config.overlap:
                # A new thread takes as many as any other has set last, which may be the one of collecting.
                threads = (torch.get_num_threads(),)
                learner = closing.enter_context(ThreadPoolExecutor(1, "learner", torch.set_num_threads, threads))
            collect_and_learn = at_once if self.config.overlap else one_after_the_other

            def iterate() -> dict[str, float]:
                with self.timer("schedule"):
                    weights = self.schedule.loss_weights().tolist()
                    self.collection.share(self.schedule.shares)
                    self.ppo.weigh(weights)
                rollout, metrics = collect_and_learn()
                self.iteration += 1
                self.episodes.update(rollout)
                with self.timer("schedule"):
                    self.schedule.update(self._statistics(metrics))
                return metrics | {f"{task}/weight": w for task, w in zip(self.config.tasks, weights, strict=True)}

            yield iterate

    def _start_simulators(self) -> None:
        if self._last_whole is None:
            self.collection.start(self.schedule.shares)
            self._last_whole = self._state()
        else:
            self.schedule.restore(self._last_whole["schedule"])
            self.collection.start(self.schedule.shares, self._last_whole["simulators"])
            self._restore()  # last, as starting may draw random numbers

    def _save(self, log: RunLog) -> None:
        if self._last_whole is None or self.frames <= self.saved_frames:
            return
        path = self.run_dir / checkpoint_name(self.frames)
        try:
            with self.timer("checkpoint"):
                save_checkpoint(path, self._last_whole)
            self.saved_frames, self.problem = self.frames, ""
            remove_old_checkpoints(self.run_dir)
        except OSError as error:
            self.problem = f"cannot write {path} ({error.strerror})"
            log.event(f"{self.problem}: the checkpoints before it are still there")

    def _remove_if_empty(self) -> None:
        if not self.frames and not (self.run_dir / DUMP_NAME).exists():
            # A folder with nothing but settings would only be in the way.
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def _keep_if_best(self, rates: list[float]) -> dict[str, float]:
        """Save the policy if none did better so far. Returns the evaluation's metrics. Raises OSError."""
        results = {f"eval/{task}/success_rate": rate for task, rate in zip(self.config.tasks, rates, strict=True)}
        results["eval/mean_success_rate"] = mean = round(sum(rates) / len(rates), 6)  # 1/3 + 2/3 is no tie otherwise
        if mean >= self.best_success:  # of equals the later one, which has learned more
            kept = {**self._progress(), "policy": self.policy.state_dict(), "evaluation": results}
            save_checkpoint(self.run_dir / BEST_NAME, kept)
            self.best_success = mean
        return results

    def _evaluation_due(self) -> bool:
        interval, batch = self.config.eval_interval, self.config.frames_per_batch
        if not interval:
            return False
        frames, last = self.iteration * batch, self.iteration == self.config.num_iterations
        return last or frames // interval > (frames - batch) // interval

    def _again_if_workers_die(self, call: Callable[[], T], log: RunLog, repair: Callable[[], None]) -> T:
        """``call()``; again after a ``repair()`` where simulation workers die, as often as a run may."""
        while True:
            try:
                return call()
            except WorkerDied as error:
                while True:  # those that take their place may die too
                    limit = self.config.max_restarts
                    if not self._restarts_left:
                        raise WorkerDied(f"{error}, and --max-restarts is {limit}") from error
                    self._restarts_left -= 1
                    self._counts["restarts"] += 1
                    count = f"restart {limit - self._restarts_left} of at most {limit}"
                    log.event(f"{error}; going on after {self.frames:,} frames, {count}")
                    try:
                        repair()
                        break
                    except WorkerDied as another:
                        error = another

    def _loop(self, iterate: Iterate, evaluate: Evaluation, log: RunLog, display: ProgressDisplay) -> None:
        cfg, timer = self.config, self.timer

        def iterate_and_look() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
            values = iterate()
            with timer("checkpoint"):
                return values, self.collection.snapshot()

        start = saved = time.perf_counter()
        elapsed_before = self._elapsed
        while self.iteration < cfg.num_iterations:
            before, seconds = time.perf_counter(), dict(timer.seconds)
            values, slots = self._again_if_workers_die(iterate_and_look, log, self._start_simulators)
            sps = cfg.frames_per_batch / (time.perf_counter() - before)
            self._counts["skipped_updates"] += int(values.pop("skipped_updates"))
            evaluation = dict.fromkeys([f"eval/{task}/success_rate" for task in cfg.tasks], math.nan)
            evaluation["eval/mean_success_rate"] = math.nan
            if self._evaluation_due():
                with timer("evaluate"), single_threaded():
                    rates = self._again_if_workers_die(evaluate, log, evaluate.start)
                    try:
                        evaluation = self._keep_if_best(rates)
                    except OSError as error:
                        log.event(f"cannot write {BEST_NAME} in {self.run_dir} ({error.strerror}): the run goes on")

            self._elapsed = elapsed_before + time.perf_counter() - start
            row = {
                **self._progress_row(sps, seconds),
                **self.episodes.summary(),
                **evaluation,
                **{f"train/{name}": value for name, value in values.items()},
                **{f"train/{name}": count for name, count in self._counts.items()},
                "train/unstable_episodes": self.episodes.unstable_episodes,
            }
            log.write(row)
            with timer("checkpoint"):
                self._last_whole = self._state(slots)
            display.update(row)
            if time.perf_counter() - saved >= cfg.checkpoint_seconds:
                self._save(log)
                saved = time.perf_counter()

    def _statistics(self, metrics: Mapping[str, float]) -> TaskStatistics:
        """Of the iteration that is just over."""
        tasks, summary = self.config.tasks, self.episodes.summary()
        norms, cosines = norms_and_cosines(self.ppo.gram.cpu())
        return TaskStatistics(
            success=np.array([summary[f"train/{task}/success_rate"] for task in tasks]),
            episode_return=np.array([summary[f"train/{task}/return"] for task in tasks]),
            fast_success=self.episodes.fast_success.copy(),
            slow_success=self.episodes.slow_success.copy(),
            loss=np.array([metrics[f"{task}/loss_critic"] for task in tasks]),
            gradient_norm=norms.double().numpy(),
            gradient_cosine=cosines.double().numpy(),
            frames=self.iteration * self.config.frames_per_batch,
            episodes=np.array(self.episodes.episodes(), dtype=np.float64),
        )

    def _progress_row(self, sps: float, seconds: Mapping[str, float]) -> dict[str, float]:
        cfg, timer = self.config, self.timer
        alone = {}
        for section in ("simulate", "infer", "update"):
            spent = timer.seconds.get(section, 0.0) - seconds.get(section, 0.0)
            alone[f"time/sps_{section}"] = cfg.frames_per_batch / spent if spent > 0 else math.nan
        stds = self.policy.action_std()
        on_gpu = torch.cuda.memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else 0.0
        return {
            "iteration": self.iteration,
            "frames": self.iteration * cfg.frames_per_batch,
            "time/elapsed": self._elapsed,
            "time/sps": sps,
            **alone,
            **{f"time/{section}": timer.seconds.get(section, 0.0) for section in SECTIONS},
            "memory/processes": resident_megabytes(self.collection.workers),
            "memory/device": on_gpu,
            "train/action_std": float(stds.mean()),
            **{f"train/{task}/action_std": float(std) for task, std in zip(cfg.tasks, stds.mean(1), strict=True)},
        }

    def _progress(self) -> dict[str, Any]:
        frames = self.iteration * self.config.frames_per_batch
        return {"config": self.config.to_dict(), "versions": versions(), "iteration": self.iteration, "frames": frames}

    def _state(self, slots: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """A copy of all that the run goes on from, as plain tensors and values."""
        learned = {
            "policy": self.policy.state_dict(),
            "ppo": self.ppo.state(),
            "acting": self.acting.state(),
            "random": random_states(self.device),
        }
        ahead = None if self._ahead is None else self._ahead.flatten_keys(".").to_dict()
        return {
            **self._progress(),
            **copy.deepcopy(learned),
            "episodes": self.episodes.state(),
            "schedule": self.schedule.state(),
            "simulators": slots,
            "ahead": ahead,
            "best_success": self.best_success,
            "counts": dict(self._counts),
            "elapsed": self._elapsed,
            "seconds": dict(self.timer.seconds),
        }

    def _restore(self) -> None:
        """Go on from the last whole iteration, but for what is only counted."""
        state = self._last_whole
        assert state is not None
        self.iteration, self.best_success = state["iteration"], state["best_success"]
        self.policy.load_state_dict(state["policy"])
        self.ppo.restore(state["ppo"])
        self.acting.restore(state["acting"])
        self.episodes.restore(state["episodes"])
        self.schedule.restore(state["schedule"])
        shape = (self.config.num_envs, self.config.num_steps)
        self._ahead = None if state["ahead"] is None else TensorDict(state["ahead"], shape).unflatten_keys(".")
        set_random_states(state["random"], self.device)
