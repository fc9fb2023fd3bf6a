"""Checkpoints of older versions of the file format, brought to today's.

Version 1: flat settings, and standard deviations that were limited when they were read instead of when they were
learned. Its policies load; its runs cannot be resumed, since how they learn has changed.

Version 2: states of simulators of one model. Its policies load as they are; its runs cannot be resumed.

Up to version 3 mean actions were unbounded, and noise was white; up to version 4 tasks explored from their first step;
up to version 5 heads did not see the observation itself. Policies load with these settings;
runs cannot be resumed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mtrl_vec.config.sampling import SAMPLING_CONFIGS
from mtrl_vec.config.train import SECTIONS

VERSION = 6
"""Of the files that are written today."""

_RENAMED = {"relative_inputs": "relative_features", "balance": "gradient_method"}
STATISTICS = "torso.module.features."
"""Begins the names of the statistics of observations in a policy's state."""
_V1_POLICY_KEYS = ("frames", "versions", "evaluation")


def migrate(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of any known version as today's.

    Raises:
        ValueError: a version that this package does not know.
        KeyError, TypeError, AttributeError: content that does not suit its version.
    """
    version = content["version"]
    if version == 1:
        content = _from_version_1(content)
    if version in (1, 2, 3):
        content = {**content, "config": _before_4(content["config"])}
    if version in (1, 2, 3, 4):
        content = {**content, "config": _before_5(content["config"])}
    if version in (1, 2, 3, 4, 5):
        return {**_before_6(content), "version": VERSION, "migrated_from": version}
    if version != VERSION:
        raise ValueError(f"it has version {version} of the format, and this package reads up to {VERSION}")
    return content


def _before_4(config: dict[str, Any]) -> dict[str, Any]:
    """Settings in groups, with what version 4 added as it was before."""
    policy, learner = dict(config["policy"]), dict(config["learner"])
    policy["bounded_mean"] = False
    learner |= {"noise_correlation": 0.0, "hold_std": False}
    return {**config, "policy": policy, "learner": learner}


def _before_5(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "learner": {**config["learner"], "exploration_delay": 0}}


def _before_6(content: dict[str, Any]) -> dict[str, Any]:
    """With the statistics of the observations as those of a single group."""
    config = content["config"]
    config = {**config, "policy": {**config["policy"], "direct_features": False}}
    if "policy" not in content:
        return {**content, "config": config}
    norm, state = f"{STATISTICS}observation_norm.", content["policy"]
    one_group = {f"{norm}{name}": state[f"{norm}{name}"].view(1, -1) for name in ("mean", "var", "count")}
    return {**content, "config": config, "policy": {**state, **one_group}}


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    kept = {name: content[name] for name in _V1_POLICY_KEYS if name in content}
    if "policy" in content:
        kept["policy"] = dict(content["policy"])
        prefix = "actor_heads.module.0.module."
        if f"{prefix}std_limit" in kept["policy"]:
            limit = kept["policy"][f"{prefix}std_limit"]
            kept["policy"][f"{prefix}log_std"] = kept["policy"][f"{prefix}log_std"].clamp(max=limit.log())
    if "ppo" in content:
        kept["reward_scale"] = content["ppo"]["reward_scale"]
    return {"config": _nested(content["config"]), **kept}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Settings of version 1 in today's groups."""
    values = {_RENAMED.get(name, name): value for name, value in flat.items()}
    automatic = {"compile": ("auto", "off"), "precision": ("auto", "fp32")}
    for name, (old, new) in automatic.items():
        if values.get(name) == old:
            values[name] = new
    method = values.get("schedule", "uniform")
    floor = values.get("share_floor", 0.1)
    values |= {"min_task_prob": floor, "min_task_weight": floor}
    fields = [field.name for field in dataclasses.fields(SAMPLING_CONFIGS[method])]
    groups = {
        name: {field.name: values[field.name] for field in dataclasses.fields(section) if field.name in values}
        for name, section in SECTIONS.items()
    }
    return {
        "seed": values["seed"],
        **groups,
        "sampling": {"method": method, **{name: values[name] for name in fields if name in values}},
    }
