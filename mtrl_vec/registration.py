"""Names for ``gymnasium.make_vec``, registered by ``import mtrl_vec``: this has to be light."""

from __future__ import annotations

from typing import NoReturn

import gymnasium

SETS = ("MT3", "MT10", "MT50")
ENTRY_POINT = "mtrl_vec.envs.vector:MetaWorldVectorEnv"


def register_envs() -> None:
    """Register ``mtrl_vec/MT3-v0``, ``mtrl_vec/MT10-v0`` and ``mtrl_vec/MT50-v0``, and ``mtrl_vec/MT1-v0``.

    The last one takes any tasks: ``gymnasium.make_vec("mtrl_vec/MT1-v0", tasks=["push"])``.
    """
    for name in SETS:
        _register(f"{name}-v0", {"tasks": (name,)})
    _register("MT1-v0", {"tasks": ("reach",)})


def _register(name: str, kwargs: dict[str, object]) -> None:
    gymnasium.register(
        f"mtrl_vec/{name}",
        entry_point=_no_single_environment,
        vector_entry_point=ENTRY_POINT,
        kwargs=kwargs,
        disable_env_checker=True,
    )


def _no_single_environment(**_: object) -> NoReturn:
    raise gymnasium.error.Error("mtrl_vec has vector environments only: use gymnasium.make_vec, also for num_envs=1")
