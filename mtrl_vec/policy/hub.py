"""Policies on the Hugging Face Hub, through its own client. ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` apply."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtrl_vec.errors import InputError, first_line

PREFIX = "hf:"
"""Begins the name of a policy on the hub: ``hf:owner/name``, or ``hf:owner/name@revision``."""
POLICY_FILE = "policy.pt"
"""Name of a policy's checkpoint in its repository."""


def is_on_hub(path: Path) -> bool:
    """Whether a path is the name of a policy on the hub."""
    return path.as_posix().startswith(PREFIX)


def download(path: Path) -> Path:
    """The checkpoint of a policy on the hub, in the client's cache; it is fetched where it is not there yet.

    Args:
        path: ``hf:owner/name`` or ``hf:owner/name@revision``.

    Raises:
        InputError: no such policy, no connection, or huggingface_hub is not installed.
    """
    repository, _, revision = path.as_posix().removeprefix(PREFIX).partition("@")
    client = _client()
    with _explained(f"cannot load {path.as_posix()}", f"give {PREFIX}owner/name of a repository with {POLICY_FILE}"):
        return Path(client.hf_hub_download(repository, POLICY_FILE, revision=revision or None))


def upload(
    repository: str, files: Mapping[str, bytes], *, outdated: Collection[str] = (), private: bool = False
) -> str:
    """Put files into a repository for models in one commit, and make the repository if there is none.

    Args:
        repository: ``owner/name``.
        files: contents by their names.
        outdated: files to remove where the repository has them.
        private: make a new repository private; otherwise the hub's default applies.

    Returns:
        The address of the commit.

    Raises:
        InputError: the hub does not take them, no connection, or huggingface_hub is not installed.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"repository is {repository!r}: give owner/name")
    client = _client()
    with _explained(f"cannot push to {repository}", "log in with 'hf auth login', and give owner/name of your own"):
        api = client.HfApi()
        api.create_repo(repository, private=True if private else None, exist_ok=True)
        changes = [client.CommitOperationAdd(name, content) for name, content in files.items()]
        changes += [client.CommitOperationDelete(name) for name in outdated if api.file_exists(repository, name)]
        commit = api.create_commit(repository, changes, commit_message=f"Upload {', '.join(files)}")
        return str(commit.commit_url)


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("the hub needs huggingface_hub: pip install 'mtrl_vec[hub]'") from error
    return huggingface_hub


@contextlib.contextmanager
def _explained(problem: str, fix: str) -> Iterator[None]:
    """Raises InputError where the client fails: with errors of its own, of the connection, or of the name."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{problem} ({first_line(error)}): {fix}") from error
