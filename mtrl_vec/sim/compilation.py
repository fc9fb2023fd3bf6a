"""Compiling physics models, and keeping compiled ones: Meta-World's fifty tasks have 33, a sixth of a second each."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection
from functools import cache
from pathlib import Path

import mujoco
import numpy as np
from metaworld.asset_path_utils import full_V3_path_for

from mtrl_vec.errors import InputError
from mtrl_vec.files import write_atomically

CACHE_VARIABLE = "MTRL_VEC_CACHE"
"""Environment variable with the folder for compiled models; empty for none. By default ``~/.cache/mtrl_vec``."""

_FORMAT = 1  # of what is compiled, to be raised when `_compile` changes
_WELD = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 5.0)


def load_model(model_file: str, visual: bool = False, keep_geoms: Collection[str] = ()) -> mujoco.MjModel:
    """Compile a model, or load it where that has been done before.

    Args:
        model_file: see `mtrl_vec.tasks.task.Task.model_file`.
        visual: keep the visual geometry, for rendering.
        keep_geoms: visual geoms to keep in any case, where there are any of these names. Meta-World observes some of
            them: the door's handle, the mug.

    Raises:
        InputError: the file is missing, or MuJoCo does not compile it.
    """
    if visual or Path(model_file).is_absolute():  # your own model may change, and so may what it includes
        model = _compile(model_file, visual, keep_geoms)
    else:
        model = _load_or_compile(model_file, keep_geoms)
    _set_hand_weld(model)
    return model


def _set_hand_weld(model: mujoco.MjModel) -> None:
    """What ``SawyerMocapBase.reset_mocap_welds`` does: the weld between mocap body and hand."""
    hand = {mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name) for name in ("mocap", "hand")}
    for i in range(model.neq):
        if model.eq_type[i] == mujoco.mjtEq.mjEQ_WELD and {model.eq_obj1id[i], model.eq_obj2id[i]} == hand:
            model.eq_data[i] = _WELD


def _compile(model_file: str, visual: bool, keep_geoms: Collection[str]) -> mujoco.MjModel:
    path = model_file if Path(model_file).is_absolute() else full_V3_path_for(model_file)
    try:
        spec = mujoco.MjSpec.from_file(path)
        spec.compiler.discardvisual = not visual
        there = {geom.name for geom in spec.geoms}
        # A tuple that names a geom keeps it, at no cost while simulating.
        for name in sorted(there.intersection(keep_geoms)):
            keep = spec.add_tuple()
            keep.name = f"keep_{name}"
            keep.objtype, keep.objname, keep.objprm = [mujoco.mjtObj.mjOBJ_GEOM], [name], [0.0]
        return spec.compile()
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"model {model_file} does not compile: {str(error).strip().splitlines()[0]}") from error


def _load_or_compile(model_file: str, keep_geoms: Collection[str]) -> mujoco.MjModel:
    file = _cache_file(model_file, keep_geoms)
    if file is None:
        return _compile(model_file, False, keep_geoms)
    with contextlib.suppress(OSError, ValueError, mujoco.FatalError):  # not there, or damaged
        if file.stat().st_size:
            return mujoco.MjModel.from_binary_path(str(file))
    model = _compile(model_file, False, keep_geoms)
    with contextlib.suppress(OSError):  # a cache is not worth failing for
        file.parent.mkdir(parents=True, exist_ok=True)
        content = np.empty(mujoco.mj_sizeModel(model), dtype=np.uint8)
        mujoco.mj_saveModel(model, None, content)
        write_atomically(file, content.tobytes())
    return model


def cache_folder() -> Path | None:
    """Where compiled models are kept; None if they are not."""
    given = os.environ.get(CACHE_VARIABLE)
    if given == "":
        return None
    try:
        return Path(given) if given else Path.home() / ".cache" / "mtrl_vec"
    except RuntimeError:  # there is no home
        return None


def _cache_file(model_file: str, keep_geoms: Collection[str]) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    what = f"{_FORMAT} {mujoco.__version__} {_assets()} {model_file} {sorted(keep_geoms)}"
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    return folder / f"{Path(model_file).stem}-{key}.mjb"


@cache
def _assets() -> str:
    """What tells Meta-World's models from edited ones: their files, sizes and times."""
    root = Path(full_V3_path_for(""))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    stamps = [(path, path.stat()) for path in files]
    return hashlib.sha256(str([(str(p), s.st_size, s.st_mtime_ns) for p, s in stamps]).encode()).hexdigest()
