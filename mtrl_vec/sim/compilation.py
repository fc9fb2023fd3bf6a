"""Compiling physics models, and keeping compiled ones: Meta-World's fifty tasks have 33, a sixth of a second each."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

import mujoco
from metaworld.asset_path_utils import full_V3_path_for

from mtrl_vec.errors import InputError

CACHE_VARIABLE = "MTRL_VEC_CACHE"
"""Environment variable with the folder for compiled models; empty for none. By default ``~/.cache/mtrl_vec``."""

# The weld between mocap body and hand, as `SawyerMocapBase.reset_mocap_welds` sets it.
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
    model.eq_data[model.eq_type == mujoco.mjtEq.mjEQ_WELD] = _WELD
    return model


def _compile(model_file: str, visual: bool, keep_geoms: Collection[str]) -> mujoco.MjModel:
    path = model_file if Path(model_file).is_absolute() else full_V3_path_for(model_file)
    try:
        spec = mujoco.MjSpec.from_file(path)
        spec.compiler.discardvisual = not visual
        there = {geom.name for geom in spec.geoms}
        for name in sorted(
            there.intersection(keep_geoms)
        ):  # a tuple that names a geom keeps it, at no cost while simulating
            keep = spec.add_tuple()
            keep.name = f"keep_{name}"
            keep.objtype, keep.objname, keep.objprm = [mujoco.mjtObj.mjOBJ_GEOM], [name], [0.0]
        return spec.compile()
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"model {model_file} does not compile: {str(error).strip().splitlines()[0]}") from error


def _load_or_compile(model_file: str, keep_geoms: Collection[str]) -> mujoco.MjModel:
    file = _cache_file(model_file, keep_geoms)
    if file is not None and file.exists():
        with contextlib.suppress(ValueError):  # damaged
            return mujoco.MjModel.from_binary_path(str(file))
    model = _compile(model_file, False, keep_geoms)
    if file is not None:
        with contextlib.suppress(OSError):  # a cache is not worth failing for
            _save(model, file)
    return model


def _save(model: mujoco.MjModel, file: Path) -> None:
    """Write a model so that other processes see all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        part = Path(folder, file.name)
        mujoco.mj_saveModel(model, str(part))
        part.replace(file)


def _cache_file(model_file: str, keep_geoms: Collection[str]) -> Path | None:
    given = os.environ.get(CACHE_VARIABLE)
    if given == "":
        return None
    try:
        folder = Path(given) if given else Path.home() / ".cache" / "mtrl_vec"
    except RuntimeError:  # there is no home
        return None
    what = f"{Path(full_V3_path_for(model_file)).resolve()} {version('metaworld')} {sorted(keep_geoms)}"
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    return folder / f"mujoco-{mujoco.__version__}" / f"{Path(model_file).stem}-{key}.mjb"
