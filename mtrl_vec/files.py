"""Writing files so that a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``<path>.tmp`` beside ``path``, flush it to disk, then rename it.

    For one writer at a time: another one would write to the same temporary file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full. The old content is still there, and
            no temporary file is left.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some file systems cannot
            _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def temporary_path(path: Path) -> Path:
    """Where `write_atomically` writes before it renames: what a killed process may leave behind."""
    return path.with_name(f"{path.name}.tmp")


def _sync_folder(folder: Path) -> None:
    """Get the new name onto the disk before the caller deletes older files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
