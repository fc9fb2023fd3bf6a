"""The numbers behind learning curves: reading runs, and which of them belong together."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.config import RuntimeConfig
from mtrl_vec.config.sampling import SAMPLING_CONFIGS
from mtrl_vec.errors import InputError

Column = NDArray[np.float64]

CLOCKS = {"frames": (1e6, "million frames"), "time/elapsed": (60.0, "minutes")}
"""The horizontal axes: a column of the metrics, its values per unit, and the name of the unit."""
NOT_LEARNING = {field.name for field in dataclasses.fields(RuntimeConfig)} - {"precision", "total_frames"} | {"seed"}
"""Settings in which the runs of one group may differ."""
OF_ONE_METHOD = {field.name for config in SAMPLING_CONFIGS.values() for field in dataclasses.fields(config)}
"""Settings that a method of task sampling reads: to runs with another method they mean nothing."""
MAX_SETTINGS = 3
"""Settings that a label can name. A group that differs in more of them goes by its runs' names."""
MAX_POINTS = 1000
"""Points of a mean."""
MAX_VALUES = 6
"""Values of a setting that a label spells out. Of a longer list, it gives their number."""
SOLVED = 0.98
"""The success rate from which on a task counts as solved."""

Curve = tuple[Column, Column]
"""x and y."""


def learning_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a ``config.json`` that change learning, without their groups."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= value if isinstance(value, dict) else {name: value}
    if "method" in flat:
        flat["task_sampling"] = flat.pop("method")
    return {name: value for name, value in flat.items() if name not in NOT_LEARNING}


@dataclass(frozen=True)
class Run:
    """A run's numbers. ``settings`` are those that change learning; None for a metrics file by itself."""

    path: Path
    settings: dict[str, Any] | None
    metrics: dict[str, Column]

    @property
    def name(self) -> str:
        """What its folder or file is called."""
        return self.path.name if self.settings is not None else self.path.stem

    @property
    def tasks(self) -> list[str]:
        """The tasks that the metrics tell of."""
        found = [re.fullmatch(r"train/(.+)/success_rate", column) for column in self.metrics]
        return [match[1] for match in found if match and f"train/{match[1]}/return" in self.metrics]

    def curve(self, clock: str, column: str) -> Curve | None:
        """A column over a clock where it has numbers; None where it has none at all."""
        return self._known(clock, self.metrics[column]) if column in self.metrics else None

    def mean_success(self, clock: str, stage: str) -> Curve | None:
        """The mean success rate of the tasks that have one by then, in the ``train`` or ``eval`` columns."""
        rates = self._rates(stage)
        count = np.isfinite(rates).sum(axis=0)
        total = np.where(np.isfinite(rates), rates, 0.0).sum(axis=0)
        return self._known(clock, np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0))

    def solved_tasks(self, clock: str, stage: str) -> Curve | None:
        """How many tasks have a success rate of `SOLVED` or more, once any has one."""
        rates = self._rates(stage)
        return self._known(clock, np.where(np.isfinite(rates).any(axis=0), (rates >= SOLVED).sum(axis=0), np.nan))

    def _rates(self, stage: str) -> NDArray[np.float64]:
        """Success rates [tasks, rows]."""
        columns = [f"{stage}/{task}/success_rate" for task in self.tasks]
        rows = len(self.metrics["frames"])
        return np.array([self.metrics.get(column, np.full(rows, np.nan)) for column in columns])

    def _known(self, clock: str, y: Column) -> Curve | None:
        x = self.metrics[clock]
        known = np.isfinite(x) & np.isfinite(y)
        return (x[known], y[known]) if known.any() else None


