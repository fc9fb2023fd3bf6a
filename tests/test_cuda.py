"""What only a GPU can show: graphs and compiled code against the eager path, and that nothing waits."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from tensordict import TensorDict

from helpers import loop_over_rows, make_batch, make_policy, make_rollout, tiny_config
from mtrl_vec.commands.profile import profile_training
from mtrl_vec.config import TrainConfig
from mtrl_vec.envs import make_env
from mtrl_vec.envs.rollout import SharedRollout
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.learn.device import DeviceCopy, GraphedCall, on_stream
from mtrl_vec.learn.ppo import PPO
from mtrl_vec.policy import SharedPolicy
from mtrl_vec.policy.routing import TaskHeads
from mtrl_vec.timing import Timer
from mtrl_vec.train import Trainer
from runs import resume, train_until_interrupted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

COMPILES = pytest.mark.compiles
"""Takes a minute or more where it is done for a GPU."""

WAYS = [
    pytest.param({"compile": "off", "cuda_graphs": True}, id="graphed"),
    pytest.param({"compile": "on", "cuda_graphs": False}, id="compiled", marks=COMPILES),
    pytest.param({"compile": "on", "cuda_graphs": True}, id="compiled and graphed", marks=COMPILES),
]
OFF_AND_ON = ["off", pytest.param("on", marks=COMPILES)]

PRESET = {"device": "cuda", "precision": "bf16", "compile": "on", "cuda_graphs": True}
"""How the preset for a GPU runs."""


def learn(config: TrainConfig, rollouts: int = 4) -> tuple[PPO, list[dict[str, float]]]:
    """Some iterations on the same random data for every configuration."""
    torch.manual_seed(0)
    policy = make_policy(config)
    data = [rollout_for(policy, config) for _ in range(rollouts)]
    ppo = PPO(config, policy.cuda())
    return ppo, [ppo.learn(rollout, 0.0) for rollout in data]


def rollout_for(policy: SharedPolicy, config: TrainConfig) -> TensorDict:
    return make_rollout(policy, config.num_envs, config.learner.num_steps)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Else all tests together count as recompilations of the same functions."""
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize("entropy_coeff", [0.0, 0.01])
@pytest.mark.parametrize("way", WAYS)
def test_graphed_and_compiled_updates_equal_the_eager_one(way, entropy_coeff, precision, tolerance) -> None:
    common = {"device": "cuda", "precision": precision, "entropy_coeff": entropy_coeff, "log_gradients": True}
    eager, expected = learn(tiny_config(**common, compile="off", cuda_graphs=False))
    other, got = learn(tiny_config(**common, **way))
    common_size = eager.config.minibatch_size
    if way["cuda_graphs"]:  # two of them: the last step of an update goes by task, to log the gradients
        assert other.step is not other.last_step
        assert other.step.graph is not None and other.last_step.graph is not None
    for ours, theirs in zip(got, expected, strict=True):
        for name, value in theirs.items():
            one_row = 2 / common_size if name == "clip_fraction" else 0.0
            assert ours[name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance + one_row), name
    for (name, a), b in zip(other.policy.named_parameters(), eager.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance, msg=name)


