"""What a GPU would be asked to do, without one: see fake_cuda.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("fake_cuda.py")
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.xdist_group("fake_cuda"),  # in one process, since what takes long is shared
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build of PyTorch without CUDA"),
]

CONFIGS: list[dict[str, object]] = [
    {},
    {"overlap": True, "direct_features": True},
    {"double_buffer": True},
    {"pinned rollouts": False},
    {"gradient_method": "pcgrad", "direct_features": True},
    {"gradient_method": "cagrad"},
    {"popart": False, "entropy_coeff": 0.01, "precision": "fp32"},
    {"log_gradients": True, "direct_features": True},
    {"tasks": ["MT10"], "num_envs": 20},
    {"tasks": ["MT10"], "num_envs": 20, "compute capability": 8},
    {"per_task_advantage": False, "learn_std": False, "normalize_reward": False, "normalize_observation": False},
]
FAULTS = {
    "waits": "_local_scalar_dense waits for the device",
    "copies": "a copy from cpu to cuda that waits",
    "numbers": "mul on the CPU in a graph",
    "atomics": "adds up with atomic operations",
    "float64": "makes float64",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, int]]:
    """What is wrong with each configuration, and then with each fault."""
    library = tmp_path_factory.mktemp("fake") / "fake_cuda.so"
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
    source = PROGRAM.with_suffix(".cpp")
    command = [COMPILER, "-std=c++20", "-shared", "-fPIC", *include, source, "-o", library, *link]
    subprocess.run(command, check=True, capture_output=True)
    cases = [*((config, None) for config in CONFIGS), *(({}, fault) for fault in FAULTS)]
    program = [sys.executable, "-W", "ignore", PROGRAM, library, json.dumps(cases)]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("i", range(len(CONFIGS)), ids=[str(config) for config in CONFIGS])
def test_nothing_waits_mixes_devices_or_cannot_be_captured(i, found) -> None:
    assert found[i] == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, found) -> None:
    problems = found[len(CONFIGS) + list(FAULTS).index(fault)]
    assert any(FAULTS[fault] in problem for problem in problems)
