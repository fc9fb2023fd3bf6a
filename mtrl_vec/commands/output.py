"""What commands share: files that they write, and what they say of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mtrl_vec.errors import InputError
from mtrl_vec.files import write_atomically


def check_file(flag: str, path: Path) -> None:
    """Raises InputError where a flag names a file that cannot be there."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{flag} {path}: give a file in an existing folder")


def check_json(path: Path | None) -> None:
    """Raises InputError where ``--json`` names a file that cannot be there."""
    if path is not None:
        check_file("--json", path)


def check_least(**values: tuple[int, int]) -> None:
    """Raises InputError where a number is below its least value. Args: pairs of both, by name."""
    for name, (number, least) in values.items():
        if number < least:
            raise InputError(f"{name} is {number}: it must be at least {least}")


def write(flag: str, path: Path, content: bytes) -> None:
    """Write the file that a flag names. Raises InputError."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another {flag}") from error


def write_json(path: Path | None, content: object) -> None:
    """Write what ``--json`` asks for, if anything. Raises InputError."""
    if path is not None:
        write("--json", path, (json.dumps(content, indent=2) + "\n").encode())


def own_command() -> str:
    """How the command ``mtrl-vec`` of this installation can be called from the current folder."""
    command = Path(sys.executable).with_name("mtrl-vec")
    if not command.exists():
        return "python -m mtrl_vec"
    on_path = shutil.which("mtrl-vec")
    if on_path and Path(on_path) == command:
        return "mtrl-vec"
    return str(command.relative_to(Path.cwd())) if command.is_relative_to(Path.cwd()) else str(command)


def say(line: str, quiet: bool) -> None:
    """Print a line unless told not to."""
    if not quiet:
        print(line)


def say_written(files: Sequence[Path], quiet: bool) -> None:
    """Name the files that were written."""
    say("\n".join(f"wrote {file}" for file in files), quiet)
