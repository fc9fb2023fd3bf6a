"""The ranks that torchrun starts: joining them, and what identifies their launch.

Shapes: ``R`` ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from mtrl_vec.errors import InputError, RunFailed, WorkerDied, first_line
from mtrl_vec.machine import available_cores
from mtrl_vec.processes import num_ranks
from mtrl_vec.ranks import ALONE, E, Ranks, T

TIMEOUT = datetime.timedelta(minutes=5)
"""How long a rank may be silent, while its connection stands, before the others give up on it."""
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


class Group(Ranks):
    """A rank among others, see `join`.

    There are two process groups, since all ranks have to use a group in the same order: one for the learner, on its
    device, and one on the CPU for simulators and files, which may be used by another thread meanwhile.

    Args:
        device: of the learner: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: torchrun was started without what several nodes need.
        RunFailed: the ranks do not find each other. Also raised by every method once another rank is gone.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._local_rank, self._local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        self._check_launch()
        try:
            dist.init_process_group("gloo", store=_store(), rank=self.rank, world_size=self.size, timeout=TIMEOUT)
        except RuntimeError as error:
            raise self._shown_on_each_node(
                RunFailed(f"the ranks do not find each other ({first_line(error)})")
            ) from error
        self._cpu_group = dist.group.WORLD
        # Equal numbers of threads round alike.
        torch.set_num_threads(int(self.rows(torch.tensor([self.cores])).min()))
        backend = self._choose_gpu(device)
        with self.naming_the_lost():
            self._learner_group = dist.new_group(backend=backend, timeout=TIMEOUT)

    def _check_launch(self) -> None:
        if self._local_size == self.size:
            return
        problem = ""
        if os.environ.get(OWN_STORE) != "1":
            problem = (
                f"{OWN_STORE} is not 1: set it for every torchrun, or nodes do not find each other after a restart"
            )
        elif os.environ["TORCHELASTIC_RUN_ID"] == "none":
            problem = "the launch has no name: give every torchrun the same --rdzv-id"
        if problem:
            raise self._shown_on_each_node(InputError(problem))

    def _shown_on_each_node(self, error: E) -> E:
        error.shown_elsewhere = self._local_rank != 0
        return error

    def _choose_gpu(self, device: str) -> str:
        """The learner's backend: NCCL where every rank has a GPU of its own, gloo where not. Chooses the GPU, too."""
        gpus = torch.cuda.device_count() if device != "cpu" else 0
        if gpus:  # streams, graphs and NCCL take the current one
            torch.cuda.set_device(self._local_rank % gpus)
        own = self.sum(torch.tensor(float(gpus >= self._local_size)))
        return "cpu:gloo,cuda:nccl" if own == self.size else "gloo"

    @property
    def cores(self) -> int:
        """See `Ranks`."""
        return max(1, available_cores() // self._local_size)

    def add(self, tensor: Tensor) -> None:
        """See `Ranks`."""
        with self.naming_the_lost():
            dist.all_reduce(tensor, group=self._learner_group)

    def total(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        result = tensor.clone()
        self.add(result)
        return result

    def each(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        everything = tensor.new_zeros(self.size, *tensor.shape)  # gloo can add up what is on a GPU, but not gather it
        everything[self.rank] = tensor
        self.add(everything)
        return everything

    def rows(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        packed = _as_bytes(tensor)
        parts = [torch.empty_like(packed) for _ in range(self.size)]
        with self.naming_the_lost():
            dist.all_gather(parts, packed, group=self._cpu_group)
        return torch.cat(parts).view(tensor.dtype).view(-1, *tensor.shape[1:])

    def rows_at_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Ranks`."""
        # Sorted: TorchRL orders the keys of a rollout by hashes, which differ from process to process.
        flat = {name: _as_bytes(tensors[name]) for name in sorted(tensors)}
        packed = torch.cat(list(flat.values()), dim=1)
        parts = [torch.empty_like(packed) for _ in range(self.size)] if self.first else None
        with self.naming_the_lost():
            dist.gather(packed, parts, group=self._cpu_group)
        if parts is None:
            return dict(tensors)
        columns = torch.cat(parts).split([rows.shape[1] for rows in flat.values()], dim=1)
        return {
            name: column.contiguous().view(tensors[name].dtype).view(len(column), *tensors[name].shape[1:])
            for name, column in zip(flat, columns, strict=True)
        }

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        result = tensor.clone()
        with self.naming_the_lost():
            dist.all_reduce(result, group=self._cpu_group)
        return result

    def from_first(self, call: Callable[[], T]) -> T:
        """See `Ranks`."""
        answer: list[Any] = [None]
        if self.first:
            try:
                answer = [(call(), None)]
            except (InputError, RunFailed) as error:
                answer = [(None, error)]
        with self.naming_the_lost():
            dist.broadcast_object_list(answer, group=self._cpu_group)
        result, problem = answer[0]
        if problem is not None:
            raise self.shared(problem)
        return result

    def together(self, call: Callable[[], T]) -> T:
        """See `Ranks`."""
        result: Any = None
        problem: InputError | WorkerDied | None = None
        try:
            result = call()
        except (InputError, WorkerDied) as error:
            problem = error
        if not self.sum(torch.tensor(float(problem is not None))):
            return result
        problems: list[Any] = [None] * self.size
        with self.naming_the_lost():
            dist.all_gather_object(problems, problem, group=self._cpu_group)
        rank, first = next((rank, found) for rank, found in enumerate(problems) if found is not None)
        everywhere = all(str(found) == str(first) for found in problems)
        raise self.shared(first if everywhere else type(first)(f"{first} (rank {rank})"))

    def shared(self, error: E) -> E:
        """See `Ranks`."""
        error.shown_elsewhere = not self.first
        return error

    @contextlib.contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """See `Ranks`."""
        if torch.compiler.is_compiling():
            yield
            return
        try:
            yield
        except RunFailed:
            raise
        except RuntimeError as error:  # of gloo or NCCL
            raise self.shared(RunFailed(f"another rank of this run is gone ({first_line(error)})")) from error

    def close(self) -> None:
        """See `Ranks`."""
        dist.destroy_process_group()


def _as_bytes(rows: Tensor) -> Tensor:
    """[n, ...] of any type -> [n, bytes per row] on the CPU: gloo does not know every type."""
    return rows.cpu().reshape(len(rows), rows[0].numel()).contiguous().view(torch.uint8)


def join(device: str) -> Ranks:
    """The ranks that torchrun has started this process among; or this process by itself.

    Args:
        device: of the learner: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: see `Group`.
    """
    return Group(device) if num_ranks() > 1 else ALONE


def launch_id() -> str | None:
    """What identifies a launch of torchrun through all of its restarts; None if torchrun did not start this process.

    The name that ``--rdzv-id`` or ``--standalone`` gave it. Without one, torchrun's own process: enough on one node,
    and several are refused.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    agent = psutil.Process(os.getppid())
    return name if name != "none" else f"{platform.node()}-{agent.pid}-{agent.create_time()}"


def _store() -> dist.Store:
    """Where the ranks find each other: another place after each restart.

    By default ranks share the store of torchrun's agent (as of torch 2.13), which keeps the addresses of ranks that are
    gone. The count of restarts tells old from new, but only on one node: each agent has a count of its own.
    """
    port, is_server = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], port, is_master=is_server and not agents, timeout=TIMEOUT, multi_tenant=True
    )
    return dist.PrefixStore(f"mtrl_vec/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store) if agents else store
