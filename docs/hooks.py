"""What MkDocs does to the pages: help texts of the commands, pages from outside this folder, and links to them.

In the repository links are relative paths, which also lead out of ``docs/``. Studies and their pictures become pages of
the site; a link to anything else that is not on the site becomes plain text.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
STUDIES = ("learning", "learning_mt10", "learning_mt50", "results", "task_sampling")
DOCS = "docs/"
_LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_HELP = re.compile(r"<!-- help: (\w+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages and pictures from outside `docs/`, under their paths in the repository."""
    for path in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        files.append(File.generated(config, path.name, content=path.read_text()))
    for study in STUDIES:
        folder = ROOT / "benchmarks" / study
        for path in (folder / "README.md", *folder.glob("*.png"), *folder.glob("*.gif")):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in help texts, and lead links to where things are on the site."""
    markdown = _HELP.sub(lambda match: f"```text\n{help_of(match[1])}\n```", markdown)
    here = page.file.src_uri
    outside = here.startswith("benchmarks/") or here in ("CONTRIBUTING.md", "CHANGELOG.md")
    folder = posixpath.dirname(here if outside else DOCS + here)
    depth = posixpath.dirname(here)

    def lead(match: re.Match[str]) -> str:
        picture, text, path, anchor = match.groups()
        named = posixpath.normpath(posixpath.join(folder, path))
        if not (ROOT / named).exists():
            raise PluginError(f"{here} links to {path}, which does not exist")
        uri = site_uri(named, files)
        if uri is None:
            return text
        return f"{picture}[{text}]({posixpath.relpath(uri, depth or '.')}{anchor or ''})"

    parts = _FENCED.split(markdown)  # code is at odd places
    return "".join(part if i % 2 else _LINK.sub(lead, part) for i, part in enumerate(parts))


def site_uri(path: str, files: Files) -> str | None:
    """Where something in the repository is among the files of the site; None if it is not."""
    candidates = [path.removeprefix(DOCS), f"{path}/README.md"] + (["index.md"] if path == "README.md" else [])
    return next((uri for uri in candidates if files.get_file_from_path(uri)), None)


def help_of(command: str) -> str:
    """What ``--help`` of a command says, on a terminal of 100 columns."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    arguments = [sys.executable, "-m", "mtrl_vec", command, "--help"]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise PluginError(f"{' '.join(arguments)} failed: {result.stderr}")
    return re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).strip()
