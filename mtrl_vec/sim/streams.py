"""Random streams of the slots, and their states as rows of numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LOW_64_BITS = 2**64 - 1


def slot_streams(seed: int, first_slot: int, num_slots: int) -> list[np.random.Generator]:
    """A stream per slot, which depends on the seed and the slot's global number alone."""
    return [np.random.default_rng((seed, first_slot + i)) for i in range(num_slots)]


def stream_to_row(rng: np.random.Generator) -> NDArray[np.int64]:
    """The state of NumPy's PCG64 as six 64-bit numbers: two of 128 bits each, and half of the last draw."""
    state = rng.bit_generator.state
    words = [word for number in state["state"].values() for word in (number >> 64, number & _LOW_64_BITS)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], dtype=np.uint64).view(np.int64)


def row_to_stream(row: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Set a generator to what `stream_to_row` returned."""
    state_high, state_low, inc_high, inc_low, has_uint32, uinteger = row.view(np.uint64).tolist()
    numbers = {"state": state_high << 64 | state_low, "inc": inc_high << 64 | inc_low}
    state = {"bit_generator": "PCG64", "state": numbers, "has_uint32": has_uint32, "uinteger": uinteger}
    rng.bit_generator.state = state
