"""What the README shows is run, and its tables are compared with the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtrl_vec.metrics import COLUMNS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
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
    table = README.split("The columns of `metrics.csv`")[1].split("\n\n")[1]
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", table, re.MULTILINE)
    assert dict(rows) == COLUMNS and len(rows) == len(COLUMNS)


def test_links_and_files_exist() -> None:
    targets = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(targets) > 3
    modules = re.findall(r"`(mtrl_vec/\w+\.py)`", README)
    for target in [*targets, *modules]:
        assert (ROOT / target).exists(), target
    described = {Path(module).name for module in modules}
    assert described == {path.name for path in (ROOT / "mtrl_vec").glob("*.py")} - {"__init__.py", "__main__.py"}
