"""What the README shows is run, and the tables of the documentation are compared with the code."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import metaworld
import pytest

import mtrl_vec
from mtrl_vec.commands.cli import main
from mtrl_vec.commands.parsing import parse
from mtrl_vec.policy.checkpoint import checkpoints, load_checkpoint
from mtrl_vec.train.metrics import COLUMNS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
EVERYTHING = "\n".join(DOCUMENTS.values())
SNIPPETS = [
    snippet
    for page in (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("python", "gymnasium", "sharing")))
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


def _trains(snippet: str) -> bool:
    return "Trainer(" in snippet


@pytest.mark.parametrize(
    "index", [pytest.param(i, marks=pytest.mark.slow if _trains(s) else ()) for i, s in enumerate(SNIPPETS)]
)
def test_snippets_run(index, tmp_path) -> None:
    snippet = SNIPPETS[index]
    if "optuna" in snippet:  # two short trials
        assert "total_frames=200_000" in snippet and "n_trials=10" in snippet
        snippet = snippet.replace("200_000", "46_080").replace("n_trials=10", "n_trials=2")
    if "policy.onnx" in snippet:
        assert main(["export", "pretrained", "--onnx", str(tmp_path / "policy.onnx")]) == 0
    (tmp_path / "snippet.py").write_text(snippet)
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    if "picked and placed" in SNIPPETS[index]:
        assert re.search(r"picked and placed in \d+ steps", result.stdout)
    if "episodes succeeded" in SNIPPETS[index]:
        counts = re.findall(r"-v3: (\d+) of 10 episodes succeeded", result.stdout)
        assert len(counts) == 10 and sum(map(int, counts)) >= 95
    if "policy.frames" in SNIPPETS[index]:
        assert "46080" in result.stdout  # whole iterations of 11,520


@pytest.mark.slow
def test_a_task_of_your_own_trains(tmp_path) -> None:
    """The programs in docs/own_tasks.md: one that trains, and one that measures, films and resumes what it leaves."""
    train, later = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_tasks.md").read_text(), re.DOTALL)

    def run(name: str, program: str) -> str:
        (tmp_path / name).write_text(program)
        command, settings = [sys.executable, name], os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=400)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    assert "150_000" in later
    for name, program in (("my_task.py", train), ("later.py", later.replace("150_000", "80_000"))):
        success = re.search(r"success: (\d+)%", run(name, program))
        assert success and int(success[1]) >= 80
    assert (tmp_path / "touch-ball.mp4").stat().st_size > 1000
    assert load_checkpoint(checkpoints(tmp_path / "runs" / "touch-ball")[0])["frames"] >= 80_000


def test_there_are_snippets_and_the_readme_is_short() -> None:
    assert len(SNIPPETS) == 8
    assert len(README.split()) <= 900


def test_the_documentation_lists_all_tasks() -> None:
    section = (ROOT / "docs" / "runs.md").read_text().split("## Tasks\n")[1].split("\n## ")[0]
    listed = section.split("`-v3`:")[1].split("[Tasks of your own]")[0]
    assert sorted(f"{name}-v3" for name in re.findall(r"`([\w-]+)`", listed)) == sorted(metaworld.ALL_V3_ENVIRONMENTS)


LIBRARIES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "libraries.md").read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
def test_programs_with_other_libraries(index, tmp_path) -> None:
    """Those in docs/libraries.md, as they are. The first two learn to reach."""
    assert len(LIBRARIES) == 3
    (tmp_path / "program.py").write_text(LIBRARIES[index])
    result = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    success = re.search(r"success at the end of the last 100 episodes: (\d+)%", result.stdout)
    assert success and int(success[1]) >= (60, 80, 0)[index], result.stdout  # untrained policies are below 5


def documented_commands() -> list[list[str]]:
    """The arguments of every command of ours that a page shows."""
    found = []
    for text in DOCUMENTS.values():
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for block in [block for language, block in fences if language != "python"]:
            for line in block.replace("\\\n", " ").splitlines():
                if not re.match(r"make |mtrl-vec |\.venv/|python -m |torchrun ", line):
                    continue
                words = shlex.split(line, comments=True)
                if words[:2] in (["make", "train"], ["make", "eval"], ["make", "profile"]):
                    variables = dict(word.split("=", 1) for word in words[2:])
                    given = shlex.split(variables.get("CHECKPOINT", "runs/new" if words[1] == "eval" else ""))
                    found.append([words[1], *given, *shlex.split(variables.get("ARGS", ""))])
                elif "mtrl_vec" in words:
                    found.append(words[words.index("mtrl_vec") + 1 :])
                elif words and words[0].endswith("mtrl-vec"):
                    found.append(words[1:])
    return found


def test_every_documented_command_can_be_typed() -> None:
    commands = documented_commands()
    assert len(commands) >= 25
    assert {command[0] for command in commands} >= {
        "train",
        "eval",
        "plot",
        "video",
        "export",
        "push",
        "record",
        "doctor",
    }
    for command in commands:
        if "--help" not in command:
            parse(command)


def test_the_table_of_columns_is_the_codes() -> None:
    (text,) = (text for text in DOCUMENTS.values() if "he columns of `metrics.csv`" in text)
    table = text.split("he columns of `metrics.csv`")[1]
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", table.split("\n## ")[0], re.MULTILINE)
    assert dict(rows) == COLUMNS and len(rows) == len(COLUMNS)


def test_the_version_and_the_licence_are_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {mtrl_vec.__version__}\n" in citation and "\nlicense: MIT\n" in citation
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")
    assert 'license = "MIT"' in (ROOT / "pyproject.toml").read_text()
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_that_can_be_installed_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    text = (ROOT / "constraints.txt").read_text()
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    assert len(names) > 25 and names - pinned == {"mtrl-vec", "wandb"}


def test_links_exist() -> None:
    for document, text in DOCUMENTS.items():
        targets = re.findall(r"\]\(((?!http)[^)#]+)[)#]", text)
        assert len(targets) > 3 or document.parent.name == "docs"
        for target in targets:
            assert (document.parent / target).exists(), (document.name, target)


def anchors(page: str) -> set[str]:
    """Of a page's headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_sections_that_links_point_to_exist() -> None:
    checked = 0
    for document, text in DOCUMENTS.items():
        for target, anchor in re.findall(r"\]\(((?!http)[^)#]*)#([^)]+)\)", text):
            page = document.parent / target if target else document
            page = page / "README.md" if page.is_dir() else page
            if page.name != "api.md":  # whose sections `make docs` makes, and checks
                assert anchor in anchors(page.read_text()), (document.name, target, anchor)
                checked += 1
    assert checked >= 10


