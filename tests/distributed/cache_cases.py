"""What a rank of a test world does with a table that the ranks fill together."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.distributed.train_cases import listening
from tests.letters import LetterTeacher, keys_of, letter_data
from vembed_ds.config.loading import load_config
from vembed_ds.data.vector_table import SegmentWriter
from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError
from vembed_ds.similarity import Embeddings
from vembed_ds.teachers.cache import ensure_cache
from vembed_ds.teachers.first_epoch import FirstEpoch
from vembed_ds.training.precompute_run import precompute_teachers

IDENTITY = {"weights": "none"}


def fill(*, path: str, folder: str, gives_tokens: bool, full_disk: bool = False) -> dict[str, Any]:
    """Precompute; with ``full_disk`` the last rank cannot write."""
    teacher = LetterTeacher(gives_tokens=gives_tokens)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fails = full_disk and comm.rank() == comm.world_size() - 1
    broken = mock.patch.object(SegmentWriter, "append", side_effect=full)
    with broken if fails else nullcontext():
        try:
            table, embedded = teacher.precompute(letter_data(path), folder=Path(folder))
        except VembedError as error:
            return {"error": str(error)}
    return {
        "embedded": embedded,
        "calls": teacher.calls,
        "segments": table.segments,
    }


# Texts of every rank in every step; a commit after the second.
STEPS = [[["a", "b", "a"], ["b", "c"]], [["c", "d"], ["d", "a"]], [["a", "e"], ["e", "f"]]]


def first_epoch(*, path: str, folder: str, gives_tokens: bool) -> dict[str, Any]:
    """Three steps, of which a run that ends repeats the third; then the rest."""
    epoch = FirstEpoch(ensure_cache(Path(folder), identity=IDENTITY))
    for step in (0, 1):
        _add(epoch, step, gives_tokens)
    epoch.commit()
    _add(epoch, 2, gives_tokens)
    # The run ends here, and a resumed one goes on from the checkpoint.
    epoch = FirstEpoch(ensure_cache(Path(folder), identity=IDENTITY))
    _add(epoch, 2, gives_tokens)
    segments = epoch.commit().segments
    teacher = LetterTeacher(gives_tokens=gives_tokens)
    table, embedded = teacher.precompute(letter_data(path), folder=Path(folder))
    return {"embedded": embedded, "texts": teacher.embedded, "segments": [segments, table.segments]}


def _add(epoch: FirstEpoch, step: int, gives_tokens: bool) -> None:
    """What is stored says who gave it: rank, and 10 * step + place."""
    texts = STEPS[step][comm.rank()]
    values = torch.tensor([[comm.rank(), 10 * step + place] for place in range(len(texts))]).float()
    mask = torch.ones(len(texts), 1, dtype=torch.bool)
    items = Embeddings(values[:, None], mask) if gives_tokens else Embeddings(values)
    epoch.add(keys_of(texts), items)


def precompute(*, config: str) -> dict[str, Any]:
    """How many items each teacher of a configuration has embedded, or what this rank would print."""
    try:
        return dict(precompute_teachers(load_config(Path(config), [])))
    except VembedError as error:
        return {"error": str(error)}


def precompute_dry(*, config: str) -> str:
    """What this rank says of what it would embed."""
    with listening("vembed_ds.training.precompute_run") as said:
        assert precompute_teachers(load_config(Path(config), []), dry_run=True) == {}
        return said.getvalue()
