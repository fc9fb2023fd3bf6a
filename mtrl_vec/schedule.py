"""What to practise: the share of episodes that each task gets from now on, and its weight in the loss.

A schedule looks at the tasks' statistics once per iteration. Shares and weights are points of the simplex: not
negative, and 1 in sum. All of it is NumPy and torch on the CPU, a few numbers per task.

Shapes: ``K`` tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mtrl_vec.config import TrainConfig

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TaskStatistics:
    """Of one iteration, [K] each but where it says otherwise; NaN where there is nothing to tell yet.

    More than the schedules here look at: those of one's own are written against it.
    """

    success: Array
    """Success rate of the last whole episodes."""
    episode_return: Array
    """Mean return of the same."""
    fast_success: Array
    """Fast moving average of the success rate."""
    slow_success: Array
    """Slow moving average of the success rate."""
    loss: Array
    """The critic's loss."""
    gradient_norm: Array
    """Norm of the tasks' parts of the gradient over the torso, weights included, in the iteration's last minibatch."""
    gradient_cosine: Array
    """Cosines between them, [K, K]."""
    frames: int
    """Environment steps so far, over all tasks."""
    episodes: Array
    """Whole episodes that success and return are of, at most 50."""

    @property
    def progress(self) -> Array:
        """Learning progress, [K]: how the success rate has changed of late, up or down."""
        return self.fast_success - self.slow_success


ENOUGH = 20
"""Episodes that it takes to believe in a success rate."""
PROGRESS_UNIT = 0.2
"""Of learning progress: a task that makes so much more is practised ``e`` times as much (at a temperature of 1)."""


def with_floor(shares: Array, floor: float) -> Array:
    """Mix with the uniform distribution so that none is below ``floor``, [K] -> [K]."""
    return floor + (1 - len(shares) * floor) * shares


def softmax(values: Array) -> Array:
    """Shares by the exponentials of values, [K] -> [K]."""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def proportional(values: Array, temperature: float) -> Array:
    """Shares by values that are not negative, to the power of ``1 / temperature``; equal ones where all are zero."""
    powers = (values / values.max()) ** (1 / temperature) if values.max() > 0 else np.ones_like(values)
    return powers / powers.sum()


