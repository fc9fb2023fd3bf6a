"""What the README shows is run, and its tables are compared with the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtrl_vec.train.metrics import COLUMNS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippets_run(index, tmp_path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPETS[index])
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    if "picked and placed" in SNIPPETS[index]:
        assert re.search(r"picked and placed in \d+ steps", result.stdout)
    if "policy.frames" in SNIPPETS[index]:
        assert "46080" in result.stdout  # whole iterations of 11,520


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 4


def test_the_table_of_columns_is_the_codes() -> None:
    table = (ROOT / "docs" / "runs.md").read_text().split("## The columns of `metrics.csv`")[1]
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", table, re.MULTILINE)
    assert dict(rows) == COLUMNS and len(rows) == len(COLUMNS)


def test_links_exist() -> None:
    targets = [(page, target) for page in PAGES for target in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text())]
    assert len(targets) > 10
    for page, target in targets:
        assert (page.parent / target).exists(), (page.name, target)


def test_every_module_is_described_where_it_is() -> None:
    """Wings as ``mtrl_vec/<wing>/`` in a row of their own, with their modules in this row or those below it."""
    package = ROOT / "mtrl_vec"
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (?:`mtrl_vec/(\w+)/`)? ?\| (.+) \| .*\|$", text, re.MULTILINE)
    described: dict[str, set[str]] = {}
    wing = ""
    for name, content in rows:
        wing = name or wing
        described.setdefault(wing, set()).update(re.findall(r"`(\w+\.py)`", content))
    wings = {init.parent for init in package.glob("*/__init__.py")}
    assert described.keys() == {folder.name for folder in wings}
    for folder in wings:
        assert described[folder.name] == {path.name for path in folder.glob("*.py")} - {"__init__.py"}, folder.name
    modules = {f"mtrl_vec/{path.name}" for path in package.glob("*.py")}
    assert modules - {"mtrl_vec/__init__.py", "mtrl_vec/__main__.py"} <= set(re.findall(r"`(mtrl_vec/[^`]*)`", text))


def test_every_path_that_is_named_exists() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:mtrl_vec|benchmarks|tests)/[^`* ]*)`", page.read_text()):
            assert (ROOT / path).exists(), (page.name, path)
