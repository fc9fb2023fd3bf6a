"""Short messages to workers and their short answers, over the connections that TorchRL's workers listen to.

`multiprocessing.connection.Connection` takes 16 us for such a message and its answer, which is most of what a step
costs the parent of many workers. The same bytes written to the file descriptor take 7 us.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler

_HEADER = struct.Struct("!i")  # the length of what follows, as `Connection` writes it for up to 2 GB
_ENOUGH = 4096  # bytes, for an answer without a value


def call(method: tuple[str, ...], *arguments: object) -> bytes:
    """What makes a worker of TorchRL call a method of an attribute of its environment."""
    payload = bytes(ForkingPickler.dumps((method, (arguments, {}))))
    return _HEADER.pack(len(payload)) + payload


def send(channels: Sequence[Connection], message: bytes) -> None:
    """Send a `call` to workers. `receive` their answers before sending another.

    Raises:
        OSError: a worker is gone.
    """
    for channel in channels:
        if sys.platform == "win32":  # whose pipes have no file descriptors
            channel.send_bytes(message[_HEADER.size :])
        elif os.write(channel.fileno(), message) != len(message):  # far less than a socket's buffer
            raise OSError("a worker does not read its messages")


def receive(channels: Sequence[Connection]) -> None:
    """Wait until workers have answered; the answers are thrown away.

    Raises:
        OSError, EOFError: a worker is gone.
    """
    for channel in channels:
        if sys.platform == "win32":
            channel.recv_bytes()
            continue
        place = channel.fileno()
        answer = os.read(place, _ENOUGH)
        while answer and len(answer) < _HEADER.size + _HEADER.unpack_from(answer)[0]:
            more = os.read(place, _ENOUGH)
            answer = answer + more if more else b""
        if not answer:
            raise EOFError("a worker has closed its connection")
