"""The columns of a run's metrics, and gathering a row of them.

Shapes: ``K`` tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence

import psutil
import torch

from mtrl_vec.timing import Timer

SECTIONS = {
    "collect": "collecting rollouts",
    "simulate": "waiting for the simulators, part of collecting",
    "infer": "choosing actions, part of collecting",
    "transfer": "moving data to the GPU and back, part of collecting (where a GPU's work is waited for)",
    "load": "moving rollouts to the GPU",
    "advantages": "advantages",
    "update": "epochs over the rollouts",
    "task_sampling": "task sampling",
    "evaluate": "evaluations while training",
    "checkpoint": "copying the state of the run after each iteration, and writing it from time to time",
}
"""Sections of the timer. With ``overlap``, collecting and learning run at once and add up to more than the whole."""

COLUMNS = {
    "iteration": "iterations so far: a rollout of all environments, and learning from it",
    "frames": "environment steps learned from so far, over all tasks",
    "time/elapsed": "seconds of training so far; time between an interruption and its resumption is left out",
    "time/sps": "steps per second of this iteration, learning included, evaluation not",
    "time/sps_simulate": "steps per second of simulating alone (with double_buffer, of waiting for it)",
    "time/sps_infer": "steps per second of choosing actions alone",
    "time/sps_update": "steps per second of the epochs alone",
    **{f"time/{name}": f"seconds so far: {what}" for name, what in SECTIONS.items()},
    "memory/processes": "resident memory of learner and simulators in MB; shared memory counts in each",
    "memory/device": "GPU memory in use by tensors in MB; 0 without one",
    "train/<task>/success_rate": "fraction of the last 50 whole episodes with a success at any step",
    "train/<task>/return": "their mean sum of rewards",
    "train/<task>/episode_length": "their mean length in steps",
    "train/<task>/learning_progress": "a fast minus a slow moving average of the success rate",
    "train/<task>/frame_fraction": "fraction of the rollout's frames",
    "train/<task>/weight": "weight in the loss; all weights sum to 1",
    "train/<task>/loss_critic": "the critic's squared error, with its coefficient, in units of the scaled reward",
    "train/<task>/grad_norm": "norm of its gradient over the torso, weight included; nan without --log-gradients",
    "train/<task>/grad_cosine": "cosine similarity with the other tasks' gradient, negative in conflict; nan likewise",
    "train/<task>/action_std": "mean standard deviation of the actions",
    "train/loss_policy": "PPO's clipped objective, mean over the minibatches",
    "train/loss_critic": "the critic's squared error, with its coefficient, mean over the minibatches",
    "train/approx_kl": "KL divergence by which the iteration moved the policy, in nats, mean over the last epoch",
    "train/clip_fraction": "fraction of frames whose probability ratio was clipped, mean over the minibatches",
    "train/explained_variance": "fraction of the returns' variance that the critic predicts; 1 is perfect",
    "train/grad_norm": "norm of the gradient before clipping, mean over the minibatches",
    "train/lr": "learning rate, which follows approx_kl",
    "train/action_std": "mean standard deviation of the actions over all tasks",
    "train/skipped_updates": "optimiser steps skipped so far because loss or gradients were not finite",
    "train/unstable_episodes": "episodes truncated so far because the physics became unstable",
    "train/restarts": "times so far that simulator processes that died were replaced",
    "eval/<task>/success_rate": "success rate in the evaluation after this iteration; nan where there was none",
    "eval/mean_success_rate": "mean over the tasks",
}
"""Columns of ``metrics.csv`` and TensorBoard, and what they mean; docs/runs.md has the same table."""


def column_names(tasks: Sequence[str]) -> list[str]:
    """`COLUMNS` with one of each ``<task>`` column per task."""
    names: list[str] = []
    for name in COLUMNS:
        names += [name.replace("<task>", task) for task in tasks] if "<task>" in name else [name]
    return names


def resident_megabytes(pids: Iterable[int]) -> float:
    """Resident memory of this process and of others that still run, in MB."""
    total = psutil.Process().memory_info().rss
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_info().rss
        except psutil.Error:
            continue
    return total / 1e6


class Stopwatch:
    """Times of one iteration, from its construction on.

    Args:
        timer: counts the sections.
    """

    def __init__(self, timer: Timer) -> None:
        self._timer, self._before, self._start = timer, dict(timer.seconds), time.perf_counter()

    def speeds(self, frames: int) -> dict[str, float]:
        """The ``time/sps`` columns, given the frames of the iteration, which ends now."""
        speeds = {"time/sps": frames / (time.perf_counter() - self._start)}
        for section in ("simulate", "infer", "update"):
            spent = self._timer.seconds.get(section, 0.0) - self._before.get(section, 0.0)
            speeds[f"time/sps_{section}"] = frames / spent if spent > 0 else math.nan
        return speeds


def machine_columns(timer: Timer, pids: Iterable[int], device: torch.device) -> dict[str, float]:
    """Seconds of all sections so far, and memory."""
    on_gpu = torch.cuda.memory_allocated(device) / 1e6 if device.type == "cuda" else 0.0
    return {
        **{f"time/{section}": timer.seconds.get(section, 0.0) for section in SECTIONS},
        "memory/processes": resident_megabytes(pids),
        "memory/device": on_gpu,
    }


def std_columns(tasks: Sequence[str], action_std: torch.Tensor) -> dict[str, float]:
    """Mean standard deviations, given those per task and action dimension [K, A]."""
    by_task = zip(tasks, action_std.mean(1), strict=True)
    return {
        "train/action_std": float(action_std.mean()),
        **{f"train/{task}/action_std": float(std) for task, std in by_task},
    }


def prefixed(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of learning as columns."""
    return {f"train/{name}": value for name, value in metrics.items()}
