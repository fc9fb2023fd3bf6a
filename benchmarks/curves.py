"""The learning curves of a study: the metrics of all its cells in one compressed table, and pictures drawn from it.

``curves.csv.xz`` has one row per cell and iteration: the name of the cell, then its metrics. A field is empty if the
cell has no such column. Columns that no table or picture needs are omitted, such as the seconds of each section.
"""

from __future__ import annotations

import csv
import io
import lzma
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.commands.plot import plot_runs
from mtrl_vec.errors import InputError
from mtrl_vec.files import write_atomically

NAME = "curves.csv.xz"
CLOCKS = ("iteration", "frames", "time/elapsed", "time/sps", "time/evaluate")
PREFIXES = ("train/", "eval/")
"""Columns that are kept: `CLOCKS`, and those with one of these prefixes."""
COLORS, MAX_BYTES = (128, 64, 32), 160_000
"""Colours of a picture's palette: the most of these with which the file stays below this size, else the fewest."""

Metrics = dict[str, NDArray[np.float64]]
"""Columns [rows] of a cell by name."""


def read(folder: Path) -> dict[str, Metrics]:
    """The metrics of all cells of a study by name, in the order in which they were added. Empty if there is no table.

    Raises:
        InputError: the table cannot be read.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    lines: dict[str, list[list[str]]] = {}
    try:
        with lzma.open(path, "rt", newline="") as file:
            (_, *columns), *rows = csv.reader(file)
        for cell, *fields in rows:
            lines.setdefault(cell, []).append(fields)
        return {cell: _columns(columns, fields) for cell, fields in lines.items()}
    except (OSError, EOFError, lzma.LZMAError, csv.Error, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}): restore it, for example with git checkout") from error


def read_cells(folder: Path, cells: Sequence[str]) -> dict[str, Metrics]:
    """The metrics of some cells of a study, in the order of ``cells``.

    Raises:
        InputError: the table cannot be read, or lacks one of them.
    """
    table = read(folder)
    if missing := [cell for cell in cells if cell not in table]:
        raise InputError(
            f"{folder / NAME} has no cell {missing[0]}: remove its row from results.csv to measure it again"
        )
    return {cell: table[cell] for cell in cells}


def _columns(names: Sequence[str], lines: Sequence[Sequence[str]]) -> Metrics:
    table = zip(names, zip(*lines, strict=True), strict=True)
    return {name: np.array(fields, dtype=np.float64) for name, fields in table if any(fields)}


def write(folder: Path, cells: Mapping[str, Metrics]) -> None:
    """Write the table of a study, in place of an earlier one. The same metrics in the same order give the same bytes.

    Whole numbers are exact, others have six significant digits, as in ``metrics.csv``.

    Raises:
        ValueError: the columns of a cell differ in length, or are empty.
    """
    columns = list(dict.fromkeys(column for metrics in cells.values() for column in metrics if is_kept(column)))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", *columns])
    for cell, metrics in cells.items():
        (length,) = {len(metrics[column]) for column in columns if column in metrics}
        if not length:
            raise ValueError(f"{cell} has no rows")
        fields = [_texts(metrics[column]) if column in metrics else [""] * length for column in columns]
        writer.writerows([cell, *row] for row in zip(*fields, strict=True))
    write_atomically(folder / NAME, lzma.compress(text.getvalue().encode(), preset=9 | lzma.PRESET_EXTREME))


def is_kept(column: str) -> bool:
    """Whether the table keeps this column of the metrics."""
    return column in CLOCKS or column.startswith(PREFIXES)


def _texts(values: Iterable[float]) -> list[str]:
    return [str(int(value)) if float(value).is_integer() else f"{value:.6g}" for value in values]


def add(folder: Path, cell: str, metrics: Metrics) -> None:
    """Add the metrics of a cell to the table of a study. They replace those that the cell already has.

    Raises:
        InputError: the table cannot be read.
        ValueError: the columns differ in length, or are empty.
    """
    write(folder, read(folder) | {cell: metrics})


def draw(folder: Path, cells: Sequence[str], out: Path) -> None:
    """Draw success and return of some cells of a study (see `plot_runs`) as a PNG with a palette.

    Cells ``<name>-seed<N>`` of the same name are a group.

    Args:
        folder: of the study.
        cells: what to draw, at least one.
        out: file of the picture, which is replaced atomically.

    Raises:
        InputError: the table cannot be read or lacks one of the cells, or matplotlib is not installed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        files = []
        for name, metrics in read_cells(folder, cells).items():
            files.append(Path(temporary, f"{name}.csv"))
            files[-1].parent.mkdir(exist_ok=True)
            rows = zip(*map(_texts, metrics.values()), strict=True)
            files[-1].write_text("".join(f"{','.join(row)}\n" for row in [metrics.keys(), *rows]))
        plot_runs(files, Path(temporary, "picture"))
        picture = Path(temporary, "picture.png").read_bytes()
    write_atomically(out, _compressed(picture))


def _compressed(png: bytes) -> bytes:
    """The same picture, opaque and with a palette."""
    from PIL import Image  # comes with matplotlib

    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colors in COLORS:
        picture = io.BytesIO()
        palette = image.quantize(colors, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        palette.save(picture, "png", optimize=True)
        if picture.tell() <= MAX_BYTES:
            break
    return picture.getvalue()
