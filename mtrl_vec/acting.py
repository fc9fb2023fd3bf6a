"""The policy where it acts: between the simulators, which are on the CPU, and the device that it lives on."""

from __future__ import annotations

import copy

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType, exploration_type

from mtrl_vec.config import TrainConfig
from mtrl_vec.device import autocast
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.sim import ACTION_SIZE
from mtrl_vec.timing import Timer


class ActingPolicy(TensorDictModuleBase):
    """Adds an ``action`` to what the simulators observe: random, or the mean, by torchrl's exploration type.

    On the CPU that is the actor, which also adds ``action_log_prob``. On a GPU observations and one-hots travel there
    in one copy and the actions back in another, through pinned memory; all that is in between is queued, so that there
    is one wait per step, for the actions. Log-probabilities are worked out with the update there, see `mtrl_vec.ppo`.

    Args:
        policy: on its device.
        config: of the run, for precision and compilation.
        timer: counts the sections ``infer`` and ``transfer``.
        lagging: act with a copy, which `catch_up` brings up to date: ``policy`` may then change at any time.
    """

    def __init__(self, policy: SharedPolicy, config: TrainConfig, timer: Timer, *, lagging: bool = False) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation", "task_one_hot", "task_idx"], ["action"]
        self.device = next(policy.parameters()).device
        # Out of sight of nn.Module: collectors inspect, move and copy the parameters of what they are given.
        self._policies = policy, copy.deepcopy(policy).requires_grad_(False) if lagging else policy
        self._precision, self._timer = config.precision, timer
        self._actor = self.behaviour.actor
        self._distribution = self.behaviour.distribution
        if self.device.type == "cuda" and config.compiles(self.device.type):
            self._distribution = torch.compile(self.behaviour.distribution, fullgraph=True)
        self._pinned: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def behaviour(self) -> SharedPolicy:
        """The policy that acts."""
        return self._policies[1]

    def catch_up(self) -> None:
        """Act with the policy as it is now."""
        source, target = self._policies
        if target is not source:
            target.load_state_dict(source.state_dict())

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the actions, on the CPU, to a TensorDict of any batch size, on the CPU."""
        if self.device.type == "cpu":
            with self._timer("infer"), autocast(self.device, self._precision):
                return self._actor(tensordict)
        tensordict["action"] = self._act_on_gpu(tensordict["observation"], tensordict["task_one_hot"])
        return tensordict

    def _act_on_gpu(self, observation: torch.Tensor, task_one_hot: torch.Tensor) -> torch.Tensor:
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
        with self._timer("infer"), autocast(self.device, self._precision):
            one_hot = on_device[:, size:]
            loc, scale = self._distribution(on_device[:, :size], one_hot, one_hot.argmax(-1))
            if exploration_type() != ExplorationType.DETERMINISTIC:
                loc = torch.normal(loc, scale)
        with self._timer("transfer"):
            outputs.copy_(loc, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return outputs.view(*shape, ACTION_SIZE).clone()
