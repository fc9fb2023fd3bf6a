"""Acting and learning on a GPU that is not there: tensors without numbers, on which every operator is looked at.

Run as a program, since it changes PyTorch for good: ``python fake_cuda.py LIBRARY CASES``, with the compiled
fake_cuda.cpp, and a JSON list of pairs: settings of a `TrainConfig`, and the name of a fault to plant, or null. Prints
as JSON what is wrong with each.

It sees what would wait for the device, tensors on the wrong device, and what a CUDA graph cannot capture. It does not
see numbers, real streams, or speed.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch asks for its hooks

import torch  # noqa: E402
import torch._subclasses.fake_tensor as fake_tensor  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from mtrl_vec.policy.routing import MANY_TASKS  # noqa: E402

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive")
COPIES = ("_to_copy", "copy_")


class Stream:
    def __init__(self, *_: object, **__: object) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...
    def synchronize(self) -> None:
        assert not Graphs.capturing, "a stream waits while a graph is captured"


class Graphs:
    """What takes the place of streams and graphs: a function that is captured runs as ever."""

    default = Stream()
    capturing = False
    captured = 0
    local = threading.local()

    @classmethod
    def current_stream(cls, device: object = None) -> Stream:
        return getattr(cls.local, "stream", cls.default)

    @classmethod
    @contextlib.contextmanager
    def stream(cls, stream: Stream) -> Iterator[None]:
        before, cls.local.stream = cls.current_stream(), stream
        try:
            yield
        finally:
            cls.local.stream = before

    @classmethod
    @contextlib.contextmanager
    def graph(cls, graph: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert stream is not cls.default, "a graph is captured on the default stream"
        cls.capturing, cls.captured = True, cls.captured + 1
        try:
            yield
        finally:
            cls.capturing = False


class GPU:
    major = 9  # compute capability


class CUDAGraph:
    def replay(self) -> None: ...


class Generator(torch.Generator):
    """One that says that it is on the device."""

    def __new__(cls, device: object = "cpu") -> Generator:
        return super().__new__(cls)

    def __init__(self, device: object = "cpu") -> None:
        self._device = torch.device(device)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self._device

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed)
        return self


def pretend() -> None:
    """Make torch believe that there is one device."""
    cuda = torch.cuda
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (GPU.major, 0),
        "get_device_properties": lambda device=None: GPU,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "is_current_stream_capturing": lambda: Graphs.capturing,
        "synchronize": lambda device=None: None,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "current_stream": Graphs.current_stream,
        "stream": Graphs.stream,
        "graph": Graphs.graph,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]
    cuda.amp.common.amp_definitely_not_available = lambda: False
    FakeTensorMode.avoid_device_init = True
    FakeTensorMode.__deepcopy__ = lambda self, memo: self
    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.FakeTensor.tolist = tolist


class Watch(TorchDispatchMode):
    """Notes what is wrong about operators, with the place in our code."""

    def __init__(self, pinned: list[torch.Tensor]) -> None:
        super().__init__()
        self.pinned = pinned
        self.problems: collections.Counter[str] = collections.Counter()
        self.on_device = self.grouped = 0

    def note(self, problem: str) -> None:
        frames = traceback.extract_stack()[:-2]  # without this, and what called it
        ours = [
            f"{Path(f.filename).name}, {f.name}" for f in frames if "mtrl_vec" in f.filename or __file__ in f.filename
        ]
        self.problems[f"{problem} in {ours[-1] if ours else 'the backward pass'}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in given}
        if name in WAITS and "cuda" in devices:
            self.note(f"{name} waits for the device")
        if name == "_grouped_mm" and GPU.major not in (9, 10):
            self.note("_grouped_mm reads the sizes on the CPU, which waits for the device")
        self.grouped += name == "_grouped_mm"
        if name in ("index", "index_put", "index_put_") and "cuda" in devices:
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
            if any(t.dtype is torch.bool for t in indices):
                self.note("a boolean index waits for the device")
        if name in ("index_add", "index_add_", "scatter_add", "scatter_add_") and "cuda" in devices:
            index = given[1]
            if len(index) > len(given[0]):  # else a permutation: nothing is added up
                self.note(f"{name} adds up with atomic operations")
        if name == "is_pinned":  # no fake kernel
            return any(args[0] is tensor for tensor in self.pinned)
        if name == "_fused_adam_":  # likewise
            if devices != {"cuda"} or any(t.dtype is not torch.float32 for t in given):
                self.note("the optimiser is given something else than fp32 on the device")
            return None
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if name in COPIES:
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], made[0])
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            pair = source.device.type, target.device.type
            if pair[0] != pair[1] and (waits or Graphs.capturing):
                self.note(f"a copy from {pair[0]} to {pair[1]} that waits" if waits else "a copy in a graph")
        elif "cuda" in devices | {t.device.type for t in made} and any(
            t.device.type == "cpu" and t.dim() for t in given
        ):
            self.note(f"{name} mixes devices")
        if any(t.device.type == "cuda" and t.dtype is torch.float64 for t in made):
            self.note(f"{name} makes float64")
        if Graphs.capturing and any(t.device.type == "cpu" for t in [*made, *given]):  # a number would be frozen
            self.note(f"{name} on the CPU in a graph")
        self.on_device += "cuda" in devices
        return out


class Reading(TorchDispatchMode):
    """While objects are made, numbers may be read; there are none, so they are 0.5."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.5
        return func(*args, **(kwargs or {}))