def test_the_losses_on_the_gpu_equal_those_on_the_cpu() -> None:
    steps = {"num_minibatches": 1, "num_epochs": 1, "log_gradients": True}
    config = tiny_config(device="cuda", precision="fp32", compile="off", cuda_graphs=True, **steps)
    _, (on_gpu,) = learn(config, rollouts=1)
    torch.manual_seed(0)
    policy = make_policy(config)
    rollout = rollout_for(policy, config)
    on_cpu = PPO(config, policy).learn(rollout, 0.0)
    for name, value in on_cpu.items():
        assert on_gpu[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("way", WAYS)
def test_nothing_in_advantages_and_update_waits_for_the_device(way) -> None:
    config = tiny_config(device="cuda", precision="bf16", log_gradients=True, **way)
    ppo, _ = learn(config, rollouts=3)
    data = rollout_for(make_policy(config), config).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(ppo.stream):
            metrics = ppo.add_advantages(data) | ppo.update(data)
            ppo.prepare_next(data, metrics["approx_kl"], 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_gpu_reads_pinned_rollouts_where_the_simulators_write() -> None:
    shared, copy_of = SharedRollout(6, 4, 3, pinned=True), DeviceCopy(torch.device("cuda"))
    rollout = shared.result().exclude("action", ("next", "success"))
    for i in range(3):
        for tensor in rollout.values(include_nested=True, leaves_only=True):
            assert tensor.is_pinned() and tensor.is_shared()
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 7 == i)
        on_gpu = copy_of(rollout)
        torch.cuda.synchronize()
        assert on_gpu.device.type == "cuda" and (on_gpu.cpu() == rollout).all() and not copy_of._staged
    again = copy_of(rollout.clone())  # in memory that is not pinned
    torch.cuda.synchronize()
    assert copy_of._staged and (again.cpu() == rollout).all()


@pytest.mark.filterwarnings("error")
def test_pinned_memory_is_given_back_and_used_again() -> None:
    for _ in range(3):
        pool = make_env(num_workers=2, envs_per_worker=3)
        pool.pinned = True
        try:
            pool.reset()
            for steps in (3, 4, 3):
                rollout = pool.collect(lambda td: td.set("action", torch.zeros(6, 4)), steps)
                assert rollout["observation"].is_pinned()
        finally:
            pool.close()
    observation = rollout["observation"].detach()  # another tensor of the same memory
    del rollout, pool
    gc.collect()
    assert not observation.is_pinned()
    assert torch.zeros(3, device="cuda").sum() == 0  # no error is pending


def test_bf16_keeps_weights_in_fp32_and_stays_close() -> None:
    common = {"device": "cuda", "compile": "off", "cuda_graphs": True}
    _, expected = learn(tiny_config(precision="fp32", **common), rollouts=1)
    ppo, got = learn(tiny_config(precision="bf16", **common), rollouts=1)
    assert {p.dtype for p in ppo.policy.parameters()} == {torch.float32}
    assert got[0]["loss_critic"] == pytest.approx(expected[0]["loss_critic"], rel=0.02)
    assert got[0]["approx_kl"] == pytest.approx(expected[0]["approx_kl"], rel=0.2, abs=1e-4)


@pytest.mark.parametrize("compile", OFF_AND_ON)
def test_actions_on_the_gpu_have_the_distribution_of_the_actor(compile) -> None:
    config = tiny_config(device="cuda", precision="fp32", compile=compile, init_std=0.5)
    torch.manual_seed(0)
    policy = make_policy(config)
    state = make_batch(policy, 2, 3).repeat(2000, 1)
    loc, scale = policy.distribution(state["observation"], state["task_one_hot"], state["task_idx"])
    acting = ActingPolicy(policy.cuda(), config, Timer())
    with torch.no_grad():
        z = (acting(state)["action"] - loc) / scale
    assert z.device.type == "cpu"
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02


@pytest.mark.parametrize("mean", [False, True])
def test_graphed_actions_equal_eager_ones_and_follow_the_weights(mean) -> None:
    graphed, eager = (tiny_config(device="cuda", precision="bf16", cuda_graphs=graphs) for graphs in (True, False))
    policy = make_policy(graphed).cuda()
    ours, theirs = (ActingPolicy(policy, config, Timer(), mean=mean) for config in (graphed, eager))
    for i in range(5):  # two of them before the capture
        state = make_batch(policy, 2, 3)
        torch.testing.assert_close(ours(state.clone())["action"], theirs(state.clone())["action"], rtol=0, atol=1e-6)
        if i >= 2:
            assert ours._in_place[6][1].graph is not None
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)


def test_idle_rows_are_left_out_on_the_gpu_too() -> None:
    config = tiny_config(device="cuda", precision="fp32", compile="off")
    policy = make_policy(config).cuda()
    rows, state = torch.tensor([0, 1, 2, 3, 4, 6, 7]), make_batch(policy, 3, 3)
    flat, padded = (ActingPolicy(policy, config, Timer()) for _ in range(2))  # with the same noise
    padded.rows = rows
    for _ in range(2):
        expected = flat(state.reshape(-1)[rows].clone())["action"]
        out = padded(state.clone())
        action = out["action"].flatten(0, 1)
        torch.testing.assert_close(action[rows], expected)
        assert out["action"].shape == (3, 3, 4) and (action[[5, 8]] == 0).all()


def test_a_graph_replays_what_the_function_does() -> None:
    x = torch.zeros((), device="cuda")

    def increment() -> torch.Tensor:
        x.add_(1)
        return x * 2

    call = GraphedCall(increment, warmup=2)
    with on_stream(torch.cuda.Stream()):
        assert [float(call()) for _ in range(5)] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert call.graph is not None


def test_copies_lie_in_the_same_place_and_hold_what_came_last() -> None:
    policy = make_policy(tiny_config())
    copy = DeviceCopy(torch.device("cuda"))
    places = set()
    for _ in range(3):
        rollout = make_rollout(policy, 12, 16)
        data = copy(rollout)
        places.add(data["next", "reward"].data_ptr())
        assert torch.equal(data["next", "reward"].cpu(), rollout["next", "reward"])
    assert len(places) == 1


