"""The notebook, run cell by cell in a kernel of its own; with fewer frames."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "start.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    first = notebook.cells[1]
    assert "FRAMES = 2_000_000" in first.source
    first.source = first.source.replace("2_000_000", "46_080")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    run = tmp_path / "runs" / "notebook"
    assert (run / "best.pt").exists() or list(run.glob("checkpoint-*.pt"))
    assert (run / "film.gif").stat().st_size > 10_000
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "steps" in said


def test_it_is_kept_without_outputs() -> None:
    import json

    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
