"""Other systems than Linux, as far as they can be imitated: what they lack is taken away before any import."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import os, signal, sys
for name in ("fcntl", "pwd", "grp"):
    sys.modules[name] = None
for name in ("pthread_sigmask", "SIGKILL", "SIGHUP"):
    delattr(signal, name)
for name in ("sched_getaffinity", "fork"):
    delattr(os, name)
"""


def python(code: str, folder) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_everything_can_be_imported_without_what_windows_lacks(tmp_path) -> None:
    code = """
import importlib, pkgutil
import mtrl_vec
names = [module.name for module in pkgutil.walk_packages(mtrl_vec.__path__, "mtrl_vec.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""
    before = "import torch, torchrl, psutil, multiprocessing.resource_tracker\n"  # they need some of these themselves
    assert int(python(f"{before}{WITHOUT}{code}", tmp_path)) > 60


def test_a_run_without_locks_and_signal_masks(tmp_path) -> None:
    code = """
from pathlib import Path
from mtrl_vec.processes import deferred_interrupts
from mtrl_vec.train.run_dir import RunLock
from mtrl_vec.machine import available_cores
with deferred_interrupts(), RunLock(Path(".")):
    print("inside", available_cores())
"""
    assert python(f"import torch, torchrl, psutil\n{WITHOUT}{code}", tmp_path).startswith("inside ")


def test_interrupts_are_deferred_without_a_mask(tmp_path) -> None:
    code = """
from mtrl_vec.processes import deferred_interrupts
try:
    with deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        print("still inside")
except KeyboardInterrupt:
    print("interrupted")
"""
    assert python(f"import torch\n{WITHOUT}{code}", tmp_path).split("\n")[:2] == ["still inside", "interrupted"]


def test_an_interrupt_just_before_interrupts_are_deferred(tmp_path) -> None:
    """The mask is as before: it is where Python looks for signals that have arrived."""
    code = """
import signal
from mtrl_vec.processes import deferred_interrupts
set_mask = signal.pthread_sigmask
def interrupted(how, which):
    before = set_mask(how, which)
    if how == signal.SIG_BLOCK and which == [signal.SIGINT]:
        raise KeyboardInterrupt
    return before
signal.pthread_sigmask = interrupted
try:
    with deferred_interrupts():
        print("inside")
except KeyboardInterrupt:
    print("interrupted", set_mask(signal.SIG_BLOCK, []))
"""
    assert python(code, tmp_path) == "interrupted set()\n"


def test_messages_where_pipes_have_no_file_descriptors(tmp_path) -> None:
    """The way of Windows, with the connections of this system."""
    code = """
import multiprocessing, pickle, sys, threading
from mtrl_vec.envs import channel
ours, theirs = zip(*[multiprocessing.Pipe() for _ in range(3)])
def answer(connection):
    method, (arguments, _) = connection.recv()
    connection.send((method, arguments))
threads = [threading.Thread(target=answer, args=(connection,)) for connection in theirs]
for thread in threads:
    thread.start()
channel.sys = type("Windows", (), {"platform": "win32"})
channel.send(ours, channel.call(("a", "b"), 5))
channel.receive(ours)
for thread in threads:
    thread.join(10)
print("answered", any(connection.poll() for connection in ours))
"""
    assert python(code, tmp_path) == "answered False\n"


@pytest.mark.slow
def test_workers_are_spawned_on_macos(tmp_path) -> None:
    (tmp_path / "program.py").write_text("""
import sys
import mujoco, torch, torchrl, metaworld, psutil  # which ask for the system themselves
real, sys.platform = sys.platform, "darwin"
from mtrl_vec import processes
sys.platform = real
from mtrl_vec import make_env
if __name__ == "__main__":
    env = make_env(["reach"], num_envs=2, num_workers=1)
    print(processes.START_METHOD, env.rollout(2)["next", "reward"].shape[:2])
    env.close()
""")
    result = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.stdout == "spawn torch.Size([1, 2])\n", result.stderr[-3000:]