@COMPILES
def test_heads_of_many_tasks_under_bf16_equal_a_loop() -> None:
    torch.manual_seed(0)
    heads = TaskHeads(50, 64, 32, 4, 1.0).cuda()
    x, task_idx = torch.randn(200, 64, device="cuda"), torch.randint(50, (200,), device="cuda")
    expected = loop_over_rows(heads, x, task_idx)
    wanted = torch.autograd.grad(expected.sum(), heads.parameters())
    for run in (heads, torch.compile(heads, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            out = run(x.bfloat16(), task_idx)
        torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
        for a, b in zip(torch.autograd.grad(out.sum(), heads.parameters()), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.3)


@COMPILES
@pytest.mark.parametrize("overlap", [False, True])
def test_training_goes_through_capture_and_keeps_the_ratios_right(tmp_path, overlap) -> None:
    """Without overlap the policy that is about to learn is the one that acted, and with overlap one update ahead."""
    config = tiny_config(
        run_dir=tmp_path / "run", total_frames=6 * 192, eval_interval=2 * 192, overlap=overlap, **PRESET
    )
    trainer = Trainer(config)
    differences, original = [], trainer.learner.update

    def update_and_note(data):
        loc, scale = trainer.policy.distribution(data["observation"], data["task_one_hot"], data["task_idx"])
        log_prob = torch.distributions.Normal(loc, scale).log_prob(data["action"]).sum(-1)
        differences.append(float((log_prob - data["action_log_prob"]).abs().mean()))
        return original(data)

    trainer.learner.update = update_and_note
    trainer.train()
    assert trainer.frames == 6 * 192 and trainer.learner.step.graph is not None
    assert all(difference < 0.05 for difference in (differences[:1] if overlap else differences))
    assert not overlap or all(difference > 1e-3 for difference in differences[1:])


@COMPILES
def test_an_update_step_is_launched_in_single_digits(tmp_path) -> None:
    steps = {"num_epochs": 6, "num_minibatches": 6}
    config = tiny_config(run_dir=tmp_path / "run", total_frames=192 * 10, **steps, **PRESET)
    report = profile_training(config, iterations=1)
    assert report["launches_per_step"] < 10
    assert report["waits_in_update"] <= 2  # the metrics', and the profile's own


@pytest.mark.parametrize("way", WAYS)
def test_a_skipped_step_in_a_replayed_graph_changes_nothing(way) -> None:
    ppo, _ = learn(tiny_config(device="cuda", precision="bf16", **way), rollouts=3)
    before = copy.deepcopy((ppo.policy.state_dict(), ppo.optimizer.state_dict()["state"]))
    with on_stream(ppo.stream):
        ppo.minibatches.frames["advantage"].fill_(math.nan)
        counts = ppo.step()[:2].clone()
    assert counts.tolist() == [1.0, 1.0]
    after = ppo.policy.state_dict(), ppo.optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_state_is_restored_in_place_after_capture(way) -> None:
    """What follows is what followed the first time: the graph goes on with the tensors that it has captured."""
    config = tiny_config(device="cuda", precision="bf16", log_gradients=True, **way)
    ppo, _ = learn(config, rollouts=3)
    rollout = rollout_for(make_policy(config), config)
    saved = copy.deepcopy((ppo.policy.state_dict(), ppo.state_dict()))
    first = ppo.learn(rollout, 0.5)
    ppo.policy.load_state_dict(saved[0])
    ppo.load_state_dict(saved[1])
    again = ppo.learn(rollout, 0.5)
    for name, value in first.items():
        assert again[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_run_is_resumed_on_the_gpu(tmp_path, device) -> None:
    """One of a GPU goes on with the same numbers, but for rounding; one of a CPU goes on at all, through capture."""
    settings = {"precision": "fp32", "compile": "off", "cuda_graphs": True}
    settings |= {"total_frames": 6 * 192, "max_episode_steps": 20}
    train_until_interrupted(tmp_path / "run", 3, device=device, **settings)
    trainer = resume(tmp_path / "run", device="cuda")
    assert trainer.frames == 6 * 192 and trainer.learner.step.graph is not None
    assert all(torch.isfinite(tensor).all() for tensor in trainer.policy.state_dict().values())
    if device == "cuda":
        whole = Trainer(tiny_config(run_dir=tmp_path / "whole", device="cuda", eval_interval=384, **settings))
        whole.train()
        for (name, a), b in zip(whole.policy.named_parameters(), trainer.policy.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("compile", OFF_AND_ON)
@pytest.mark.parametrize("changes", [{"gradient_method": "pcgrad"}, {"gradient_method": "cagrad"}, {"popart": True}])
def test_combined_and_normalised_steps_are_captured_and_equal_eager_ones(changes, compile) -> None:
    eager, expected = learn(tiny_config(device="cuda", precision="fp32", compile="off", cuda_graphs=False, **changes))
    ppo, got = learn(tiny_config(device="cuda", precision="fp32", compile=compile, cuda_graphs=True, **changes))
    assert ppo.step.graph is not None and ppo.last_step is ppo.step
    for a, b in zip(ppo.policy.parameters(), eager.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert got[-1]["loss_critic"] == pytest.approx(expected[-1]["loss_critic"], rel=1e-3)
