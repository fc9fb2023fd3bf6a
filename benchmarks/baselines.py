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
from replay import Replay
from torch import Tensor, nn
from torch.distributions import Normal

from mtrl_vec.sim import SimBatch
from mtrl_vec.sim.compilation import load_model
from mtrl_vec.sim.world import FRAME_SKIP
from mtrl_vec.tasks.layout import ACTION_SIZE, OBSERVATION_SIZE
from mtrl_vec.tasks.suite import resolve_tasks
from mtrl_vec.tasks.task import MAX_EPISODE_STEPS, Task

SEED = 1  # Meta-World's vector environments take 0 for "no seed"
Tasks = Sequence[Task]


def names_of(tasks: Tasks) -> list[str]:
    """Their names."""
    return [task.name for task in tasks]


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
    same contacts. Later episodes start from precomputed states, at no cost. Simulations of one model share it, but for
    the position of what an episode moves.

    Args:
        tasks: in turn over the slots.
        num_slots, first_slot: which slots.
        replay: actions of experts instead of random ones.
    """

    NUM_STARTS = 8
    """Start states of each slot, which repeat."""

    def __init__(self, tasks: Tasks, num_slots: int, first_slot: int = 0, replay: Replay | None = None) -> None:
        task_idx = (first_slot + np.arange(num_slots)) % len(tasks)
        sim = SimBatch(tasks, task_idx, seed=SEED, first_slot=first_slot, random_phase=True)
        self._replay, self._rng = replay, np.random.default_rng(SEED)
        self._starts = []
        for _ in range(1 if replay else self.NUM_STARTS):
            sim.reset(vectors=replay.vectors if replay else None)
            views = [sim.view(slot) for slot in range(num_slots)]
            self._starts.append([(state.copy(), fixture.copy()) for _, state, fixture, _ in views])
            if len(self._starts) == 1:
                self._elapsed = np.zeros(num_slots, dtype=np.int64) if replay else sim.elapsed.copy()
        self._limit = replay.length if replay else MAX_EPISODE_STEPS
        models = {task.model_file: load_model(task.model_file, visual=True) for task in tasks}
        self._signature = views[0][0].state_signature
        self._models = [models[tasks[k].model_file] for k in task_idx]
        fixtures = [world.fixture_name for world, _, _, _ in views]
        self._places = [None if f is None else m.body(f).pos for m, f in zip(self._models, fixtures, strict=True)]
        self._data = [mujoco.MjData(model) for model in self._models]
        self._turns = [
            (model, data, data.mocap_pos[0], data.ctrl) for model, data in zip(self._models, self._data, strict=True)
        ]
        self._low, self._high = (np.array([getattr(tasks[k], f"mocap_{e}") for k in task_idx]) for e in ("low", "high"))
        self._episode = np.full(num_slots, -1)
        self._fixtures = [np.zeros(3)] * num_slots
        self._mocap = np.zeros((num_slots, 3))
        for slot in range(num_slots):
            self._start_episode(slot)

    def _start_episode(self, slot: int) -> None:
        self._episode[slot] += 1
        state, self._fixtures[slot] = self._starts[self._episode[slot] % len(self._starts)][slot]
        mujoco.mj_setState(self._models[slot], self._data[slot], state, self._signature)
        self._mocap[slot] = self._data[slot].mocap_pos[0]

    def advance(self) -> int:
        n = len(self._data)
        action = self._replay.actions[self._elapsed[0]] if self._replay else random_actions(self._rng, n)
        moves = np.clip(action[:, :3], -1, 1) * np.float32(1 / 100)
        self._mocap = np.clip(self._mocap + moves, self._low, self._high)
        grips = np.stack([action[:, 3], -action[:, 3]], axis=1)
        mj_step, mj_forward = mujoco.mj_step, mujoco.mj_forward
        slots = zip(self._turns, self._places, self._fixtures, self._mocap, grips, strict=True)
        for (model, data, mocap_pos, ctrl), place, fixture, target, grip in slots:
            if place is not None:
                place[:] = fixture
            mocap_pos[:] = target
            ctrl[:] = grip
            mj_step(model, data, nstep=FRAME_SKIP)
            mj_forward(model, data)
        self._elapsed += 1
        for slot in np.flatnonzero(self._elapsed >= self._limit):
            self._elapsed[slot] = 0
            self._start_episode(slot)
        return n


class FloorParallel(Contender):
    """`Floor` in several processes, which never wait for each other."""

    def __init__(self, tasks: Tasks, num_workers: int, num_slots: int, experts: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._channels, self._workers = [], []
        for worker in range(num_workers):
            channel, theirs = context.Pipe()
            arguments = theirs, names_of(tasks), num_slots, worker * num_slots, experts
            process = context.Process(target=_floor_worker, args=arguments, daemon=True)
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


def _floor_worker(channel: Connection, names: list[str], num_slots: int, first_slot: int, experts: bool) -> None:
    tasks = resolve_tasks(names)
    floor = Floor(tasks, num_slots, first_slot, Replay(tasks, num_slots, first_slot) if experts else None)
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

    def __init__(self, tasks: Tasks) -> None:
        from torchrl.envs import ParallelEnv

        makers = [partial(_make_gym_wrapper, name) for name in names_of(tasks)]
        super().__init__(ParallelEnv(len(makers), makers, mp_start_method="spawn"))


def _make_gym_wrapper(name: str) -> Any:
    from torchrl.envs import GymWrapper

    return GymWrapper(_make_mt1(name))


def _make_mt1(name: str) -> Any:
    return gymnasium.make("Meta-World/MT1", env_name=name, seed=SEED)


class GymAsync(Contender):
    """Meta-World's own vector environment: Gymnasium's ``AsyncVectorEnv``, one process per task."""

    def __init__(self, tasks: Tasks) -> None:
        self._num_tasks = len(tasks)
        self._env = gymnasium.make_vec(
            "Meta-World/custom-mt-envs", vector_strategy="async", envs_list=names_of(tasks), seed=SEED
        )
        self._env.reset(seed=SEED)
        self._rng = np.random.default_rng(SEED)

    def advance(self) -> int:
        self._env.step(random_actions(self._rng, self._num_tasks))
        return self._num_tasks

    def close(self) -> None:
        self._env.close(terminate=True)


class EnvPool(Contender):
    """EnvPool's Meta-World in C++: one pool per task; as everywhere here, a call steps all its environments.

    With one thread the pools take turns. With several, all pools get their actions before the first result is awaited,
    so that no thread idles while another pool finishes. The number of environments is the best of a few, chosen by
    trial at the start.

    EnvPool starts all environments of a pool in phase and simulates every reset, so that an arbitrary slice would hold
    either all resets or none. With three pools they are therefore a third of an episode apart and are measured in
    thirds of an episode, each of which holds the resets of exactly one pool; likewise with more.
    """

    WIDTHS = (4, 8, 16)  # environments per thread, in each pool
    MAX_WIDTH = 128  # an environment takes 20 MB

    def __init__(self, tasks: Tasks, num_threads: int, widths: Sequence[int] = WIDTHS) -> None:
        import envpool

        self._ids = [f"MetaWorld/{name.removesuffix('-v3').title().replace('-', '')}-v3" for name in names_of(tasks)]
        self._calls = (MAX_EPISODE_STEPS + 1) // len(tasks)  # of a share of an episode: steps, and one that resets
        self._make, self._num_threads = envpool.make, num_threads
        widths = [num_threads * width for width in widths]
        self._widths = [width for width in widths if width <= max(self.MAX_WIDTH, widths[0])]
        self._pools: list[Any] = []
        self._rng = np.random.default_rng(SEED)

    def warm_up(self) -> None:
        self._width = max(self._widths, key=self._trial) if len(self._widths) > 1 else self._widths[0]
        self._make_pools(self._width)
        for share, pool in enumerate(self._pools):
            for _ in range(share * self._calls):
                pool.step(random_actions(self._rng, self._width))
        tried = f", the best of {', '.join(map(str, self._widths))}" if len(self._widths) > 1 else ""
        self.setup = f"{self._width} environments in each of {len(self._ids)} pools{tried}"

    def _make_pools(self, width: int) -> None:
        self.close()
        options = {"env_type": "gymnasium", "num_envs": width, "num_threads": self._num_threads, "seed": SEED}
        self._pools = [self._make(name, **options) for name in self._ids]
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
        for _ in range(self._calls):
            self._step(self._width)
        return (self._calls * len(self._pools) - 1) * self._width  # the call that resets is no step

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
        self._pools = []


class TutorialNet(nn.Module):
    """A torso for all tasks, a head for each. [B, 39], [B] -> action distribution [B, 4], value [B]."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.torso = nn.Sequential(
            nn.Linear(OBSERVATION_SIZE, 512), nn.LayerNorm(512), nn.GELU(), nn.Linear(512, 512), nn.GELU()
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 128), nn.GELU(), nn.Linear(128, ACTION_SIZE + 1)) for _ in range(num_tasks)
        )

    def forward(self, observation: Tensor, task_idx: Tensor) -> tuple[Normal, Tensor]:
        hidden = self.torso(observation)
        out = torch.stack([head(hidden) for head in self.heads], dim=1)
        out = out[torch.arange(len(out), device=out.device), task_idx]
        return Normal(out[:, :-1], 1.0, validate_args=False), out[:, -1]


class TutorialPPO(Contender):
    """PPO as in tutorials: one environment at a time, one step of each task in turn, including learning.

    Args:
        tasks: learned together.
        reset_every_step: call ``env.reset()`` before every step, as published; otherwise only when an episode ends.
        num_threads: number of torch threads.
    """

    STEPS, EPOCHS, MINIBATCH = 500, 4, 512
    GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2

    def __init__(self, tasks: Tasks, reset_every_step: bool, num_threads: int) -> None:
        self._reset_every_step, self._num_threads = reset_every_step, num_threads
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._envs = [_make_mt1(name) for name in names_of(tasks)]
        self._observation: list[np.ndarray | None] = [None] * len(tasks)
        self._net = TutorialNet(len(tasks)).to(self._device)
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
            k = self._turn = (self._turn + 1) % len(self._envs)
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
        for t in reversed(range(len(gae) - len(self._envs))):  # between two steps of a task come those of the others
            gae[t] += decay[t] * gae[t + len(self._envs)]
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
