"""How a prepared part comes from a loader process: large arrays by way of memory that both see.

Through a pipe every byte is copied four times, a quarter of that by the process that trains. Memory
without a name (``memfd``) ends with its last user, however that ends, and is not bounded by the size
of ``/dev/shm``, which containers often make tiny.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

LARGE = 2**13  # bytes of an array; smaller ones are cheaper in the pipe
_ALIGNED = 64  # bytes: torch reads numbers where numpy put them
_MOST_PIECES = 512  # in one call; Linux takes 1024


def send(connection: Connection, value: Any) -> None:
    """Send what :func:`receive` gives on the other side.

    Raises:
        OSError: Nobody listens, or there is no memory.
    """
    pieces: list[memoryview] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        piece = buffer.raw()
        if piece.nbytes < LARGE or not hasattr(os, "memfd_create"):
            return True
        pieces.append(piece)
        return False

    rest = pickle.dumps(value, protocol=5, buffer_callback=stays)
    if not pieces:
        connection.send((rest, []))
        return
    memory = os.memfd_create("vembed_ds part")
    try:
        _write(memory, pieces)
        connection.send((rest, [piece.nbytes for piece in pieces]))
        reduction.send_handle(connection, memory, 0)
    finally:
        os.close(memory)


def receive(connection: Connection) -> Any:
    """What :func:`send` was given; its large arrays are views of one piece of memory.

    Raises:
        EOFError: The other side has ended.
        OSError: Likewise.
    """
    rest, sizes = connection.recv()
    if not sizes:
        return pickle.loads(rest)
    handle = reduction.recv_handle(connection)
    try:
        memory = memoryview(mmap.mmap(handle, sum(map(_room, sizes))))
    finally:
        os.close(handle)
    start, views = 0, []
    for size in sizes:
        views.append(memory[start : start + size])
        start += _room(size)
    return pickle.loads(rest, buffers=views)


def _write(memory: int, pieces: Sequence[memoryview]) -> None:
    """One piece behind the other, each from a multiple of 64 bytes on."""
    parts: list[memoryview | bytes] = []
    for piece in pieces:
        parts += [piece, bytes(_room(piece.nbytes) - piece.nbytes)]
    for first in range(0, len(parts), _MOST_PIECES):
        chosen = [memoryview(part) for part in parts[first : first + _MOST_PIECES]]
        while chosen:
            written = os.writev(memory, chosen)
            while chosen and written >= chosen[0].nbytes:
                written -= chosen.pop(0).nbytes
            if chosen:  # 2 GB at a time, at most
                chosen[0] = chosen[0][written:]


def _room(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
