"""Task sampling by a small network whose reward is learning progress.

Shapes: ``K`` tasks, ``S = 3 K`` numbers of state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mtrl_vec.config.sampling import MetaConfig
from mtrl_vec.train.task_sampling import PROGRESS_UNIT, Random, TaskStatistics, with_floor


class MetaController(nn.Module):
    """Which task to practise next: state [S] -> 64 -> ReLU -> logits of the tasks [K]."""

    def __init__(self, state_size: int, num_tasks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(state_size, 64), nn.ReLU(), nn.Linear(64, num_tasks))
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)  # equal probabilities to begin with

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """[S] -> [K]."""
        return self.layers(state)


class Meta(Random):
    """A `MetaController` chooses the task of every new episode; its reward is learning progress.

    Policy gradient (Williams 1992) once per iteration, on its expectation over the many episodes that draw from the
    same probabilities: ``sum_k pi_k * (a_k - sum_j pi_j a_j) * grad log pi_k``, with ``a_k = r_k - temperature * log
    pi_k``. The rewards ``r`` are the absolute progress in the iteration after the choice, in units of `PROGRESS_UNIT`;
    the other term is that of an entropy bonus, which keeps all tasks in play. In one state alone it would end at the
    probabilities of `LearningProgress`. ``min_task_prob`` is mixed in after the controller.

    Args:
        config: of the method.
        tasks: names of the tasks.
        seed: of the controller's initial weights.
    """

    STATE = (*Random.STATE, "_seen")
    _NETWORKS = ("controller", "optimizer")

    def __init__(self, config: MetaConfig, tasks: tuple[str, ...], seed: int = 1) -> None:
        super().__init__(config, tasks)
        self._config = config
        assert config.min_task_prob is not None  # settings of a run are resolved
        self._least = config.min_task_prob
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.controller = MetaController(3 * self.num_tasks, self.num_tasks)
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=config.meta_lr)
        self._seen = np.zeros(3 * self.num_tasks)  # the state in which the current probabilities were chosen

    def update(self, statistics: TaskStatistics) -> None:
        """Learn from what the last choice has brought, then choose again."""
        reward = torch.tensor(np.abs(statistics.learning_progress) / PROGRESS_UNIT, dtype=torch.float32)
        log_prob = torch.log_softmax(self.controller(torch.tensor(self._seen, dtype=torch.float32)), 0)
        prob = log_prob.detach().exp()
        advantage = reward - self._config.temperature * log_prob.detach()
        advantage = advantage - (prob * advantage).sum()
        self.optimizer.zero_grad()
        (-(prob * advantage * log_prob).sum()).backward()
        self.optimizer.step()
        averages = statistics.fast_success, statistics.slow_success
        self._seen = np.concatenate([np.nan_to_num(statistics.success, nan=0.0), *averages])
        with torch.no_grad():
            chosen = torch.softmax(self.controller(torch.tensor(self._seen, dtype=torch.float32)), 0)
        exact = chosen.double().numpy()
        self.task_probs = with_floor(exact / exact.sum(), self._least)

    def state_dict(self) -> dict[str, Any]:
        """See `Uniform.state_dict`."""
        networks = {name: copy.deepcopy(getattr(self, name).state_dict()) for name in self._NETWORKS}
        return super().state_dict() | networks

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Uniform.load_state_dict`."""
        super().load_state_dict(state)
        for name in self._NETWORKS:
            getattr(self, name).load_state_dict(copy.deepcopy(state[name]))
