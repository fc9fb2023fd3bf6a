"""Where rollouts come from: the simulators of training and TorchRL's collector, which can be started from a snapshot.

Shapes: ``W`` workers, ``E`` environments per worker, ``B = W * E``, ``T`` steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector

from mtrl_vec.acting import ActingPolicy
from mtrl_vec.config import TrainConfig
from mtrl_vec.envs import make_env
from mtrl_vec.timing import Timer
from mtrl_vec.workers import SimulatorPool


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Keep torch to one thread. While the workers simulate, a second one costs them more than it gives the policy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Collection:
    """Rollouts of all environments of a run, one after the other.

    Args:
        config: of the run.
        num_workers: ``W``.
        acting: chooses the actions.
        timer: counts the sections ``collect`` and ``simulate``.
    """

    def __init__(self, config: TrainConfig, num_workers: int, acting: ActingPolicy, timer: Timer) -> None:
        self._config, self._num_workers, self._acting, self._timer = config, num_workers, acting, timer
        self._env: SimulatorPool | None = None
        self._rollouts: Iterator[TensorDictBase] = iter(())
        self._shares: NDArray[np.float64] | None = None

    @property
    def workers(self) -> list[int]:
        """The process ids of the simulators."""
        return [] if self._env is None or self._env.is_closed else [process.pid for process in self._env._workers]

    def start(self, shares: NDArray[np.float64] | None = None, slots: Mapping[str, Tensor] | None = None) -> None:
        """Start the simulators, in place of those that run: from the beginning, or from a `snapshot`.

        Args:
            shares: see `share`.
            slots: the snapshot.

        Raises:
            WorkerDied: one of them ended on its own.
        """
        self.close()
        cfg = self._config
        env = self._env = make_env(
            cfg.tasks,
            num_workers=self._num_workers,
            envs_per_worker=cfg.num_envs // self._num_workers,
            seed=cfg.seed,
            goals_seed=cfg.goals_seed,
            max_episode_steps=cfg.max_episode_steps,
            random_phase=cfg.random_phase,
        )
        env.timer = self._timer
        self._shares = None
        self.share(shares)
        if slots is not None:
            env.restore({name: tensor.numpy() for name, tensor in slots.items()})
        self._rollouts = iter(
            Collector(  # resets the environment, which a restored one answers with its last observations
                env,
                self._acting,
                frames_per_batch=cfg.frames_per_batch,
                trust_policy=True,
                track_traj_ids=False,  # the done flags say it all, and this is cheaper
                use_buffers=False,
                auto_register_policy_transforms=False,
            )
        )

    def share(self, shares: NDArray[np.float64] | None) -> None:
        """Draw the tasks of new episodes from shares [K]; None: environments keep theirs. Raises `WorkerDied`."""
        now = self._shares
        if shares is now or (shares is not None and now is not None and np.array_equal(shares, now)):
            return
        assert self._env is not None
        self._env.set_shares(shares)
        self._shares = shares

    def collect(self) -> TensorDictBase:
        """The next rollout, [B, T]. Raises `WorkerDied`."""
        with self._timer("collect"), single_threaded():
            return next(self._rollouts).flatten(0, 1)  # [W, E, T] -> [B, T]

    def snapshot(self) -> dict[str, Tensor]:
        """What the simulators go on from after the last rollout, ``B`` rows each. Raises `WorkerDied`."""
        assert self._env is not None
        return {name: torch.from_numpy(array) for name, array in self._env.snapshot().items()}

    def close(self) -> None:
        """End the simulators' processes."""
        if self._env is not None:
            self._env.close(raise_if_closed=False)
            self._env = None
