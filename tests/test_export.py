"""Policies as ONNX models in onnxruntime: the same actions as PyTorch's, and the same official success."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from helpers import make_policy, tiny_config
from mtrl_vec.commands import export as command
from mtrl_vec.commands.cli import main
from mtrl_vec.policy import TrainedPolicy, load_policy
from mtrl_vec.policy.checkpoint import PRETRAINED, save_checkpoint
from mtrl_vec.policy.export import OnnxPolicy, to_onnx
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks import official
from mtrl_vec.tasks.official import Unit, evaluate, run_unit
from mtrl_vec.tasks.suite import resolve_tasks

pytestmark = pytest.mark.xdist_group("export")  # whose first model takes seconds longer than the others

INCLUDED = sorted(PRETRAINED.values())


@pytest.fixture(scope="module")
def small() -> tuple[TrainedPolicy, bytes]:
    """A policy and its model, which takes seconds to make."""
    policy = load_policy("pretrained")
    return policy, to_onnx(policy)


def observations(policy: TrainedPolicy, steps: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """What the policy sees in simulations of all its tasks, and of which task each row is."""
    tasks = resolve_tasks(policy.tasks)
    sim = SimBatch(tasks, range(len(tasks)), seed=5)
    rows = [sim.reset()]
    for _ in range(steps):
        rows.append(sim.step(policy.act(rows[-1], sim.task_idx)).observation)
    return np.concatenate(rows), np.tile(sim.task_idx, len(rows))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "-" in name else []) for name in INCLUDED]
)
def test_included_policies_act_the_same_in_onnxruntime(name) -> None:
    policy = load_policy(name)
    model = to_onnx(policy)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    exported = pickle.loads(pickle.dumps(OnnxPolicy(model)))  # as evaluations in other processes do
    assert exported.tasks == policy.tasks and exported.frames == policy.frames
    rows, tasks = observations(policy)
    for some in (slice(0, 1), slice(3, 6), slice(None)):  # batches of any size
        actions = exported.act(rows[some], tasks[some])
        assert actions.dtype == np.float32 and actions.shape == (len(rows[some]), 4)
        np.testing.assert_allclose(actions, policy.act(rows[some], tasks[some]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tasks", "changes"),
    [
        (("hammer", "push"), {}),  # of two objects
        pytest.param(("reach", "push"), {"direct_features": True}, marks=pytest.mark.slow),  # MT50's policy has them
        (("push",), {"bounded_mean": False}),
        (
            ("reach", "push", "pick-place"),
            {"relative_features": False, "normalize_observation": False, "popart": False},
        ),
    ],
)
def test_policies_of_other_settings(tasks, changes) -> None:
    torch.manual_seed(0)
    config = tiny_config(tasks=tasks, **changes)
    module = make_policy(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if config.policy.normalize_observation:
            rows, group = torch.randn(500, 39) * torch.linspace(0.1, 2, 39), torch.randint(len(tasks), (500,))
            one_hot = torch.nn.functional.one_hot(group, len(tasks)).float()
            module.torso.module.features.update(rows + group[:, None], one_hot)
    policy = TrainedPolicy(module.eval().requires_grad_(False), config, 7, Path("none"))
    rng = np.random.default_rng(0)
    rows, task_idx = rng.normal(size=(300, 39)).astype(np.float32), rng.integers(len(tasks), size=300)
    expected = policy.act(rows, task_idx)
    assert np.abs(expected).max() == 1 or config.policy.bounded_mean  # clipped inside
    assert np.abs(np.diff(expected, axis=0)).mean() > 0.01  # not a constant
    actions = OnnxPolicy(to_onnx(policy)).act(rows, task_idx)
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-5)


def test_the_model_without_this_package(small) -> None:
    """What docs/sharing.md says: names, types and shapes, in plain onnxruntime."""
    session = onnxruntime.InferenceSession(small[1], providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:], i.type) for i in session.get_inputs()] == [
        ("observation", [39], "tensor(float)"),
        ("task_idx", [], "tensor(int64)"),
    ]
    assert [(o.name, o.shape[1:]) for o in session.get_outputs()] == [("action", [4])]
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["tasks"] == "reach-v3,push-v3,pick-place-v3" and int(metadata["frames"]) > 0


@pytest.mark.slow
def test_goals_that_are_reached_are_the_same(small) -> None:
    policy, exported = small[0], OnnxPolicy(small[1])
    for k in range(3):
        unit = Unit(k, 100, num_goals=3)
        assert run_unit(exported, unit)[f"eval/{policy.tasks[k]}/success_rate"] == 1.0
        expected = run_unit(policy, unit)
        assert run_unit(exported, unit) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", INCLUDED)
def test_the_official_evaluation_is_the_same(name, monkeypatch) -> None:
    policy = load_policy(name)
    goals = official.NUM_GOALS if len(policy.tasks) <= 10 else 5  # all goals of fifty tasks take half an hour
    monkeypatch.setattr(official, "NUM_GOALS", goals)
    expected = evaluate(policy, [100], 2)
    scores = evaluate(OnnxPolicy(to_onnx(policy)), [100], 2)
    for task in policy.tasks:
        at = f"eval/{task}/success_rate"
        assert scores[at] == pytest.approx(expected[at], abs=1.01 / goals)  # one goal may fall on the other side
    assert scores["eval/mean_success_rate"] == pytest.approx(expected["eval/mean_success_rate"], abs=0.005)


def test_the_command(tmp_path, capsys) -> None:
    file = tmp_path / "policy.onnx"
    assert main(["export", "pretrained", "--onnx", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"wrote {file}, 0.") and "from PyTorch's on 153 observations" in out
    assert OnnxPolicy.load(file).tasks == load_policy("pretrained").tasks


@pytest.mark.parametrize("fault", ["other weights", "other statistics", "not clipped"])
def test_a_model_that_differs_is_not_written(fault, tmp_path, capsys, monkeypatch) -> None:
    """Planted faults of the export. Only means without bounds have to be clipped."""
    name, folder = "pretrained", tmp_path / "out"
    folder.mkdir()
    if fault == "not clipped":
        config, name = tiny_config(bounded_mean=False), str(tmp_path / "unbounded.pt")
        unbounded = make_policy(config)
        torch.nn.init.normal_(unbounded.actor_heads[0].module.heads.weight2, std=10.0)
        save_checkpoint(Path(name), {"config": config.to_dict(), "policy": unbounded.state_dict(), "frames": 5})

    def wrong(policy: TrainedPolicy) -> bytes:
        other = copy.deepcopy(policy)
        with torch.no_grad():
            if fault == "other weights":
                other.module.actor_heads[0].module.heads.bias2.add_(1e-3)
            elif fault == "other statistics":
                other.module.torso.module.features.observation_norm.mean.add_(1e-3)
        if fault == "not clipped":
            monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *_, **__: x)
        try:
            return to_onnx(other)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(command, "to_onnx", wrong)
    assert main(["export", name, "--onnx", str(folder / "policy.onnx")]) == 1
    assert "from PyTorch's" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_bad_files(tmp_path, capsys, monkeypatch) -> None:
    for onnx_file, message in (
        (tmp_path / "none" / "x.onnx", "give a file in an existing folder"),
        (tmp_path, "give a file in an existing folder"),
        (tmp_path / "policy.bin", "give a name that ends in .onnx"),
    ):
        assert main(["export", "pretrained", "--onnx", str(onnx_file)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    assert main(["eval", str(tmp_path / "broken.onnx")]) == 2
    assert "is not a policy that mtrl-vec export wrote" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "missing.onnx")]) == 2
    assert "cannot read" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", "pretrained", "--onnx", str(tmp_path / "policy.onnx")]) == 2
    assert "ONNX models need onnxscript: pip install 'mtrl_vec[export]'" in capsys.readouterr().err
    assert not (tmp_path / "policy.onnx").exists()


def test_what_acts_is_all_that_is_exported(small) -> None:
    """The critic's weights, and those of features that are not used, would only make the file larger."""
    policy, model = small
    numbers = sum(t.numel() for name, t in policy.module.state_dict().items() if not name.startswith("critic_heads."))
    assert 4 * numbers < len(model) < 4 * numbers + 100_000
