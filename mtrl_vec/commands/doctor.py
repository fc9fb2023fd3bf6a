"""The command ``doctor``: what is installed here, what the machine has, and what training would use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from mtrl_vec.commands.arguments import DoctorCommand
from mtrl_vec.commands.output import check_json, write_json
from mtrl_vec.commands.stage import choose_gl
from mtrl_vec.config import TrainConfig
from mtrl_vec.errors import InputError
from mtrl_vec.machine import machine, versions
from mtrl_vec.processes import START_METHOD
from mtrl_vec.sim.compilation import cache_folder
from mtrl_vec.train.resolve import resolve

SHARED_MEMORY = Path("/dev/shm")


def doctor(command: DoctorCommand) -> None:
    """Print what is there and what would be used. Raises InputError where ``--json`` does not work."""
    check_json(command.json)
    found = examine()
    table = Table("", "", show_header=False)
    for values in found.values():
        for name, value in values.items():
            table.add_row(name, str(value), end_section=name == list(values)[-1])
    Console().print(table, markup=False)
    write_json(command.json, found)


def examine() -> dict[str, dict[str, str]]:
    """What is there, in groups: versions, the machine, and what training would use."""
    import mtrl_vec

    installed = {name: version or "not installed" for name, version in versions().items()}
    return {
        "versions": {"mtrl_vec": mtrl_vec.__version__, **installed},
        "machine": _machine(),
        "training": _training(),
    }


def _machine() -> dict[str, str]:
    about = machine()
    memory = {"memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB"}
    if SHARED_MEMORY.is_dir():
        memory["shared memory"] = f"{shutil.disk_usage(SHARED_MEMORY).total / 2**30:.1f} GiB"
    try:
        drawing = choose_gl() or "the system's default"
    except InputError as error:
        drawing = f"does not work ({error})"
    gpu = about["gpu"] or ("none" if torch.version.cuda else "none, and PyTorch is built without CUDA")
    cores = f"{about['cores']} core{'s' if about['cores'] != 1 else ''}"
    return {"processor": f"{about['cpu']}, {cores}", "GPU": str(gpu), **memory, "drawing": drawing}


def _training() -> dict[str, str]:
    config, wanted = resolve(TrainConfig()), os.environ.get("OMP_NUM_THREADS") or "not set"
    folder = cache_folder()
    return {
        "device": config.runtime.device,
        "simulator processes": f"{config.runtime.num_workers}, started by {START_METHOD}",
        "learner threads": f"{torch.get_num_threads()} (OMP_NUM_THREADS is {wanted})",
        "compiled models": "not kept" if folder is None else str(folder),
    }
