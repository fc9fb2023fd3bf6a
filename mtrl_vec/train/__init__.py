"""Training runs: the loop, rollouts, task sampling, statistics, evaluation, folders, checkpoints and logs."""

from mtrl_vec.train.loop import Trainer

__all__ = ["Trainer"]
