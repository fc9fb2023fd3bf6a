"""Policies as ONNX models: for programs without PyTorch, with normalisation and routing inside the model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtrl_vec.errors import InputError, first_line
from mtrl_vec.policy.network import SharedPolicy
from mtrl_vec.policy.trained import TrainedPolicy
from mtrl_vec.tasks.layout import OBSERVATION_SIZE

INPUTS = ("observation", "task_idx")
OUTPUT = "action"
_PRODUCER = "mtrl_vec"


def to_onnx(policy: TrainedPolicy) -> bytes:
    """A policy as a serialised ONNX model.

    The model maps ``observation`` [n, 39] float32, as Meta-World gives it, and ``task_idx`` [n] int64 to the mean
    ``action`` [n, 4] float32, clipped to [-1, 1]. Its metadata hold ``tasks``, separated by commas, in the order of
    ``task_idx``, and ``frames``, how long the policy was trained.

    Raises:
        InputError: onnx or onnxscript is not installed.
    """
    _require("onnx", "onnxscript")
    batch = torch.export.Dim("batch")
    example = torch.zeros(2, OBSERVATION_SIZE), torch.zeros(2, dtype=torch.long)
    with _quiet():
        program = torch.onnx.export(
            _MeanAction(policy.module).eval(),
            example,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=({0: batch}, {0: batch}),
            dynamo=True,
        )
    assert program is not None
    model = program.model_proto
    model.producer_name = _PRODUCER
    for key, value in (("tasks", ",".join(policy.tasks)), ("frames", str(policy.frames))):
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


class OnnxPolicy:
    """A policy that onnxruntime evaluates, on the CPU, with one thread.

    It acts for `mtrl_vec.tasks.official.evaluate`.

    Args:
        model: what `to_onnx` returned.
        file: where it is from, if it was read from a file.

    Raises:
        InputError: onnxruntime is not installed, or the model is not one of `to_onnx`.
    """

    def __init__(self, model: bytes, file: Path | None = None) -> None:
        runtime = _require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            metadata = self._session.get_modelmeta().custom_metadata_map
            self.tasks: tuple[str, ...] = tuple(metadata["tasks"].split(","))
            self.frames = int(metadata["frames"])
        except Exception as error:  # whatever onnxruntime says of a file that is something else
            name = "the model" if file is None else str(file)
            raise InputError(f"{name} is not a policy that mtrl-vec export wrote ({first_line(error)})") from error
        self.file, self._model = file, model

    @classmethod
    def load(cls, file: Path) -> OnnxPolicy:
        """Read a model. Raises InputError."""
        try:
            return cls(file.read_bytes(), file)
        except OSError as error:
            raise InputError(f"cannot read {file} ({error.strerror}): give a file that export wrote") from error

    def act(self, observation: NDArray[np.floating], task_idx: NDArray[np.integer]) -> NDArray[np.float32]:
        """Mean actions [n, 4], clipped to [-1, 1], for observations [n, 39] of the tasks at positions [n]."""
        arrays = np.asarray(observation, np.float32), np.asarray(task_idx, np.int64)
        (action,) = self._session.run([OUTPUT], dict(zip(INPUTS, arrays, strict=True)))
        return action

    def __reduce__(self) -> tuple[Any, ...]:
        return OnnxPolicy, (self._model, self.file)


class _MeanAction(nn.Module):
    """Observations [n, 39] and positions of tasks [n] -> mean actions [n, 4] as they are executed."""

    def __init__(self, policy: SharedPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor, task_idx: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(task_idx, self.policy.num_tasks).float()
        loc, _ = self.policy.distribution(observation, one_hot, task_idx)
        return loc.clamp(-1, 1)


def _require(*libraries: str) -> Any:
    """The last of these libraries. Raises InputError where one is missing."""
    import importlib

    try:
        return [importlib.import_module(library) for library in libraries][-1]
    except ImportError as error:
        message = f"ONNX models need {error.name}: pip install 'mtrl_vec[export]'"
        raise InputError(message) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter reports about its progress and its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
