"""Policies to the Hugging Face Hub and back: its real client, against a hub of our own on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml

from mtrl_vec.commands.cli import main
from mtrl_vec.policy import load_policy
from mtrl_vec.policy.checkpoint import load_checkpoint

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


@pytest.fixture(scope="module")
def hub():
    """A hub in a thread: its files, and its address."""
    handler = type("OwnHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def call(hub, tmp_path):
    """Runs Python with the hub's client pointed at it: it reads these variables when it is imported."""

    def run(*arguments: str, token: str = "hf_test", endpoint: str = hub[1]) -> subprocess.CompletedProcess[str]:
        about = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": token, "OMP_NUM_THREADS": "1"}
        about |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | about,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )

    return run


RESULTS = {"checkpoint": "/home/me/best.pt", "seeds": [100, 200]}


def results(policy) -> dict[str, object]:
    digest = hashlib.sha256(policy.file.read_bytes()).hexdigest()
    scores: dict[str, object] = {"sha256": digest, "frames": policy.frames, "eval/mean_success_rate": 0.75}
    scores |= {"eval/mean_success_low": 0.7, "eval/mean_success_high": 0.8}
    for task, rate in zip(policy.tasks, (1.0, 0.5, 0.75), strict=True):
        at = f"eval/{task}/success"
        scores |= {f"{at}_rate": rate, f"{at}_low": rate - 0.1, f"{at}_high": rate + 0.01, f"eval/{task}/return": 1.0}
    return RESULTS | scores


def test_there_and_back(hub, call, tmp_path) -> None:
    policy = load_policy("pretrained")
    (tmp_path / "results.json").write_text(json.dumps([results(policy)]))
    pushed = call("-m", "mtrl_vec", "push", "pretrained", "me/three", "--results", "results.json")
    assert pushed.returncode == 0, pushed.stderr
    assert "load_policy('hf:me/three') loads it" in pushed.stdout
    files = hub[0].files["me/three"]
    assert set(files) == {"README.md", "policy.pt", "results.json"}
    assert json.loads(files["results.json"])["eval/mean_success_rate"] == 0.75

    loaded = call(
        "-c",
        "import numpy as np, mtrl_vec; policy = mtrl_vec.load_policy('hf:me/three')\n"
        "mtrl_vec.load_policy('hf:me/three@v1')\n"
        "rows = np.random.default_rng(0).normal(size=(5, 39))\n"
        "np.save('actions.npy', policy(rows, 'push')); print(policy.tasks, policy.frames)",
    )
    assert loaded.returncode == 0, loaded.stderr
    rows = np.random.default_rng(0).normal(size=(5, 39))
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), policy(rows, "push"))
    assert loaded.stdout.strip() == f"{policy.tasks} {policy.frames}"

    (tmp_path / "policy.pt").write_bytes(files["policy.pt"])
    content, original = load_checkpoint(tmp_path / "policy.pt"), load_checkpoint(policy.file)
    assert content["config"]["runtime"]["run_dir"] is None and content["config"]["init_from"] is None
    assert content.keys() == {"format", "version", "config", "versions", "frames", "policy", "reward_scale"}
    for name, tensor in original["policy"].items():
        assert content["policy"][name].equal(tensor)

    train = ["--total-frames", "192", "--num-envs", "12", "--num-steps", "16", "--eval-interval", "0", "--quiet"]
    train += ["--no-popart", "--no-bounded-mean"]  # as that policy is
    started = call("-m", "mtrl_vec", "train", "--init-from", "hf:me/three", *train, "--run-dir", "run")
    assert started.returncode == 0 and "started from" in started.stdout + started.stderr, started.stderr


def test_the_card(hub, call) -> None:
    hub[0].files["me/card"] = {"results.json": b"of another policy"}
    assert call("-m", "mtrl_vec", "push", "pretrained", "me/card", "--private").returncode == 0
    assert set(hub[0].files["me/card"]) == {"README.md", "policy.pt"}
    assert hub[0].asked[-1].get("private", hub[0].asked[-1].get("visibility")) in (True, "private")
    text = hub[0].files["me/card"]["README.md"].decode()
    assert "Not evaluated under Meta-World's protocol." in text
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata)["library_name"] == "mtrl_vec" and "model-index" not in metadata
    assert 'load_policy("hf:me/card")' in body


def test_the_card_of_an_evaluated_policy() -> None:
    from mtrl_vec.commands.push import card
    from mtrl_vec.train.warm_start import policy_of

    policy = load_policy("pretrained")
    text = card("me/three", policy_of(load_checkpoint(policy.file)), results(policy))
    _, metadata, body = text.split("---\n", 2)
    (model,) = yaml.safe_load(metadata)["model-index"]
    (result,) = model["results"]
    assert result["metrics"][0] == {"type": "success_rate", "value": 0.75, "name": "success rate"}
    assert result["dataset"]["name"] == "MT3"
    assert "| push-v3 | 0.500 | 0.40 to 0.51 |" in body and "| mean | 0.750 | 0.70 to 0.80 |" in body
    assert f"{policy.frames:,} environment steps" in body and "seed (100, 200)" in body


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/three", "--results", "none.json"], "cannot read --results none.json"),
        (["me/three", "--results", "wrong.json"], "once (not enough values to unpack"),
        (["me/three", "--results", "part.json"], "('seeds'): give what eval --json wrote for it"),
        (["three"], "repository is 'three': give owner/name"),
    ],
)
def test_what_is_wrong_before_anything_is_sent(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.json").write_text("[]")
    part = {name: value for name, value in results(load_policy("pretrained")).items() if name != "seeds"}
    (tmp_path / "part.json").write_text(json.dumps([part]))
    assert main(["push", "pretrained", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_what_the_hub_does_not_have_or_take(call) -> None:
    attempts = {
        "eval hf:me/nobody": "cannot load hf:me/nobody (",
        "eval hf:not-a-name/with/slashes": "cannot load hf:not-a-name/with/slashes (",
        "eval hf:me/three@v9": "cannot load hf:me/three@v9 (",
        "push pretrained me/other": "cannot push to me/other (",
    }
    code = "import sys; from mtrl_vec.commands.cli import main; print(*[main(line.split()) for line in sys.argv[1:]])"
    result = call("-c", code, *attempts, token="hf_other")
    assert result.stdout.split() == ["2"] * 4
    lines = result.stderr.splitlines()
    assert len(lines) == 4 and all(message in line for message, line in zip(attempts.values(), lines, strict=True))
    assert "hf auth login" in lines[-1]


def test_no_connection(call) -> None:
    result = call("-m", "mtrl_vec", "eval", "hf:me/three", endpoint="http://127.0.0.1:9")
    assert result.returncode == 2 and "cannot load hf:me/three (" in result.stderr, result.stderr
