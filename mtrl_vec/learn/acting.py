"""The policy where it acts: between the simulators, which are on the CPU, and the device that it lives on."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import IndependentNormal

from mtrl_vec.config import TrainConfig
from mtrl_vec.learn.device import GraphedCall, autocast, on_stream
from mtrl_vec.learn.exploration import ActionNoise
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.timing import Timer

Noise = Callable[[Tensor], Tensor]
"""Noise of the actions [..., A] for tasks [...]."""


class ActingPolicy(TensorDictModuleBase):
    """Adds an ``action`` to what the simulators observe, and on the CPU its ``action_log_prob``.

    To a GPU observations and one-hots travel in one copy, and the actions come back in another, through pinned memory;
    everything in between is queued, on a stream of its own that goes before the learner's, so that the one wait per
    step is for the actions. With ``cuda_graphs`` the network is launched as one graph. Log-probabilities are computed
    with the update there, see `mtrl_vec.learn.advantages`.

    Args:
        policy: on its device.
        config: of the run, for precision, compilation and the seed of the actions on a GPU.
        timer: counts the sections ``infer`` and ``transfer``.
        mean: take the mean actions instead of random ones. (TorchRL's exploration type is one for the whole process:
            a loss that is computed in another thread meanwhile would change it.)
        lagging: act with a copy, which `catch_up` brings up to date: ``policy`` may then change at any time.
        ranks: which act for their own environments.

    Attributes:
        noise: of the actions.
        rows: which rows of a flattened batch are environments, see `mtrl_vec.envs.SimulatorPool`; None if all are.
            The others get actions of zero, and no random numbers are drawn for them.
    """

    def __init__(
        self,
        policy: SharedPolicy,
        config: TrainConfig,
        timer: Timer,
        *,
        mean: bool = False,
        lagging: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation", "task_one_hot", "task_idx"], ["action"]
        self.device = next(policy.parameters()).device
        on_gpu = self.device.type == "cuda"
        copies = [copy.deepcopy(policy).requires_grad_(False) for _ in range(2)] if lagging else [policy] * 2
        # In a tuple, out of sight of nn.Module: collectors look for the parameters of what they are given.
        self._policies = policy, copies[0], copies[1]
        self._precision, self._timer, self._mean = config.runtime.precision, timer, mean
        self._ranks = ranks
        self.rows: Tensor | None = None
        generator = torch.Generator(self.device)
        if on_gpu:  # another seed than the minibatches': two generators with the same one would draw the same
            generator.manual_seed(config.seed + 2**32)
        else:  # continue torch's own stream, which was seeded for the initial weights
            generator.set_state(torch.get_rng_state())
        self.noise = ActionNoise(policy.num_tasks, policy.action_size, generator, ranks)
        self._distribution = self._policies[1].distribution
        if on_gpu and config.runtime.compile == "on":
            self._distribution = torch.compile(self._policies[1].distribution, fullgraph=True)
        self._graphs = on_gpu and config.runtime.cuda_graphs
        self._stream = torch.cuda.Stream(priority=-1) if on_gpu else None
        self._in_place: dict[int, tuple[_InPlace, Callable[[], Tensor]]] = {}  # by the number of rows

    @property
    def previous(self) -> SharedPolicy:
        """What acted before the last `catch_up`; the same as acts now if it is not lagging."""
        return self._policies[2]

    def catch_up(self) -> None:
        """Act with the policy as it is now."""
        source, acting, previous = self._policies
        if acting is not source:
            previous.load_state_dict(acting.state_dict())
            acting.load_state_dict(source.state_dict())

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Everything that acting continues from, except the policy; not a copy. On the first rank of all ranks."""
        source, acting, previous = self._policies
        behind = None if acting is source else previous.state_dict()
        noise = self.noise.state_dict()
        if noise["last"] is not None:
            noise |= self._ranks.rows_at_first({"last": noise["last"]})
        return {"previous": behind, "noise": noise}

    def load_state_dict(self, state: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """Continue from a `state_dict`, with the policy as it is now."""
        source, acting, previous = self._policies
        if acting is not source:
            acting.load_state_dict(source.state_dict())
            previous.load_state_dict(state["previous"])
        last = state["noise"]["last"]
        own = last if last is None else last[self._ranks.part(len(last))]
        self.noise.load_state_dict({**state["noise"], "last": own})

    def in_turn(self, sizes: Sequence[int]) -> list[Callable[[TensorDictBase], TensorDictBase]]:
        """One policy for each group of environments, of these sizes; in every step, call each once and in order.

        Together they act as this one does for all environments at once.
        """
        ends = list(itertools.accumulate(sizes))
        groups = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

        def noise(group: int, task_idx: Tensor) -> Tensor:
            if group == 0:
                self.noise.draw(ends[-1])
            return self.noise.of(groups[group], task_idx)

        return [functools.partial(self._act_for, functools.partial(noise, group)) for group in range(len(groups))]

    @torch.no_grad()
    def _act_for(self, noise: Noise, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.update(self._outputs(noise, *(tensordict[key] for key in self.in_keys)))

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add to a TensorDict of any batch size, on the CPU."""
        if self.rows is None:
            return self._act_for(self.noise, tensordict)
        flat = [tensordict[key].flatten(0, tensordict.ndim - 1).index_select(0, self.rows) for key in self.in_keys]
        for name, values in self._outputs(self.noise, *flat).items():
            everywhere = values.new_zeros(tensordict.numel(), *values.shape[1:]).index_copy(0, self.rows, values)
            tensordict[name] = everywhere.view(*tensordict.shape, *values.shape[1:])
        return tensordict

    def _outputs(self, noise: Noise, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> dict[str, Tensor]:
        """What is added, for rows of any batch shape."""
        if self.device.type == "cuda":
            return {"action": self._act_on_gpu(noise, observation, task_one_hot)}
        with self._timer("infer"):
            action, loc, scale = self._act(noise, observation, task_one_hot, task_idx)
            log_prob = IndependentNormal(loc, scale, validate_args=False).log_prob(action)
        return {"action": action, "action_log_prob": log_prob}

    def _act(
        self, noise: Noise, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with autocast(self.device, self._precision):
            loc, scale = self._distribution(observation, task_one_hot, task_idx)
        if self._mean:
            return loc, loc, scale
        return loc + scale * noise(task_idx), loc, scale  # torch.normal would wait for the device

    def _act_on_gpu(self, noise: Noise, observation: Tensor, task_one_hot: Tensor) -> Tensor:
        shape = observation.shape[:-1]
        if shape.numel() not in self._in_place:
            widths = observation.shape[-1], task_one_hot.shape[-1], self._policies[0].action_size
            new = _InPlace(shape.numel(), *widths, self.device)
            network = functools.partial(self._network, new)
            self._in_place[shape.numel()] = new, GraphedCall(network, warmup=2) if self._graphs else network
        buffers, on_buffers = self._in_place[shape.numel()]
        with on_stream(self._stream):
            with self._timer("transfer"):
                torch.cat([observation, task_one_hot], dim=-1, out=buffers.sent.view(*shape, -1))
                buffers.inputs.copy_(buffers.sent, non_blocking=True)
            with self._timer("infer"):
                if not self._mean:  # outside of the graph: its generator and its last values belong to checkpoints
                    buffers.noise.copy_(noise(buffers.task_idx()))
                action = on_buffers()
            with self._timer("transfer"):
                buffers.received.copy_(action, non_blocking=True)
                torch.cuda.current_stream().synchronize()
        return buffers.received.view(*shape, -1).clone()

    def _network(self, buffers: _InPlace) -> Tensor:
        """Actions [N, A] for what is in the buffers."""
        with autocast(self.device, self._precision):
            loc, scale = self._distribution(*buffers.split(), buffers.task_idx())
        return loc if self._mean else loc + scale * buffers.noise


class _InPlace:
    """Memory that stays in its place, for ``N`` rows: pinned for what travels, on the GPU for what is computed with."""

    def __init__(
        self, rows: int, observation_size: int, num_tasks: int, action_size: int, device: torch.device
    ) -> None:
        self._size = observation_size
        self.sent = torch.empty(rows, observation_size + num_tasks, pin_memory=True)
        self.received = torch.empty(rows, action_size, pin_memory=True)
        self.inputs = torch.empty(rows, observation_size + num_tasks, device=device)
        self.noise = torch.empty(rows, action_size, device=device)

    def split(self) -> tuple[Tensor, Tensor]:
        """Observations and one-hots."""
        return self.inputs[:, : self._size], self.inputs[:, self._size :]

    def task_idx(self) -> Tensor:
        """[N]"""
        return self.inputs[:, self._size :].argmax(-1)
