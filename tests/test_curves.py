"""The tables of curves: writing and reading them, and what the studies keep in theirs."""

from __future__ import annotations

import csv
import math
import re
from fnmatch import fnmatch

import curves
import learning
import numpy as np
import pytest
import task_sampling
from PIL import Image

from mtrl_vec.errors import InputError

STUDIES = [learning.FOLDER, learning.folder_of("MT10"), task_sampling.FOLDER]


def metrics_of(*frames: float) -> curves.Metrics:
    rows = len(frames)
    columns = {"frames": frames, "time/sps": [1234.5678] * rows, "eval/push-v3/success_rate": [math.nan] * rows}
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}


def test_what_is_added_is_read_again_and_a_second_time_replaced(tmp_path) -> None:
    assert curves.read(tmp_path) == {}
    curves.add(tmp_path, "seed1", metrics_of(9_008_641, 9_020_160))
    curves.add(tmp_path, "screening/a,b", metrics_of(1, 2, 3) | {"train/lr": np.array([1e-7, -0.5, math.inf])})
    curves.add(tmp_path, "seed2", metrics_of(7) | {"time/collect": np.array([1.0])})
    cells = curves.read(tmp_path)
    assert list(cells) == ["seed1", "screening/a,b", "seed2"]
    assert [list(metrics) for metrics in cells.values()] == [
        [*metrics_of()],
        [*metrics_of(), "train/lr"],
        [*metrics_of()],
    ]
    assert cells["seed1"]["frames"].tolist() == [9_008_641, 9_020_160]
    assert cells["seed1"]["time/sps"].tolist() == [1234.57] * 2
    assert np.isnan(cells["seed1"]["eval/push-v3/success_rate"]).all()
    assert cells["screening/a,b"]["train/lr"].tolist() == [1e-7, -0.5, math.inf]

    written = (tmp_path / curves.NAME).read_bytes()
    curves.write(tmp_path, cells)
    assert (tmp_path / curves.NAME).read_bytes() == written
    curves.add(tmp_path, "seed1", metrics_of(5))
    replaced = curves.read(tmp_path)
    assert list(replaced) == list(cells) and replaced["seed1"]["frames"].tolist() == [5]
    assert [path.name for path in tmp_path.iterdir()] == [curves.NAME]


def test_what_cannot_be_written_leaves_the_table_alone(tmp_path) -> None:
    curves.add(tmp_path, "seed1", metrics_of(1))
    for metrics in (metrics_of(), metrics_of(1) | {"iteration": np.arange(2.0)}, {}):
        with pytest.raises(ValueError):
            curves.add(tmp_path, "seed1", metrics)
    assert curves.read(tmp_path)["seed1"]["frames"].tolist() == [1]


def test_what_cannot_be_read(tmp_path) -> None:
    curves.add(tmp_path, "seed1", metrics_of(1, 2))
    with pytest.raises(InputError, match="has no cell seed2"):
        curves.read_cells(tmp_path, ["seed1", "seed2"])
    path = tmp_path / curves.NAME
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"cell,frames\nseed1,1\n", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot read"):
            curves.read(tmp_path)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_cell_of_a_study_has_its_curves(folder) -> None:
    cells = curves.read(folder)
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert cells[row["cell"]]["frames"][-1] == float(row["frames"]), row["cell"]
    for name, metrics in cells.items():
        assert (np.diff(metrics["frames"]) > 0).all(), name


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_what_the_text_of_a_study_names_exists(folder) -> None:
    text = (folder / "README.md").read_text()
    targets = re.findall(r"\]\(((?!http)[^)#]+)", text) + re.findall(r"`([\w.-]+\.(?:csv|csv\.xz|png|svg))`", text)
    assert [target for target in targets if target != "metrics.csv" and not (folder / target).exists()] == []
    assert set(re.findall(r"`(screening/[^`]+)`", text)) <= curves.read(folder).keys()


@pytest.mark.parametrize(
    ("folder", "picture", "chosen"),
    [
        (learning.FOLDER, "learning.png", learning.in_picture),
        (learning.folder_of("MT10"), "learning.png", learning.in_picture),
        (task_sampling.FOLDER, "finals-5M.png", lambda cells: [c for c in cells if fnmatch(c, "*-5M-seed*")]),
    ],
)
def test_the_picture_of_a_study_is_redrawn(folder, picture, chosen, tmp_path) -> None:
    cells = chosen([cell for cell in curves.read(folder) if "/" not in cell])
    curves.draw(folder, cells, tmp_path / picture)
    assert [path.name for path in tmp_path.iterdir()] == [picture]
    with Image.open(tmp_path / picture) as drawn, Image.open(folder / picture) as kept:
        assert drawn.format == "PNG" and drawn.mode == "P"
        difference = np.asarray(drawn.convert("L"), dtype=int) - np.asarray(kept.convert("L"), dtype=int)
        assert np.abs(difference).mean() < 2
