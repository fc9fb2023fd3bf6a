"""`Replay`: recorded actions of Meta-World's scripted experts, for benchmarks.

A policy that works touches things, which makes the physics up to five times slower than under random actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from metaworld.policies import ENV_POLICY_MAP

from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.task import Task


class Replay:
    """Episodes of the experts with a little noise, one for each slot, which repeat.

    Args:
        tasks: in turn over the slots.
        num_slots, first_slot: which slots.

    Attributes:
        vectors: [n] of [V], what each episode starts from.
        actions: [length, n, 4] float32.
        success: fraction of the episodes that succeed.
    """

    length = 150
    """Steps of an episode: nearly all experts succeed in fewer."""

    def __init__(self, tasks: Sequence[Task], num_slots: int, first_slot: int = 0) -> None:
        task_idx = (first_slot + np.arange(num_slots)) % len(tasks)
        rngs = [np.random.default_rng((1, first_slot + slot)) for slot in range(num_slots)]
        self.vectors = [tasks[k].draw.sample(rng) for k, rng in zip(task_idx, rngs, strict=True)]
        self.actions = np.empty((self.length, num_slots, 4), dtype=np.float32)
        sim = SimBatch(tasks, task_idx)
        experts = [ENV_POLICY_MAP[tasks[k].name]() for k in task_idx]
        observation, succeeded = sim.reset(vectors=self.vectors), np.zeros(num_slots, dtype=bool)
        for action in self.actions:
            for slot, (expert, rng) in enumerate(zip(experts, rngs, strict=True)):
                action[slot] = np.clip(expert.get_action(observation[slot]), -1, 1) + rng.normal(0, 0.05, 4)
            step = sim.step(action)
            observation, succeeded = step.observation, succeeded | step.success
        self.success = float(succeeded.mean())
