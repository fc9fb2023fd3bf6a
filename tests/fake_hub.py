"""A hub of our own on this machine: as much of the Hugging Face Hub's HTTP interface as its real client needs here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as uploads of small files and downloads need."""

    files: dict[str, dict[str, bytes]]
    asked: list[dict]
    """To make repositories."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer(401, {"error": "Invalid credentials"})
        if parts == ["api", "repos", "create"]:
            name = json.loads(body)["name"]
            owner = json.loads(body).get("organization") or "me"
            self.files.setdefault(f"{owner}/{name}", {})
            self.asked.append(json.loads(body))
            return self.answer(200, {"url": f"{self.here}/{owner}/{name}", "name": name})
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        repository, what = "/".join(parts[2:4]), parts[4]
        if what == "preupload":
            named = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in named]
            return self.answer(200, {"files": modes})
        assert what == "commit", self.path
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[repository][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del self.files[repository][entry["value"]["path"]]
        url = f"{self.here}/{repository}/commit/{COMMIT}"
        self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "commitMessage": ""})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        repository, file = "/".join(parts[:2]), parts[-1]
        if parts[2:4] not in (["resolve", "main"], ["resolve", "v1"]) or repository not in self.files:
            return self.answer(404, {"error": "Repository not found"}, "RepoNotFound")
        if file not in self.files[repository]:
            return self.answer(404, {"error": "Entry not found"}, "EntryNotFound")
        content = self.files[repository][file]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    @property
    def here(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer(self, status: int, content: object, code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def local_hub() -> Iterator[tuple[type[Hub], str]]:
    """A hub in a thread: its files, and its address."""
    handler = type("OwnHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def client_settings(address: str, cache: Path, token: str = "hf_test") -> dict[str, str]:
    """Environment variables that point the hub's client at it, which reads them when it is imported."""
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
