"""Policies to the Hugging Face Hub and back: its real client, against a hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from fake_hub import client_settings, local_hub
from mtrl_vec.commands.cli import main
from mtrl_vec.policy import load_policy
from mtrl_vec.policy.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def hub():
    """Its files, and its address."""
    with local_hub() as running:
        yield running


@pytest.fixture
def call(hub, tmp_path):
    """Runs Python with the hub's client pointed at it: it reads these variables when it is imported."""

    def run(*arguments: str, token: str = "hf_test", endpoint: str = hub[1]) -> subprocess.CompletedProcess[str]:
        about = client_settings(endpoint, tmp_path / "hf", token) | {"OMP_NUM_THREADS": "1"}
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


@pytest.mark.slow
def test_training_starts_from_there(hub, call) -> None:
    assert call("-m", "mtrl_vec", "push", "pretrained", "me/start").returncode == 0
    train = ["--total-frames", "192", "--num-envs", "12", "--num-steps", "16", "--eval-interval", "0", "--quiet"]
    started = call("-m", "mtrl_vec", "train", "--init-from", "hf:me/start", *train, "--run-dir", "run")
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


@pytest.mark.slow  # the client tries again for half a minute
def test_no_connection(call) -> None:
    result = call("-m", "mtrl_vec", "eval", "hf:me/three", endpoint="http://127.0.0.1:9")
    assert result.returncode == 2 and "cannot load hf:me/three (" in result.stderr, result.stderr
