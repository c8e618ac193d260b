"""I1 with compiled backbones: the update is that of the plain, uncompiled whole batch.

With dropout: a chunk is embedded twice and must draw the reference's numbers both times. All texts are
padded to one length, in the reference too, which otherwise would draw other masks.
The default suite traces and differentiates as PyTorch's compiler does but leaves code generation out
(``aot_eager``), which takes a minute per model on a CPU; slow cells have it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.parity import data
from tests.parity import reference as plain
from tests.parity.conftest import OPTIMIZER, ds_config, update_error
from tests.parity.test_step_matrix import PRECISIONS, check
from tests.worlds import World

CHUNK = 5
STAGES = [0, 1, 2]
KINDS = ["shared", "composed", "clip"]
DEFAULT = [("composed", 2, 2)]

pytestmark = [pytest.mark.parity]


@pytest.fixture(scope="module")
def padded(folders: dict[float, Path]) -> Callable[..., dict[str, Any]]:
    """``padded(kind, world_size)``: three plain steps with dropout, cached."""

    @functools.cache
    def compute(kind: str, world_size: int) -> dict[str, Any]:
        pad = functools.partial(data.pad, at_least=data.MOST_TOKENS)
        with mock.patch.object(plain, "pad", pad):
            return plain.train_plain(
                folders[0.2],
                kind=kind,
                steps=3,
                optimizer=OPTIMIZER,
                max_grad_norm=0.0,
                bidirectional=True,
                temperature=0.1,
                dropout_plan=(world_size, CHUNK),
            )

    return compute


def run(
    world: World, folder: Path, *, kind: str, stage: int, backend: str, precision: str = "fp32"
) -> list[dict[str, Any]]:
    results = world.run(
        "tests.parity.cases:train",
        folder=str(folder),
        kind=kind,
        ds_config=ds_config(stage, world.size, precision=precision),
        steps=3,
        chunk_size=CHUNK,
        bidirectional=True,
        temperature=0.1,
        backend=backend,
    )
    # One of each tower that embeds without gradient, and one that is differentiated; the attempt.
    assert {result["graphs"] for result in results} == {3 if kind == "shared" else 5}
    return results


@pytest.mark.parametrize(
    ("kind", "stage", "world_size", "backend"),
    [
        *(
            pytest.param(*cell, "aot_eager", marks=[] if cell in DEFAULT else [pytest.mark.slow])
            for cell in product(KINDS, STAGES, [1, 2])
        ),
        *(
            pytest.param(*cell, "inductor", marks=pytest.mark.slow)
            for cell in [("shared", 2, 2), ("clip", 0, 1)]
        ),
    ],
)
def test_compiled(
    world: Callable[[int], World],
    folders: dict[float, Path],
    padded: Callable[..., Any],
    kind: str,
    stage: int,
    world_size: int,
    backend: str,
) -> None:
    results = run(world(world_size), folders[0.2], kind=kind, stage=stage, backend=backend)
    check(padded(kind, world_size), results)


@pytest.mark.slow
def test_16_bit(
    world: Callable[[int], World], folders: dict[float, Path], reference: Callable[..., Any]
) -> None:
    dtype, tolerance, tensor_tolerance = PRECISIONS["bf16"]
    expected = reference("shared", dtype=dtype)
    for result in run(
        world(2), folders[0.0], kind="shared", stage=2, backend="inductor", precision="bf16"
    ):
        assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        error = update_error(expected, result["after"])
        assert error["whole"] <= tolerance, error
        assert error["worst"] <= tensor_tolerance, error
