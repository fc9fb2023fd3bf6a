"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mtrl_vec.files import temporary_path, write_atomically


def test_new_content_replaces_the_old(tmp_path) -> None:
    path = tmp_path / "file.bin"
    for content in (b"", b"first", b"a second one that is longer", b"third\x00\r\n"):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


def test_until_it_is_complete_a_reader_sees_the_old_content(tmp_path, monkeypatch) -> None:
    """Also one that has opened the file before; and the new content is on the disk before it gets its name."""
    path, fsync, seen = tmp_path / "file", os.fsync, []
    path.write_bytes(b"old")

    def look(descriptor: int) -> None:
        seen.append((path.read_bytes(), temporary_path(path).exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    with path.open("rb") as reader:
        write_atomically(path, b"new content")
        assert reader.read() == b"old"
    assert seen == [(b"old", True), (b"new content", False)]  # of the file, then of its folder


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False], ids=["an old one", "none yet"])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, error, there) -> None:
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")] * there


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for content in (b"new", bytes(1_000_000)):  # in Python's buffer until the end, or not
        temporary_path(path).symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device"):
            write_atomically(path, content)
        assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"
    write_atomically(path, b"new")  # there is room again
    assert path.read_bytes() == b"new"


def test_a_name_that_cannot_be_taken_leaves_nothing(tmp_path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", b"new")
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_behind_is_written_over(tmp_path) -> None:
    path = tmp_path / "file"
    assert temporary_path(path) == tmp_path / "file.tmp"
    temporary_path(path).write_bytes(b"torn, and longer than what comes")
    write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"new"


def test_a_file_system_that_cannot_flush_folders_is_good_enough(tmp_path, monkeypatch) -> None:
    fsync, path = os.fsync, tmp_path / "file"

    def fsync_of_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_of_files)
    write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"new"