class Schedule:
    """Equal shares, in which every slot keeps its task, and equal weights: the schedule ``uniform``, and a base.

    Attributes:
        shares: [K], of the episodes that start from now on; None where no slot changes its task.
        weights: [K], in the loss.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.num_tasks = k = len(config.tasks)
        self.shares: Array | None = None
        self.weights: Array = np.full(k, 1 / k)

    def update(self, statistics: TaskStatistics) -> None:
        """Look at an iteration, and change shares and weights."""

    def loss_weights(self) -> Array:
        """The schedule's weights times the fixed ones of ``task_weights``, [K], 1 in sum."""
        fixed = np.array(self.config.task_weights or np.ones(self.num_tasks))
        weights = self.weights * fixed
        if not weights.any():  # the schedule wants what is switched off
            weights = fixed
        return weights / weights.sum()

    def state(self) -> dict[str, Any]:
        """A copy of all that the schedule goes on from, as plain tensors and values."""
        kept = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray | int)}
        return {name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in kept.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        for name, value in state.items():
            setattr(self, name, value.numpy().copy() if isinstance(value, torch.Tensor) else value)


class RandomTask(Schedule):
    """A task drawn at random for every episode, as in the tutorial."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.shares = np.full(self.num_tasks, 1 / self.num_tasks)


class Curriculum(Schedule):
    """One task after the other, in the order of ``curriculum``: the tutorial's reach, then push, then pick-place.

    A task is done when its success rate reaches ``curriculum_success``, or when it has had ``curriculum_frames``
    environment steps of all. Those that are done keep ``share_floor`` each, so that they are not forgotten; those to
    come get nothing. After the last one all shares are equal.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._order = [config.tasks.index(name) for name in config.curriculum or config.tasks]
        self._stage, self._stage_began = 0, 0
        self._share()

    def update(self, statistics: TaskStatistics) -> None:
        """Go on to the next task if the one at hand is done."""
        if self._stage >= len(self._order):
            return
        limit = self.config.curriculum_frames
        task = self._order[self._stage]
        learned = statistics.success[task] >= self.config.curriculum_success and statistics.episodes[task] >= ENOUGH
        if learned or (limit is not None and statistics.frames - self._stage_began >= limit):
            self._stage, self._stage_began = self._stage + 1, statistics.frames
            self._share()

    def _share(self) -> None:
        shares = np.full(self.num_tasks, 1 / self.num_tasks)
        if self._stage < len(self._order):
            done = self._order[: self._stage]
            shares[:] = 0.0
            shares[done] = self.config.share_floor
            shares[self._order[self._stage]] = 1 - self.config.share_floor * len(done)
        self.shares = shares


class Difficulty(Schedule):
    """Weights in the loss by what is difficult: the tutorial's dynamic task weights. Shares stay equal.

    ``difficulty_by`` ``success``: in proportion to one minus the success rate. ``loss``: by how little the critic's
    loss has fallen, dynamic weight averaging (Liu, Johns, Davison 2019, eq. 7): the softmax of the ratios of the losses
    of the last two iterations. ``temperature`` flattens either.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._losses = np.full((2, self.num_tasks), np.nan)  # of the iteration before, and of the one before that

    def update(self, statistics: TaskStatistics) -> None:
        """Weigh the tasks anew."""
        if self.config.difficulty_by == "success":
            shares = proportional(1 - np.nan_to_num(statistics.success, nan=0.0), self.config.temperature)
        else:
            self._losses = np.stack([statistics.loss, self._losses[0]])
            ratios = np.nan_to_num(self._losses[0] / self._losses[1], nan=1.0, posinf=1.0)
            shares = softmax(ratios / self.config.temperature)
        self.weights = with_floor(shares, self.config.share_floor)


class Progress(RandomTask):
    """Shares by absolute learning progress: practise what is being learned, or forgotten.

    A bandit over tasks as in Teacher-Student curriculum learning (Matiisen et al. 2017), with its Boltzmann
    distribution. Progress is `TaskStatistics.progress`, the difference of a fast and a slow moving average of the
    success rate. Where little moves shares are about equal. (In proportion to progress they would follow noise, and
    starve tasks that have not begun to be learned.)
    """

    def update(self, statistics: TaskStatistics) -> None:
        """Share by the progress of now."""
        progress = np.abs(statistics.progress)
        self.shares = with_floor(softmax(progress / (PROGRESS_UNIT * self.config.temperature)), self.config.share_floor)


class MetaController(nn.Module):
    """Which task to practise next: state [S] -> 64 -> ReLU -> logits of the tasks [K]."""

    def __init__(self, state_size: int, num_tasks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(state_size, 64), nn.ReLU(), nn.Linear(64, num_tasks))
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)  # equal shares to begin with

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """[S] -> [K]."""
        return self.layers(state)


class Meta(RandomTask):
    """A `MetaController` chooses every slot's next task; learning progress is its reward: the tutorial's hierarchy.

    Policy gradient (Williams 1992) once per iteration, on its expectation over the many slots that draw from the same
    shares: ``sum_k pi_k * (a_k - sum_j pi_j a_j) * grad log pi_k``, where ``a_k = r_k - temperature * log pi_k``. The
    rewards ``r`` are the absolute progress in the iteration after the choice, in units of `PROGRESS_UNIT`; the other
    term is that of an entropy bonus, which keeps all tasks in play. In one state alone it would end at the shares of
    `Progress`. ``share_floor`` is mixed in after the controller.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.controller = MetaController(3 * self.num_tasks, self.num_tasks)
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=config.meta_lr)
        self._seen = np.zeros(3 * self.num_tasks)  # the state that the shares of now were chosen in

    def update(self, statistics: TaskStatistics) -> None:
        """Learn from what the last choice has brought, then choose again."""
        reward = torch.tensor(np.abs(statistics.progress) / PROGRESS_UNIT, dtype=torch.float32)
        log_share = torch.log_softmax(self.controller(torch.tensor(self._seen, dtype=torch.float32)), 0)
        share = log_share.detach().exp()
        advantage = reward - self.config.temperature * log_share.detach()
        advantage = advantage - (share * advantage).sum()
        self.optimizer.zero_grad()
        (-(share * advantage * log_share).sum()).backward()
        self.optimizer.step()
        averages = statistics.fast_success, statistics.slow_success
        self._seen = np.concatenate([np.nan_to_num(statistics.success, nan=0.0), *averages])
        with torch.no_grad():
            chosen = torch.softmax(self.controller(torch.tensor(self._seen, dtype=torch.float32)), 0)
        exact = chosen.double().numpy()
        self.shares = with_floor(exact / exact.sum(), self.config.share_floor)

    def state(self) -> dict[str, Any]:
        """See `Schedule.state`."""
        networks = {"controller": self.controller.state_dict(), "optimizer": self.optimizer.state_dict()}
        return super().state() | copy.deepcopy(networks)

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Schedule.restore`."""
        networks = "controller", "optimizer"
        super().restore({name: value for name, value in state.items() if name not in networks})
        for name in networks:
            getattr(self, name).load_state_dict(copy.deepcopy(state[name]))


SCHEDULES: dict[str, Callable[[TrainConfig], Schedule]] = {
    "uniform": Schedule,
    "random": RandomTask,
    "curriculum": Curriculum,
    "difficulty": Difficulty,
    "progress": Progress,
    "meta": Meta,
}


def make_schedule(config: TrainConfig) -> Schedule:
    """The schedule that a configuration asks for."""
    return SCHEDULES[config.schedule](config)
