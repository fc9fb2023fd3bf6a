"""The command ``record``: demonstrations by a policy, for imitation learning.

Simulated by `mtrl_vec.sim.SimBatch`, and drawn afterwards from the states that were kept.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.commands.arguments import RecordCommand
from mtrl_vec.commands.dataset import Dataset, Episode, require_libraries
from mtrl_vec.commands.output import check_least, say
from mtrl_vec.commands.stage import Stage
from mtrl_vec.errors import InputError, tell
from mtrl_vec.policy import TrainedPolicy, load_policy
from mtrl_vec.policy.trained import choose_tasks
from mtrl_vec.tasks.suite import resolve_tasks
from mtrl_vec.tasks.task import Array, Task

if TYPE_CHECKING:
    from mtrl_vec.sim.world import World

STEPS_AFTER_SUCCESS = 10
"""How much longer than to its first success an episode is recorded."""
BATCH = 50
"""Episodes that are simulated at once."""
ATTEMPTS = 3
"""Episodes that are tried for each one that is wanted, where only successes count."""


class View(NamedTuple):
    """What there is to draw of a step, see `mtrl_vec.sim.SimBatch.view`."""

    world: World
    state: Array
    fixture: Array
    goal: Array


def record(command: RecordCommand) -> None:
    """Record demonstrations of a policy. Raises InputError."""
    check_least(episodes=(command.episodes, 1), seed=(command.seed, 0))
    check_least(max_episode_steps=(command.max_episode_steps, 1))
    if command.image_size and (command.image_size < 64 or command.image_size % 2):
        raise InputError(f"image_size is {command.image_size}: it must be even and at least 64, or 0 for no pictures")
    require_libraries()
    policy = load_policy(command.checkpoint)
    tasks = resolve_tasks(choose_tasks(command.tasks, policy.tasks))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_new_folder(command.out))
        stage = stack.enter_context(Stage(command.image_size, command.image_size)) if command.image_size else None
        dataset = Dataset(folder, command.image_size)
        for task in tasks:
            _record_task(dataset, policy, task, stage, command)
        if not dataset.num_episodes:
            raise InputError("no episode succeeded, so there is nothing to record: see --keep-failures")
        dataset.close()
    found = f"{dataset.num_episodes:,} episodes, {dataset.num_frames:,} frames"
    say(f"wrote {command.out}: {found}, in LeRobot format v3.0", command.quiet)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``out`` at the end of the block, unless that raises.

    Raises:
        InputError: ``out`` exists, or something cannot be written.
    """
    made = False
    try:
        out.mkdir()  # so that no other process takes the name meanwhile
        made = True
        with tempfile.TemporaryDirectory(prefix=".record-", dir=out.parent) as beside:
            part = Path(beside, out.name)
            yield part
            part.replace(out)
        made = False
    except FileExistsError as error:
        raise InputError(f"{out} exists already: give another --out") from error
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror}): make room, or give another --out") from error
    finally:
        if made:
            out.rmdir()


def _record_task(
    dataset: Dataset, policy: TrainedPolicy, task: Task, stage: Stage | None, command: RecordCommand
) -> None:
    wanted, tried = command.episodes, 0
    kept: list[tuple[Episode, list[View]]] = []
    while len(kept) < wanted and tried < (1 if command.keep_failures else ATTEMPTS) * wanted:
        count = min(wanted - len(kept), BATCH)
        played = play(policy, task, count, seed=command.seed, first=tried, max_episode_steps=command.max_episode_steps)
        kept += [(e, views) for e, views in played if len(e.action) and (command.keep_failures or e.success.any())]
        tried += count
    if len(kept) < wanted:
        tell(f"warning: {len(kept)} of {tried} episodes of {task.name} succeeded")
    if kept:
        pictures = [] if stage is None else (_draw(stage, task.name, views) for _, views in kept)
        dataset.add_task(task.name, [episode for episode, _ in kept], pictures)
        say(f"{task.name}: {len(kept)} episodes", command.quiet)


def play(
    policy: TrainedPolicy, task: Task, count: int, *, seed: int, first: int, max_episode_steps: int
) -> list[tuple[Episode, list[View]]]:
    """Episodes of a policy's mean actions, to a little after their first success, and what there is to draw of them.

    One whose physics becomes unstable ends before that step.

    Args:
        policy: which acts.
        task: one that it knows.
        count: how many.
        seed, first: decide goals and where objects start: episode ``i`` is number ``first + i`` of the seed.
        max_episode_steps: an episode without success ends there, in environment steps.
    """
    from mtrl_vec.sim import SimBatch

    # Fresh starts: from a pool of them the same episodes would come again.
    limit = max_episode_steps
    sim = SimBatch([task], [0] * count, seed=seed, first_slot=first, max_episode_steps=limit, fresh_starts=True)
    observation = sim.reset()
    ends = np.full(count, max_episode_steps)
    succeeded = np.zeros(count, dtype=bool)
    rows: list[tuple[NDArray, ...]] = []
    views: list[list[View]] = [[] for _ in range(count)]
    while len(rows) < ends.max():
        for slot in np.flatnonzero(len(rows) < ends).tolist():
            world, *arrays = sim.view(slot)
            views[slot].append(View(world, *(array.copy() for array in arrays)))
        action = policy(observation, task.name)
        step = sim.step(action)
        rows.append((observation.astype(np.float32), action, step.reward.astype(np.float32), step.success))
        observation = step.observation
        ends = np.where(step.success & ~succeeded, np.minimum(ends, len(rows) + STEPS_AFTER_SUCCESS), ends)
        ends = np.where(step.unstable, np.minimum(ends, len(rows) - 1), ends)
        succeeded |= step.success
    columns = [np.stack(column) for column in zip(*rows, strict=True)]
    episodes = [Episode(*(column[:end, slot] for column in columns)) for slot, end in enumerate(ends.tolist())]
    return [(episode, seen[: len(episode.action)]) for episode, seen in zip(episodes, views, strict=True)]


def _draw(stage: Stage, task: str, views: Sequence[View]) -> Iterator[NDArray[np.uint8]]:
    return (stage.picture(task, *view) for view in views)
