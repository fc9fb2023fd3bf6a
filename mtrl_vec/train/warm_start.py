"""Starting a run from a trained policy: what is known carries over by the names of the tasks.

Shapes: ``K`` tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError, first_line
from mtrl_vec.learn.reward_scale import RewardScale
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.checkpoint import CRITIC, checkpoints, find_checkpoint, load_checkpoint, saved_config
from mtrl_vec.policy.migrations import STATISTICS
from mtrl_vec.tasks.layout import layout_of
from mtrl_vec.tasks.suite import UnknownTask, resolve_tasks

_SAME = (
    *("torso", "head", "relative_features", "normalize_observation", "direct_features"),
    *("bounded_mean", "popart"),
)
"""Fields of `PolicyConfig` that have to be equal for weights to fit."""
_SAME_LEARNER = ("normalize_reward", "success_bonus", "gamma")
"""Fields of `LearnerConfig` that decide in which units the critic predicts."""
_FIRST_LAYER = "torso.module.layers.0.weight"
_OWN = f"{STATISTICS}own_norm."
_REWARD_SCALE = ("mean", "var", "count")


def policy_content(policy: SharedPolicy, reward_scale: RewardScale) -> dict[str, Any]:
    """What a policy file holds besides its header: all that a run which starts from it needs.

    The networks, observation statistics and standard deviations among them; and the scale of the rewards, in which the
    critic predicts.
    """
    scale = reward_scale.state_dict()
    return {"policy": policy.state_dict(), "reward_scale": {name: scale[name] for name in _REWARD_SCALE}}


def policy_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint is for others: policy and header, without the state of its run, and without its folders."""
    config = {**content["config"], "init_from": None}
    config["runtime"] = {**config["runtime"], "run_dir": None}
    kept = {name: content[name] for name in ("versions", "frames", "policy")}
    scale = _reward_scale(content)
    if scale is not None:
        kept["reward_scale"] = {name: scale[name] for name in _REWARD_SCALE}
    return {"config": config, **kept}


def _reward_scale(content: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """Of a policy file, or of the state of a whole run."""
    return content.get("reward_scale", content.get("learner", {}).get("reward_scale"))


def _load(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a path means; of a run whose best policy has no reward scale, its latest state."""
    file = find_checkpoint(path)
    content = load_checkpoint(file)
    if path.is_dir() and _reward_scale(content) is None and (whole := checkpoints(path)):
        return whole[0], load_checkpoint(whole[0])
    return file, content


def head_of(path: Path) -> int:
    """The width of the heads of the policy to start from, see `WarmStart`. Raises InputError: no policy there."""
    source = _settings_of(*_load(path))
    return source.policy.head_width(source.num_tasks)


def _settings_of(file: Path, content: Mapping[str, Any]) -> TrainConfig:
    try:
        return saved_config(content, file)
    except UnknownTask:
        raise
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{file} does not fit this version of mtrl_vec ({first_line(error)})") from error


class WarmStart:
    """A trained policy to start from.

    Args:
        config: of the run that starts, with ``init_from``.

    Attributes:
        known: tasks of the run that the policy was trained on.

    Raises:
        InputError: no policy there, or one that does not fit the run's settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        assert config.init_from is not None
        file, content = _load(config.init_from)
        source = _settings_of(file, content)
        pairs = [(name, getattr(source.policy, name), getattr(config.policy, name)) for name in _SAME]
        pairs += [(name, getattr(source.learner, name), getattr(config.learner, name)) for name in _SAME_LEARNER]
        for name, theirs, ours in pairs:
            if theirs != ours:
                raise InputError(f"init_from is {file}: its {name} is {theirs}, this run's is {ours}: make them equal")
        layouts = [layout_of(resolve_tasks(tasks)) for tasks in (source.tasks, config.tasks)]
        if config.policy.relative_features and layouts[0] != layouts[1]:
            raise InputError(
                f"init_from is {file}: of its tasks and this run's, only one list has tasks with a second object "
                "(hammer, stick-push, stick-pull), whose policies see more of an observation: add or drop such tasks"
            )
        scale = _reward_scale(content)
        if "policy" not in content or scale is None:
            raise InputError(
                f"init_from is {file}: it holds no policy with the scale of its rewards; give a checkpoint-*.pt of its "
                "run, or a policy that this version has written"
            )
        self._policy: Mapping[str, Tensor] = content["policy"]
        self._scale: Mapping[str, Tensor] = scale
        self._file, self._frames, self._num_tasks = file, content["frames"], config.num_tasks
        self.known = tuple(task for task in config.tasks if task in source.tasks)
        self._to = torch.tensor([config.tasks.index(task) for task in self.known], dtype=torch.long)
        self._from = torch.tensor([source.tasks.index(task) for task in self.known], dtype=torch.long)
        self._fresh = tuple(task for task in config.tasks if task not in self.known)
        self._has_critic = any(name.startswith(CRITIC) for name in self._policy)

    def copy_policy(self, policy: SharedPolicy) -> None:
        """Copy the torso, and the heads of known tasks; other tasks keep their initial heads. In place.

        So does the critic where the policy has none.
        """
        state = policy.state_dict()  # its tensors are those of the policy
        for name, tensor in state.items():
            if name.startswith(CRITIC) and not self._has_critic:
                continue
            source = self._policy[name]
            if name == _FIRST_LAYER:  # [H, F + K]: features, then the task one-hot
                features = tensor.shape[1] - self._num_tasks
                tensor[:, :features] = source[:, :features].to(tensor)
                tensor[:, features + self._to] = source[:, features + self._from].to(tensor)
            elif name.startswith("torso.") and not name.startswith(_OWN):
                tensor.copy_(source)
            elif tensor.dim():  # stacked by task; the limit of the standard deviations is the run's own
                tensor[self._to] = source[self._from].to(tensor)
        policy.project_std()

    def copy_reward_scale(self, reward_scale: RewardScale) -> None:
        """Copy the scale of the rewards of known tasks. In place."""
        state = reward_scale.state_dict()
        for name in _REWARD_SCALE:
            state[name][self._to] = self._scale[name][self._from].to(state[name])

    def __str__(self) -> str:
        fresh = f"; fresh heads for {', '.join(self._fresh)}" if self._fresh else ""
        fresh += "" if self._has_critic else "; it has no critic, so that one is fresh"
        heads = f"heads of {', '.join(self.known)}" if self.known else "its torso"
        return f"started from {self._file} ({self._frames:,} frames), {heads}{fresh}"
