"""The baselines of `steps_per_sec.py`: bare physics, the usual vectorised Meta-Worlds, and a tutorial's PPO loop.

TorchRL and EnvPool are imported where they are used, since every worker process imports this module too.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import metaworld  # noqa: F401  registers the environments
import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Normal

from mtrl_vec.sim import SimBatch
from mtrl_vec.sim.compilation import load_model
from mtrl_vec.sim.world import FRAME_SKIP
from mtrl_vec.tasks.layout import ACTION_SIZE, METAWORLD
from mtrl_vec.tasks.suite import MT3
from mtrl_vec.tasks.task import MAX_EPISODE_STEPS

SEED = 1  # Meta-World's vector environments take 0 for "no seed"
TASK_NAMES = tuple(task.name for task in MT3)
MOCAP_LOW, MOCAP_HIGH = np.array([-0.5, 0.40, 0.05]), np.array([0.5, 1.0, 0.5])
"""Meta-World's bounds of the hand target."""


def random_actions(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Uniform in [-1, 1], [count, 4] float32."""
    return 2 * rng.random((count, ACTION_SIZE), dtype=np.float32) - 1


class Contender:
    """Something whose speed is measured in slices. It starts in its constructor, and is idle between slices."""

    setup = ""
    """How it is set up, to be printed with the results."""

    def advance(self) -> int:
        """Do the smallest representative piece of work. Returns its environment steps."""
        raise NotImplementedError

    def rate(self, seconds: float) -> float:
        """Run for at least ``seconds``. Returns environment steps per second."""
        start, steps = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            steps += self.advance()
        return steps / elapsed

    def warm_up(self) -> None:
        self.rate(0.3)

    def close(self) -> None:
        """End all processes. After Ctrl-C it is called in the middle of a step."""


class Floor(Contender):
    """Only Meta-World's physics, as it is usually run: one ``MjData`` per simulation, including visual geometry.

    It starts from the states of a `SimBatch` with the same slots and takes the same actions, so that both simulate the
    same contacts. Later episodes start from precomputed states, at no cost.
    """

    NUM_STARTS = 8
    """Start states of each slot, which repeat."""

    def __init__(self, num_slots: int, first_slot: int = 0) -> None:
        task_idx = (first_slot + np.arange(num_slots)) % len(MT3)
        sim = SimBatch(MT3, task_idx, seed=SEED, first_slot=first_slot, random_phase=True)
        sim.reset()
        self._elapsed, starts = sim.elapsed.copy(), [sim.state.copy()]
        for _ in range(self.NUM_STARTS - 1):
            sim.reset()
            starts.append(sim.state.copy())
        (world,) = sim.worlds  # the tasks share their physics model
        self._starts, self._signature = starts, world.state_signature
        self._episode = np.full(num_slots, -1)
        self._model = load_model(MT3[0].model_file, visual=True)
        self._data = [mujoco.MjData(self._model) for _ in range(num_slots)]
        self._views = [(data, data.mocap_pos[0], data.ctrl) for data in self._data]
        self._mocap = np.zeros((num_slots, 3))
        self._rng = np.random.default_rng(SEED)
        for slot in range(num_slots):
            self._start_episode(slot)

    def _start_episode(self, slot: int) -> None:
        self._episode[slot] += 1
        state = self._starts[self._episode[slot] % self.NUM_STARTS][slot]
        mujoco.mj_setState(self._model, self._data[slot], state, self._signature)
        self._mocap[slot] = self._data[slot].mocap_pos[0]

    def advance(self) -> int:
        action = random_actions(self._rng, len(self._data))
        self._mocap = np.clip(self._mocap + action[:, :3] * np.float32(1 / 100), MOCAP_LOW, MOCAP_HIGH)
        grips = np.stack([action[:, 3], -action[:, 3]], axis=1)
        model, mj_step, mj_forward = self._model, mujoco.mj_step, mujoco.mj_forward
        for (data, mocap_pos, ctrl), target, grip in zip(self._views, self._mocap, grips, strict=True):
            mocap_pos[:] = target
            ctrl[:] = grip
            mj_step(model, data, nstep=FRAME_SKIP)
            mj_forward(model, data)
        self._elapsed += 1
        for slot in np.flatnonzero(self._elapsed >= MAX_EPISODE_STEPS):
            self._elapsed[slot] = 0
            self._start_episode(slot)
        return len(self._data)


class FloorParallel(Contender):
    """`Floor` in several processes, which never wait for each other."""

    def __init__(self, num_workers: int, num_slots: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._channels, self._workers = [], []
        for worker in range(num_workers):
            channel, theirs = context.Pipe()
            process = context.Process(target=_floor_worker, args=(theirs, num_slots, worker * num_slots), daemon=True)
            process.start()
            theirs.close()
            self._channels.append(channel)
            self._workers.append(process)
        for channel in self._channels:
            channel.recv()  # ready

    def rate(self, seconds: float) -> float:
        for channel in self._channels:
            channel.send(seconds)
        return sum(channel.recv() for channel in self._channels)

    def close(self) -> None:
        for process in self._workers:
            process.terminate()
            process.join()


def _floor_worker(channel: Connection, num_slots: int, first_slot: int) -> None:
    floor = Floor(num_slots, first_slot)
    channel.send(None)
    try:
        while True:
            channel.send(floor.rate(channel.recv()))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone


class TorchRL(Contender):
    """A TorchRL environment with random actions, including resets."""

    def __init__(self, env: Any) -> None:
        self._env, self._tensordict = env, env.reset()

    def advance(self) -> int:
        self._tensordict["action"] = 2 * torch.rand(*self._env.batch_size, ACTION_SIZE) - 1
        _, self._tensordict = self._env.step_and_maybe_reset(self._tensordict)
        return self._env.batch_size.numel()

    def close(self) -> None:
        self._env.close(raise_if_closed=False)


class GymParallelEnv(TorchRL):
    """The obvious TorchRL program: a ``ParallelEnv`` with one wrapped Meta-World environment per worker and task."""

    def __init__(self) -> None:
        from torchrl.envs import ParallelEnv

        makers = [partial(_make_gym_wrapper, name) for name in TASK_NAMES]
        super().__init__(ParallelEnv(len(makers), makers, mp_start_method="spawn"))


def _make_gym_wrapper(name: str) -> Any:
    from torchrl.envs import GymWrapper

    return GymWrapper(_make_mt1(name))


def _make_mt1(name: str) -> Any:
    return gymnasium.make("Meta-World/MT1", env_name=name, seed=SEED)


class GymAsync(Contender):
    """Meta-World's own vector environment: Gymnasium's ``AsyncVectorEnv``, one process per task."""

    def __init__(self) -> None:
        self._env = gymnasium.make_vec(
            "Meta-World/custom-mt-envs", vector_strategy="async", envs_list=list(TASK_NAMES), seed=SEED
        )
        self._env.reset(seed=SEED)
        self._rng = np.random.default_rng(SEED)

    def advance(self) -> int:
        self._env.step(random_actions(self._rng, len(MT3)))
        return len(MT3)

    def close(self) -> None:
        self._env.close(terminate=True)


class EnvPool(Contender):
    """EnvPool's Meta-World in C++: one pool per task; as everywhere here, a call steps all its environments.

    With one thread the pools take turns. With several, all pools get their actions before the first result is awaited,
    so that no thread idles while another pool finishes. The number of environments is the best of a few, chosen by
    trial at the start.

    EnvPool starts all environments of a pool in phase and simulates every reset, so that an arbitrary slice would hold
    either all resets or none. The pools are therefore a third of an episode apart and are measured in thirds of an
    episode, each of which holds the resets of exactly one pool.
    """

    IDS = ("MetaWorld/Reach-v3", "MetaWorld/Push-v3", "MetaWorld/PickPlace-v3")
    WIDTHS = (4, 8, 16)  # environments per thread, in each pool
    MAX_WIDTH = 128  # an environment takes 20 MB
    CALLS = (MAX_EPISODE_STEPS + 1) // 3  # a third of an episode: its steps and the call that resets

    def __init__(self, num_threads: int, widths: Sequence[int] = WIDTHS) -> None:
        import envpool

        self._make, self._num_threads = envpool.make, num_threads
        widths = [num_threads * width for width in widths]
        self._widths = [width for width in widths if width <= max(self.MAX_WIDTH, widths[0])]
        self._pools: list[Any] = []
        self._rng = np.random.default_rng(SEED)

    def warm_up(self) -> None:
        self._width = max(self._widths, key=self._trial) if len(self._widths) > 1 else self._widths[0]
        self._make_pools(self._width)
        for third, pool in enumerate(self._pools):
            for _ in range(third * self.CALLS):
                pool.step(random_actions(self._rng, self._width))
        tried = f", the best of {', '.join(map(str, self._widths))}" if len(self._widths) > 1 else ""
        self.setup = f"{self._width} environments in each of {len(self.IDS)} pools{tried}"

    def _make_pools(self, width: int) -> None:
        self.close()
        options = {"env_type": "gymnasium", "num_envs": width, "num_threads": self._num_threads, "seed": SEED}
        self._pools = [self._make(name, **options) for name in self.IDS]
        for pool in self._pools:
            pool.reset()

    def _trial(self, width: int) -> float:
        self._make_pools(width)
        self._step(width)
        start, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < 0.4:
            self._step(width)
            calls += 1
        return calls * width / elapsed

    def _step(self, width: int) -> None:
        if self._num_threads == 1:
            for pool in self._pools:
                pool.step(random_actions(self._rng, width))
            return
        for pool in self._pools:
            pool.send(random_actions(self._rng, width))
        for pool in self._pools:
            pool.recv()

    def advance(self) -> int:
        for _ in range(self.CALLS):
            self._step(self._width)
        return (self.CALLS * len(self._pools) - 1) * self._width  # the call that resets is no step

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
        self._pools = []


class TutorialNet(nn.Module):
    """A torso for all tasks, a head for each. [B, 39], [B] -> action distribution [B, 4], value [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.torso = nn.Sequential(
            nn.Linear(METAWORLD.size, 512), nn.LayerNorm(512), nn.GELU(), nn.Linear(512, 512), nn.GELU()
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 128), nn.GELU(), nn.Linear(128, ACTION_SIZE + 1)) for _ in MT3
        )

    def forward(self, observation: Tensor, task_idx: Tensor) -> tuple[Normal, Tensor]:
        hidden = self.torso(observation)
        out = torch.stack([head(hidden) for head in self.heads], dim=1)
        out = out[torch.arange(len(out), device=out.device), task_idx]
        return Normal(out[:, :-1], 1.0, validate_args=False), out[:, -1]