def test_every_path_that_is_named_exists_and_every_wing_and_root_module_is_named() -> None:
    """Modules as ``mtrl_vec/<module>.py`` or ``mtrl_vec/<wing>/<module>.py``, wings as ``mtrl_vec/<wing>/``."""
    package = ROOT / "mtrl_vec"
    named = set(re.findall(r"`(mtrl_vec/[^`]*)`", EVERYTHING))
    named = {path for path in named if not path.endswith("-v0")}  # Gymnasium's names
    for path in named:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    wings = {f"mtrl_vec/{init.parent.name}/" for init in package.glob("*/__init__.py")}
    modules = {f"mtrl_vec/{path.name}" for path in package.glob("*.py")} - {
        "mtrl_vec/__init__.py",
        "mtrl_vec/__main__.py",
    }
    assert len(wings) >= 8 and len(modules) >= 4
    assert wings | modules <= named


def test_the_table_of_folders_names_every_module_of_a_wing() -> None:
    """In the rows of its folder; those without one continue the row before."""
    described: dict[str, set[str]] = {}
    wing = None
    for folder, content in re.findall(r"^\| (`mtrl_vec/\w+/`|) ?\| (.+) \|", EVERYTHING, re.MULTILINE):
        wing = folder.strip("`") or wing
        described.setdefault(wing, set()).update(re.findall(r"`(\w+\.py)`", content))
    there = {
        f"mtrl_vec/{init.parent.name}/": {path.name for path in init.parent.glob("*.py")} - {"__init__.py"}
        for init in (ROOT / "mtrl_vec").glob("*/__init__.py")
    }
    assert described == there
