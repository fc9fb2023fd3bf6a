"""Policies on the Hugging Face Hub, through its own client. ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` apply."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
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


def upload(repository: str, files: Mapping[str, bytes], *, private: bool = False) -> str:
    """Put files into a repository for models in one commit, and make the repository if there is none.

    Args:
        repository: ``owner/name``.
        files: contents by their names.
        private: of a new repository: whether only its owner sees it.

    Returns:
        The address of the commit.

    Raises:
        InputError: the hub does not take them, no connection, or huggingface_hub is not installed.
    """
    client = _client()
    with _explained(f"cannot push to {repository}", "log in with 'hf auth login', and give owner/name of your own"):
        api = client.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        added = [client.CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repository, added, commit_message=f"Upload {', '.join(files)}")
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
