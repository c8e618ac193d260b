"""What a rank of a test world trains with compiled backbones."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from tests.distributed.train_cases import run_train
from vembed_ds.models import compiled
from vembed_ds.training import compiling


def run_compiled(*, backend: str | None, **options: Any) -> dict[str, Any]:
    """:func:`run_train`, and how many graphs were compiled.

    ``backend`` is dynamo's; ``None``: nothing is compiled, and texts are padded to the same lengths.
    """
    torch._dynamo.reset()
    counters.clear()
    with (
        mock.patch.object(compiled, "BACKEND", backend),
        mock.patch.object(
            compiling, "compile_in_place", _leave if backend is None else compiled.compile_in_place
        ),
    ):
        result = run_train(**options)
    return result | {"graphs": counters["stats"]["unique_graphs"]}


def _leave(modules: Collection[Any], *, num_lengths: int) -> None:
    """Nothing."""
