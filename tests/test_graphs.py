"""What CUDA graphs do to the update, without a GPU: operators are recorded, and run again on the same memory.

A graph knows nothing of what Python did around its operators: a number that has become part of one stays as it was, and
a tensor that was put in the place of another is not seen. What CUDA makes of it only test_cuda.py can show.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import mtrl_vec.learn.acting
import mtrl_vec.policy.modules
import mtrl_vec.policy.routing
from helpers import make_batch, make_policy, make_rollout, tiny_config
from mtrl_vec.config import TrainConfig
from mtrl_vec.learn.acting import ActingPolicy
from mtrl_vec.learn.device import DeviceCopy
from mtrl_vec.learn.ppo import PPO
from mtrl_vec.policy.routing import TaskHeads
from mtrl_vec.ranks import ALONE, Ranks
from mtrl_vec.timing import Timer

RESHAPING = ("squeeze_", "unsqueeze_", "t_", "transpose_", "detach_")  # nothing that a device would do


def tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Notes operators with their arguments as they are at the time, and where their results are."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list = []
        self._alive: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "this would wait for the device"
        kwargs = kwargs or {}
        frozen = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, (args, kwargs))
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        new = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in given]
        self._alive.append((args, kwargs, out))
        is_view = tensors(out) and not new and not func._schema.is_mutable
        if not is_view and func.overloadpacket.__name__ not in RESHAPING:
            self.operators.append((func, *frozen, [t.detach() for t in tensors(out)] if new else []))
        return out


class RecordedGraph:
    def replay(self) -> None:
        for func, args, kwargs, places in self.recorder.operators:
            for place, result in zip(places, tensors(func(*args, **kwargs)), strict=False):
                place.copy_(result)


class Twin(Ranks):
    """One of two ranks, whose other half has the same frames."""

    size = 2

    def add(self, tensor: torch.Tensor) -> None:
        tensor.mul_(2)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor

    def each(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, tensor])

    def rows_at_first(self, tensors):
        return {name: torch.cat([rows, rows]) for name, rows in tensors.items()}


class UnpinnedCopy(DeviceCopy):
    def __call__(self, data):
        if self._data is None:
            self._data = data.clone()  # a "copy" to the CPU would be the data themselves
        return super().__call__(data)

    def _pinned(self, key, source):
        return source


@pytest.fixture
def learners(monkeypatch) -> list[PPO]:
    """Makes recorded graphs of CUDA graphs, and takes the paths of a GPU on the CPU. The learner that is used last."""
    current: list[PPO] = []

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode) -> Iterator[None]:
        ppo = current[-1]
        state = [t for kept in ppo.optimizer.state.values() for t in kept.values()]
        state += [*ppo.policy.state_dict().values(), ppo.gram, ppo.skipped_in_a_row, ppo.optimizer.found_inf]
        state += [*ppo._sums.parts, *ppo._sums_by_task.parts]
        before = [t.detach().clone() for t in state]
        graph.recorder = Recorder()
        with graph.recorder:
            yield
        with torch.no_grad():  # a capture runs nothing
            for t, value in zip(state, before, strict=True):
                t.copy_(value)

    class AsIfCompiling:
        compiler = type("compiler", (), {"is_compiling": staticmethod(lambda: True)})

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(TaskHeads, "split", TaskHeads.gathered)  # which asks for sizes
    for module in (mtrl_vec.policy.modules, mtrl_vec.policy.routing):
        monkeypatch.setattr(module, "torch", AsIfCompiling())
    return current


def made(config: TrainConfig, learners: list[PPO], ranks: Ranks = ALONE, graphs: bool = True) -> tuple[PPO, list]:
    """A learner as on a GPU, and four rollouts."""
    torch.manual_seed(0)
    policy = make_policy(config)
    rollouts = [make_rollout(policy, config.num_envs // ranks.size, config.learner.num_steps) for _ in range(4)]
    behaviour = None
    if config.learner.overlap:  # collected by another policy, which is asked for log-probabilities afterwards
        behaviour = make_policy(config)
        rollouts = [rollout.exclude("action_log_prob") for rollout in rollouts]
    ppo = PPO(config.replace(cuda_graphs=graphs), policy, behaviour=behaviour, ranks=ranks)
    ppo.to_device = UnpinnedCopy(ppo.device)
    ppo._prepare(on_gpu=True)
    learners.append(ppo)
    return ppo, rollouts


def learned(config: TrainConfig, learners: list[PPO], ranks: Ranks, graphs: bool) -> tuple[PPO, list, list]:
    ppo, rollouts = made(config, learners, ranks, graphs)
    return ppo, rollouts, [ppo.learn(rollout, 0.1 * i) for i, rollout in enumerate(rollouts)]


def assert_equal(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == value or (math.isnan(value) and math.isnan(ours[name])), name


@pytest.mark.parametrize("ranks", [ALONE, Twin()], ids=["one graph", "two graphs around a sum"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"entropy_coeff": 0.01, "popart": False},
        {"log_gradients": True},
        {"gradient_method": "pcgrad"},
        {"gradient_method": "cagrad"},
        {"precision": "bf16"},
        {"overlap": True},
    ],
    ids=str,
)
def test_replays_equal_eager_updates_to_the_last_bit(changes, ranks, learners) -> None:
    config = tiny_config(**changes)
    eager, rollouts, expected = learned(config, learners, ranks, graphs=False)
    ppo, _, got = learned(config, learners, ranks, graphs=True)
    for ours, theirs in zip(got, expected, strict=True):
        assert_equal(ours, theirs)
    # What is set or restored from outside reaches the graph.
    saved = copy.deepcopy((ppo.policy.state_dict(), ppo.state_dict()))
    for other in (ppo, eager):
        other.policy.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        other.set_task_weights([0.7, 0.2, 0.1])
        other.policy.limit_std(0.2)
        other.policy.hold_std(torch.tensor([0.0, 0.5, 1.0]))
        other.lr.fill_(1e-3)
    assert_equal(ppo.learn(rollouts[1], 0.9), eager.learn(rollouts[1], 0.9))
    for name, tensor in ppo.policy.state_dict().items():
        assert torch.equal(tensor, eager.policy.state_dict()[name]), name
    # A step that is skipped changes nothing.
    before = copy.deepcopy(ppo.policy.state_dict())
    ppo.minibatches.frames["advantage"].fill_(math.nan)
    assert ppo.step()[:2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(ppo.policy.state_dict(), before, rtol=0, atol=0)


def a_learning_rate_that_is_a_number(ppo: PPO) -> None:
    ppo.optimizer.param_groups[0]["lr"] = float(ppo.lr)


def frames_that_are_replaced(ppo: PPO) -> None:
    ppo.minibatches.take = lambda frames: setattr(ppo.minibatches, "frames", frames.clone())


def rows_that_are_replaced(ppo: PPO) -> None:
    choose = ppo.minibatches.choose
    ppo.minibatches.choose = lambda i: (choose(i), setattr(ppo.minibatches, "rows", ppo.minibatches.rows.clone()))


def weights_that_are_replaced(ppo: PPO) -> None:
    set_weights = ppo.set_task_weights
    ppo.loss.task_weights = ppo.loss.task_weights.clone()
    set_weights([0.7, 0.2, 0.1])


@pytest.mark.parametrize(
    "plant",
    [a_learning_rate_that_is_a_number, frames_that_are_replaced, rows_that_are_replaced, weights_that_are_replaced],
)
def test_what_a_graph_would_not_see_is_noticed(plant, learners) -> None:
    """Planted once the graph is there: eager updates follow, replays do not."""
    results = []
    for graphs in (False, True):
        ppo, rollouts, _ = learned(tiny_config(), learners, ALONE, graphs)
        plant(ppo)
        ppo.lr.fill_(1e-3)
        results.append(ppo.learn(rollouts[0], 0.5))
    assert results[0]["approx_kl"] != results[1]["approx_kl"]


@pytest.mark.parametrize("fails", ["at its start", "at its end"])
def test_what_cannot_be_captured_goes_on_eagerly(fails, learners, monkeypatch) -> None:
    config = tiny_config()
    _, _, expected = learned(config, learners, ALONE, graphs=False)
    capture = torch.cuda.graph

    @contextlib.contextmanager
    def failing(*arguments, **options):
        with contextlib.nullcontext() if fails == "at its start" else capture(*arguments, **options):
            if fails == "at its end":
                yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    with pytest.warns(UserWarning, match="without CUDA graphs: capture failed") as warned:
        ppo, _, got = learned(config, learners, ALONE, graphs=True)
    assert len(warned) == 1 and ppo.step.graph is None
    for ours, theirs in zip(got, expected, strict=True):
        assert_equal(ours, theirs)


def test_waiting_for_the_device_is_noticed(learners) -> None:
    ppo, rollouts = made(tiny_config(), learners)
    loss = ppo.minibatch_loss

    def waiting(*arguments):
        total, metrics = loss(*arguments)
        return total * (1.0 if total.item() == total.item() else 0.0), metrics

    ppo.minibatch_loss = waiting
    with pytest.raises(AssertionError, match="this would wait for the device"):
        for rollout in rollouts:
            ppo.learn(rollout, 0.1)


@pytest.mark.parametrize(
    ("replaced", "sizes"), [(None, [12]), (None, [5, 7]), (None, [6, 6]), ("inputs", [12]), ("noise", [12])]
)
def test_graphed_actions_equal_eager_ones_unless_their_memory_is_replaced(
    replaced, sizes, learners, monkeypatch
) -> None:
    """Of all environments at once, and of two groups with a graph each, or with one if they are of the same size."""

    class Unpinned:
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(self, *size, pin_memory=False, **options) -> torch.Tensor:
            return torch.zeros(*size, **options)

    ppo, _ = made(tiny_config(), learners)
    monkeypatch.setattr(mtrl_vec.learn.acting, "torch", Unpinned())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"synchronize": lambda self: None})())
    graphed, eager = (ActingPolicy(ppo.policy, ppo.config, Timer()) for _ in range(2))  # with the same noise
    graphed._graphs = True
    equal = []
    for i in range(6):  # two of them before the capture
        state = make_batch(ppo.policy, 12)
        actions = {}
        for acting in (graphed, eager):
            acting.noise.draw(12)
            ends = np.cumsum([0, *sizes])
            actions[acting] = [
                acting._act_on_gpu(
                    functools.partial(acting.noise.of, slice(start, end)),
                    state["observation"][start:end],
                    state["task_one_hot"][start:end],
                )
                for start, end in itertools.pairwise(ends)
            ]
        equal.append(all(map(torch.equal, *actions.values())))
        with torch.no_grad():
            for parameter in ppo.policy.parameters():
                parameter.mul_(1.1)
        buffers, _ = graphed._in_place[sizes[0]]
        if i == 3 and replaced:
            setattr(buffers, replaced, getattr(buffers, replaced).clone())
    assert all(call.graph is not None for _, call in graphed._in_place.values())
    assert len(graphed._in_place) == len(set(sizes))
    assert equal == [True] * 4 + [replaced is None] * 2


@pytest.mark.parametrize("keys_are_set", [True, False])
def test_nothing_is_compiled_twice(keys_are_set, monkeypatch) -> None:
    """Advantages and loss. Planted: keys that GAE sets in its first call, for which the second one compiles again."""
    compiled, compile = [], torch.compile

    def note(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=note, **options))
    torch._dynamo.reset()
    config = tiny_config(compile="on")
    policy = make_policy(config)
    ppo = PPO(config, policy)
    if not keys_are_set:
        ppo.advantages._orig_mod.gae._tensor_keys = None
    for _ in range(3):
        ppo.learn(make_rollout(policy, config.num_envs, config.learner.num_steps), 0.1)
    torch._dynamo.reset()
    assert len(compiled) == (2 if keys_are_set else 3)