def read_metrics(path: Path) -> dict[str, Column]:
    """The columns [rows] of a ``metrics.csv`` by name. A last line that is still being written is left out.

    Raises:
        InputError: it cannot be read, is not a metrics file, has no rows yet, or is damaged.
    """
    try:
        lines = path.read_text(errors="replace").split("\n")[:-1]  # what follows the last line break is not a whole row
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give the folder of a run, or its metrics") from error
    header, *rows = csv.reader(lines) if lines else [[]]
    if missing := [clock for clock in CLOCKS if lines and clock not in header]:
        raise InputError(f"{path} is not a metrics file, it has no column {missing[0]}: give the metrics.csv of a run")
    if not rows:
        raise InputError(f"{path} has no rows yet: wait for the first iteration of the run")
    values = np.empty((len(rows), len(header)))
    for i, row in enumerate(rows):
        try:
            values[i] = np.array(row, dtype=np.float64).reshape(len(header))
        except ValueError as error:  # not a number, or not one for each column
            raise InputError(f"line {i + 2} of {path} is not {len(header)} numbers: remove the line") from error
    return dict(zip(header, values.T, strict=True))


def load_run(path: Path) -> Run:
    """The run in a folder, or in a metrics file by itself.

    Raises:
        InputError: there is none, or it cannot be read (see `read_metrics`).
    """
    if not path.exists():
        raise InputError(f"no run at {path}: give the folder of a run, or a metrics file")
    settings, file = None, path
    if path.is_dir():
        file = path / "metrics.csv"
        if not file.exists():
            raise InputError(f"no metrics.csv in {path}: give the folder of a run that has begun, or a metrics file")
        try:
            settings = learning_settings(json.loads((path / "config.json").read_text()))
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"no readable config.json in {path}: give {file} instead, to plot it by itself") from error
    run = Run(path.resolve(), settings, read_metrics(file))
    if not run.tasks:
        raise InputError(f"{file} is not a metrics file, it has no train/<task>/success_rate and return: give another")
    return run


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but `NOT_LEARNING`, or metrics files ``<name>-seed<N>.csv`` of a folder, by label.

    A label names the settings that most groups do not share; where there are none, those that any does not. If these
    are none either, or more than `MAX_SETTINGS`, it is what the runs are called.
    """
    groups: list[list[Run]] = []
    for run in runs:
        mates = next((group for group in groups if _differ_in_seed(run, group[0])), None)
        if mates is None:
            groups.append([run])
        else:
            mates.append(run)
    configs = [group[0].settings for group in groups if group[0].settings is not None]
    labels = []
    for group in groups:
        settings = {} if group[0].settings is None else _differences(group[0].settings, configs)
        named = 0 < len(settings) <= MAX_SETTINGS
        pairs = [f"{name}={_value(value)}" for name, value in settings.items()]
        labels.append(", ".join(pairs) if named else _from_to([run.name for run in group]))
    return {
        label if labels.count(label) == 1 else _from_to([str(run.path) for run in group]): group
        for label, group in zip(labels, groups, strict=True)
    }


def _differ_in_seed(a: Run, b: Run) -> bool:
    if a.settings is not None or b.settings is not None:
        return a.settings == b.settings
    kinds = [re.fullmatch(r"(.*?-?)seed\d+", run.name) for run in (a, b)]
    return a.path.parent == b.path.parent and None not in kinds and len({kind[1] for kind in kinds if kind}) == 1


def _differences(settings: dict[str, Any], configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that most configs do not share; where there are none, those that any does not."""
    mates = [config for config in configs if config.get("task_sampling") == settings.get("task_sampling")]
    among = {name: mates if name in OF_ONE_METHOD else configs for config in configs for name in config}
    own = {  # versions have different ones
        name: settings.get(name, "unknown")
        for name, others in among.items()
        if any(name in config for config in others)
    }
    shared = {name: sum(config.get(name, "unknown") == own[name] for config in among[name]) for name in own}
    rare = {name: value for name, value in own.items() if 2 * shared[name] <= len(among[name])}
    return rare or {name: value for name, value in own.items() if shared[name] < len(among[name])}


def _value(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return " ".join(map(str, value)) if len(value) <= MAX_VALUES else f"({len(value)} of them)"


def _from_to(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def mean_and_range(curves: Sequence[Curve]) -> tuple[Column, Column, Column, Column]:
    """Of several curves (x, y): where they all have points, all of their x, and there mean, lowest and highest y."""
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(start <= grid) & (grid <= end)]
    grid = grid[np.linspace(0, max(len(grid) - 1, 0), min(len(grid), MAX_POINTS)).astype(int)]
    values = np.array([np.interp(grid, x, y) for x, y in curves])
    return grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0)