class TutorialPPO(Contender):
    """PPO as in tutorials: one environment at a time, one step of each task in turn, including learning.

    Args:
        reset_every_step: call ``env.reset()`` before every step, as published; otherwise only when an episode ends.
        num_threads: number of torch threads.
    """

    STEPS, EPOCHS, MINIBATCH = 500, 4, 512
    GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2

    def __init__(self, reset_every_step: bool, num_threads: int) -> None:
        self._reset_every_step, self._num_threads = reset_every_step, num_threads
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._envs = [_make_mt1(name) for name in TASK_NAMES]
        self._observation: list[np.ndarray | None] = [None] * len(MT3)
        self._net = TutorialNet().to(self._device)
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr=3e-4)
        self._turn = 0
        self.setup = f"network on {self._device.type}"

    def rate(self, seconds: float) -> float:
        torch.set_num_threads(self._num_threads)
        try:
            return super().rate(seconds)
        finally:
            torch.set_num_threads(1)

    def warm_up(self) -> None:
        self._iterate(30)  # a whole iteration of the published loop takes seconds

    def advance(self) -> int:
        self._iterate(self.STEPS)
        return self.STEPS

    def _tensor(self, values: object, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype, device=self._device)

    def _iterate(self, num_steps: int) -> None:
        rollout = []
        for _ in range(num_steps):
            k = self._turn = (self._turn + 1) % len(MT3)
            if self._reset_every_step or self._observation[k] is None:
                self._observation[k], _ = self._envs[k].reset()
            observation = self._observation[k]
            with torch.no_grad():
                policy, value = self._net(self._tensor(observation)[None], self._tensor([k], torch.int64))
                action = policy.sample()
                log_prob = policy.log_prob(action).sum(-1)
            taken = action[0].cpu().numpy()
            following, reward, terminated, truncated, _ = self._envs[k].step(taken)
            done = terminated or truncated
            self._observation[k] = None if done else following
            rollout.append((observation, following, taken, log_prob.item(), value.item(), reward, terminated, done, k))
        *columns, task_idx = zip(*rollout, strict=True)
        self._update(*map(self._tensor, columns), self._tensor(task_idx, torch.int64))

    def _update(
        self,
        observation: Tensor,
        following: Tensor,
        action: Tensor,
        log_prob: Tensor,
        value: Tensor,
        reward: Tensor,
        terminated: Tensor,
        done: Tensor,
        task_idx: Tensor,
    ) -> None:
        with torch.no_grad():
            next_value = self._net(following, task_idx)[1]
        gae = (reward + self.GAMMA * (1 - terminated) * next_value - value).tolist()
        decay = (self.GAMMA * self.LAMBDA * (1 - done)).tolist()
        for t in reversed(range(len(gae) - len(MT3))):  # between two steps of a task come those of the others
            gae[t] += decay[t] * gae[t + len(MT3)]
        advantage = self._tensor(gae)
        target = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        for _ in range(self.EPOCHS):
            for rows in torch.randperm(len(action), device=self._device).split(self.MINIBATCH):
                policy, values = self._net(observation, task_idx)  # the whole batch, for every minibatch
                ratio = (policy.log_prob(action).sum(-1) - log_prob)[rows].exp()
                clipped = ratio.clamp(1 - self.CLIP, 1 + self.CLIP)
                actor_loss = -torch.min(ratio * advantage[rows], clipped * advantage[rows]).mean()
                loss = actor_loss + 0.5 * (values[rows] - target[rows]).square().mean()
                self._optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self._net.parameters(), 0.5)
                self._optimizer.step()

    def close(self) -> None:
        for env in self._envs:
            env.close()
