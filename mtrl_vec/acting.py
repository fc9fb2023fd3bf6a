"""The policy where it acts: between the simulators, which are on the CPU, and the device that it lives on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import IndependentNormal

from mtrl_vec.config import TrainConfig
from mtrl_vec.device import autocast
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.sim import ACTION_SIZE
from mtrl_vec.timing import Timer


class ActingPolicy(TensorDictModuleBase):
    """Adds an ``action`` to what the simulators observe, and on the CPU its ``action_log_prob``.

    To a GPU observations and one-hots travel in one copy, and the actions come back in another, through pinned memory;
    all that is in between is queued, so that the one wait per step is for the actions. Log-probabilities are worked out
    with the update there, see `mtrl_vec.ppo`.

    Args:
        policy: on its device.
        config: of the run, for precision, compilation and the seed of the actions on a GPU.
        timer: counts the sections ``infer`` and ``transfer``.
        mean: take the mean actions instead of random ones. (TorchRL's exploration type is one for the whole process:
            a loss that is computed in another thread meanwhile would change it.)
        lagging: act with a copy, which `catch_up` brings up to date: ``policy`` may then change at any time.
    """

    def __init__(
        self, policy: SharedPolicy, config: TrainConfig, timer: Timer, *, mean: bool = False, lagging: bool = False
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation", "task_one_hot", "task_idx"], ["action"]
        self.device = next(policy.parameters()).device
        on_gpu = self.device.type == "cuda"
        copies = [copy.deepcopy(policy).requires_grad_(False) for _ in range(2)] if lagging else [policy] * 2
        # In a tuple, out of sight of nn.Module: collectors look for the parameters of what they are given.
        self._policies = policy, copies[0], copies[1]
        self._precision, self._timer, self._mean = config.precision, timer, mean
        # Another seed than the minibatches': two generators with the same one would draw the same.
        self._generator = torch.Generator(self.device).manual_seed(config.seed + 2**32) if on_gpu else None
        self._distribution = self._policies[1].distribution
        if on_gpu and config.compiles(self.device.type):
            self._distribution = torch.compile(self._policies[1].distribution, fullgraph=True)
        self._pinned: tuple[Tensor, Tensor] | None = None

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

    def state(self) -> dict[str, Any]:
        """All that acting goes on from, but the policy; not a copy."""
        source, acting, previous = self._policies
        return {
            "previous": None if acting is source else previous.state_dict(),
            "generator": None if self._generator is None else self._generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, with the policy as it is now."""
        source, acting, previous = self._policies
        if acting is not source:
            acting.load_state_dict(source.state_dict())
            previous.load_state_dict(state["previous"])
        if self._generator is not None and state["generator"] is not None:
            self._generator.set_state(state["generator"])

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add to a TensorDict of any batch size, on the CPU."""
        observation, one_hot, task_idx = (tensordict[key] for key in self.in_keys)
        if self.device.type == "cuda":
            tensordict["action"] = self._act_on_gpu(observation, one_hot)
            return tensordict
        with self._timer("infer"):
            action, loc, scale = self._act(observation, one_hot, task_idx)
            tensordict["action"] = action
            tensordict["action_log_prob"] = IndependentNormal(loc, scale, validate_args=False).log_prob(action)
        return tensordict

    def _act(self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with autocast(self.device, self._precision):
            loc, scale = self._distribution(observation, task_one_hot, task_idx)
        if self._mean:
            return loc, loc, scale
        # torch.normal would wait for the device, to check the scale.
        return loc + scale * torch.randn(loc.shape, device=self.device, generator=self._generator), loc, scale

    def _act_on_gpu(self, observation: Tensor, task_one_hot: Tensor) -> Tensor:
        shape, size = observation.shape[:-1], observation.shape[-1]
        rows, width = observation.numel() // size, size + task_one_hot.shape[-1]
        if self._pinned is None or len(self._pinned[0]) != rows:
            self._pinned = (
                torch.empty(rows, width, pin_memory=True),
                torch.empty(rows, ACTION_SIZE, pin_memory=True),
            )
        inputs, outputs = self._pinned
        with self._timer("transfer"):
            torch.cat([observation, task_one_hot], dim=-1, out=inputs.view(*shape, width))
            on_device = inputs.to(self.device, non_blocking=True)
        with self._timer("infer"):
            one_hot = on_device[:, size:]
            action, _, _ = self._act(on_device[:, :size], one_hot, one_hot.argmax(-1))
        with self._timer("transfer"):
            outputs.copy_(action, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return outputs.view(*shape, ACTION_SIZE).clone()