ITERATIONS = 4
READ: collections.Counter[str] = collections.Counter()


def tolist(tensor: torch.Tensor) -> list[float]:
    """Metrics of an update: counted."""
    READ["tolist"] += tensor.device.type == "cuda"
    return [0.5] * tensor.numel()


def problems(settings: dict[str, object], fault: str | None) -> dict[str, int]:
    """What is wrong in some iterations of acting and learning, and how often."""
    from helpers import make_batch, make_policy, make_rollout, tiny_config
    from mtrl_vec.learn.acting import ActingPolicy
    from mtrl_vec.learn.ppo import PPO
    from mtrl_vec.timing import Timer

    settings = dict(settings)
    GPU.major = settings.pop("compute capability", 9)
    pinned = settings.pop("pinned rollouts", True)
    config = tiny_config(**{"device": "cuda", "precision": "bf16", "compile": "off", "cuda_graphs": True} | settings)
    mode = FakeTensorMode()
    Graphs.captured = 0
    READ.clear()
    on_cpu = make_policy(config)
    state = make_batch(on_cpu, config.num_envs).apply(mode.from_tensor)
    rollout = make_rollout(on_cpu, config.num_envs, config.learner.num_steps).apply(mode.from_tensor)
    del rollout["action_log_prob"]
    watch = Watch(list(rollout.values(include_nested=True, leaves_only=True)) if pinned else [])
    with mode:
        with Reading():
            with torch.device("cuda"):
                policy = make_policy(config)
            acting = ActingPolicy(policy, config, Timer(), lagging=config.learner.overlap)
            evaluating = ActingPolicy(policy, config, Timer(), mean=True)
            ppo = PPO(config, policy, behaviour=acting.previous)
        if fault:
            loss = ppo.minibatch_loss
            ppo.minibatch_loss = lambda *arguments: FAULTS[fault](*loss(*arguments))
        sizes = [5, config.num_envs - 5] if config.runtime.double_buffer else [config.num_envs]
        policies = acting.in_turn(sizes)
        for _ in range(ITERATIONS):
            with watch:
                for _ in range(2):
                    parts = zip(policies, state.clone().split(sizes), strict=True)
                    action = torch.cat([act(part)["action"] for act, part in parts])
                    evaluating(state.clone())
                ppo.learn(rollout, 0.5)
                acting.catch_up()
            assert action.device.type == "cpu" and action.shape == (config.num_envs, 4)
    found = dict(watch.problems)
    expected = {
        "graphs captured": (Graphs.captured, len(sizes) + 2 + (ppo.last_step is not ppo.step)),  # one for evaluations
        "waits for metrics": (READ["tolist"], ITERATIONS),
        "rollouts copied on the CPU first": (len(ppo.to_device._staged) > 0, not pinned),
    }
    found |= {f"{name}: {got} instead of {wanted}": 1 for name, (got, wanted) in expected.items() if got != wanted}
    sorts = GPU.major == 9 and config.num_tasks >= MANY_TASKS and config.runtime.precision == "bf16"
    if bool(watch.grouped) != sorts:
        found[f"{watch.grouped} grouped products"] = 1
    if watch.on_device < 1000:
        found[f"only {watch.on_device} operators were seen on the device"] = 1
    return found


def waits(total: torch.Tensor, metrics: object) -> tuple[torch.Tensor, object]:
    with contextlib.suppress(Exception):  # there is no number
        total.item()
    return total, metrics


def atomics(total: torch.Tensor, metrics: dict[str, torch.Tensor]) -> tuple[torch.Tensor, object]:
    table = total.expand(3).clone()
    return table.index_select(0, torch.zeros(8, dtype=torch.long, device="cuda")).mean(), metrics


FAULTS = {
    "waits": waits,
    "copies": lambda total, metrics: (total + torch.ones(3).to("cuda").sum(), metrics),
    "numbers": lambda total, metrics: (total * torch.tensor(0.5), metrics),
    "atomics": atomics,
    "float64": lambda total, metrics: (total + torch.zeros((), dtype=torch.float64, device="cuda"), metrics),
}

if __name__ == "__main__":
    pretend()
    print(json.dumps([problems(settings, fault) for settings, fault in json.loads(sys.argv[2])]))
