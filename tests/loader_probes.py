"""Data sets whose items say or do something to the loader process that prepares them."""

from __future__ import annotations

import gc
import os
import signal
import struct
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.utils.data import Dataset

from vembed_ds.data.dataset import Sample
from vembed_ds.errors import VembedError

LOCK = threading.Lock()


def say(value: int) -> Sample:
    return Sample(value, {}, {})


class Probe(Dataset[Sample | VembedError]):
    """Every item calls ``action``, one of the functions below, when its row is ``at``."""

    def __init__(self, action: str, *, at: int = 0) -> None:
        self.action, self.at = action, at

    def __getitem__(self, row: int) -> Sample | VembedError:
        if row != self.at:
            return say(row)
        return ACTIONS[self.action]()


def threads() -> Sample:
    return say(torch.get_num_threads() * 10 + (os.environ["TOKENIZERS_PARALLELISM"] == "false"))


def parent() -> Sample:
    return say(os.getppid())


def pid() -> Sample:
    return say(os.getpid())


def take_lock() -> Sample:
    with LOCK:
        return say(7)


def is_folder_here() -> Sample:
    return say(int(Path("only-here").exists()))


def fail() -> Sample:
    raise ZeroDivisionError("a defect of ours")


def die() -> Sample:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def leave() -> Sample:
    os._exit(3)


def stop() -> Sample:
    os.kill(os.getpid(), signal.SIGSTOP)
    raise AssertionError


def sleep() -> Sample:
    time.sleep(600)
    raise AssertionError


def half_an_answer() -> None:
    """Writes the head of a message and not its end, as a worker killed in between does."""
    connection = next(found for found in gc.get_objects() if isinstance(found, Connection))
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"half")


def die_while_answering() -> Sample:
    half_an_answer()
    return die()


def stop_while_answering() -> Sample:
    half_an_answer()
    return stop()


ACTIONS = {
    action.__name__: action
    for action in (
        threads,
        parent,
        pid,
        take_lock,
        is_folder_here,
        fail,
        die,
        leave,
        stop,
        sleep,
        die_while_answering,
        stop_while_answering,
    )
}
