"""`SharedPolicy`: actor and critic of all tasks as TensorDict modules.

Shapes: ``K`` tasks, ``D`` observation size, ``H`` width of the torso's output, ``A`` action size.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensordict.nn import InteractionType, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor

from mtrl_vec.config import PolicyConfig
from mtrl_vec.policy.modules import ActorHeads, CriticHeads, Torso
from mtrl_vec.tasks.layout import ACTION_SIZE, METAWORLD, ObservationLayout, layout_of
from mtrl_vec.tasks.suite import resolve_tasks


class SharedPolicy(nn.Module):
    """Actor and critic of all tasks: one torso, and heads per task for either, as TensorDict modules.

    `torso` turns ``observation`` [..., D] and ``task_one_hot`` [..., K] into ``hidden`` [..., H]; from that and
    ``task_idx`` [...], `actor_heads` adds ``loc``, ``scale``, ``action`` and ``action_log_prob``, and `critic_heads`
    ``state_value``. Either reads the same ``hidden``, which an update therefore computes once.

    Actions are normal around ``loc``, unbounded; the simulator clips them.

    Args:
        config: widths, and what is normalised.
        num_tasks: ``K``.
        layout: of the observations.
        action_size: ``A``.
    """

    def __init__(
        self,
        config: PolicyConfig,
        num_tasks: int,
        layout: ObservationLayout = METAWORLD,
        action_size: int = ACTION_SIZE,
    ) -> None:
        super().__init__()
        self.num_tasks, self.action_size, self.layout = num_tasks, action_size, layout
        torso = Torso(config, num_tasks, layout)
        actor = ActorHeads(config, num_tasks, torso.out_features, action_size)
        critic = CriticHeads(config, num_tasks, torso.out_features)
        self.torso = TensorDictModule(torso, in_keys=["observation", "task_one_hot"], out_keys=["hidden"])
        self.actor_heads = ProbabilisticActor(
            TensorDictModule(actor, in_keys=["hidden", "task_idx"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=IndependentNormal,
            distribution_kwargs={"validate_args": False},  # validation waits for the device
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        )
        self.critic_heads = TensorDictModule(critic, in_keys=["hidden", "task_idx"], out_keys=["state_value"])

    @classmethod
    def for_tasks(cls, config: PolicyConfig, tasks: Sequence[str]) -> SharedPolicy:
        """An untrained policy for these tasks, see `mtrl_vec.tasks.layout.layout_of`."""
        return cls(config, len(tasks), layout_of(resolve_tasks(tasks)))

    @property
    def actor(self) -> ProbabilisticTensorDictSequential:
        """Torso and actor heads in one, for acting: an action sampled or the mean, by torchrl's exploration type."""
        modules = self.torso, *self.actor_heads
        return ProbabilisticTensorDictSequential(*modules).select_out_keys("loc", "scale", "action", "action_log_prob")

    def distribution(self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D], [..., K], [...] -> mean and standard deviation of the actions, [..., A] each."""
        return self.actor_heads[0].module(self.torso.module(observation, task_one_hot), task_idx)

    def value(self, observation: Tensor, task_one_hot: Tensor, task_idx: Tensor) -> Tensor:
        """[..., D], [..., K], [...] -> expected discounted return of the scaled reward, [..., 1]."""
        return self.critic_heads.module(self.torso.module(observation, task_one_hot), task_idx)

    def action_std(self) -> Tensor:
        """Standard deviation of the actions per task and dimension, [K, A]."""
        return self.actor_heads[0].module.std().detach()

    def limit_std(self, limit: float) -> None:
        """Keep the standard deviations at or below a value from now on, see `project_std`."""
        self.actor_heads[0].module.std_limit.fill_(limit)
        self.project_std()

    def hold_std(self, fractions: Tensor) -> None:
        """Keep the standard deviations of each task at or above this fraction of the limit, [K], from now on."""
        self.actor_heads[0].module.std_floor.copy_(fractions)
        self.project_std()

    def project_std(self) -> None:
        """Clamp the standard deviations to their bounds: after every step of an optimiser."""
        self.actor_heads[0].module.project_std()
