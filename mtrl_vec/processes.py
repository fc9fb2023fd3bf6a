"""How worker processes start."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
"""How worker processes start. A fork server imports everything once: its copies start in 0.3 s instead of 3.4 s (two
workers on two cores), except for the first time. macOS's libraries do not all survive a fork, and Windows has none."""
LOST = 255
"""Exit code of a worker whose fork server died, so that nobody is left to report the real one."""


def num_ranks() -> int:
    """Number of processes that torchrun has started with this one; 1 if it has not. Others set WORLD_SIZE too."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """A Ctrl-C takes effect at the end of the block, and does not reach processes that are started in it.

    A terminal sends it to every process of the group, but when and how to stop is for the parent to decide. Where
    SIGTERM counts as Ctrl-C, it is deferred too; the new processes handle SIGTERM as usual.
    """
    received = threading.Event()
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows, where new processes have to fend for themselves
    if can_block:
        resource_tracker.ensure_running()  # multiprocessing's helper: starting it later would unblock the signal
    main = threading.current_thread() is threading.main_thread()
    like_ctrl_c = signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)[: 1 + like_ctrl_c]}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, []) if can_block else []
    try:
        if can_block:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # new processes inherit it
        for number in handlers if main else ():  # another thread may receive the signal in spite of the mask
            signal.signal(number, lambda *_: received.set())
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items() if main else ():
            signal.signal(number, handler)
        if received.is_set():  # also where the new processes received it too, and failed to start
            raise KeyboardInterrupt
