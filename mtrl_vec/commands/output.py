"""What commands share: files that they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mtrl_vec.errors import InputError
from mtrl_vec.files import write_atomically


def check_json(path: Path | None) -> None:
    """Raises InputError where ``--json`` names a file that cannot be there."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError(f"--json {path}: give a file in an existing folder")


def write_json(path: Path | None, content: object) -> None:
    """Write what ``--json`` asks for, if anything. Raises InputError."""
    if path is None:
        return
    try:
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another --json") from error


def say_written(files: Sequence[Path], quiet: bool) -> None:
    """Name the files that were written."""
    if not quiet:
        print("\n".join(f"wrote {file}" for file in files))
