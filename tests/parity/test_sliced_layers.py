"""I1 where every layer takes the whole batch, a slice at a time, before the next one does.

Without dropout, because slices draw other random numbers than whole layers; that they draw the same
twice, and every family, is in tests/unit/engine/test_sliced_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.conftest import MODES, ds_config, update_error
from tests.parity.data import FUSED, TEXTS
from tests.parity.test_step_matrix import CHUNKS, KINDS, PRECISIONS, check
from tests.thinning import one_in
from tests.worlds import World

Run = Callable[..., list[dict[str, Any]]]
WAYS: dict[str, tuple[int, dict[str, str]]] = {
    **{f"{stage}": (stage, {}) for stage in (0, 1, 2, 3)},
    **MODES,
}

pytestmark = [pytest.mark.parity]


@pytest.fixture
def run(world: Callable[[int], World], folders: dict[float, Path]) -> Run:
    """``run(way, kind, chunk)``: three steps, two items of a layer at a time."""

    def train(
        way: str, kind: str, chunk: str, *, world_size: int = 2, precision: str = "fp32"
    ) -> list[dict[str, Any]]:
        stage, modes = WAYS[way]
        return world(world_size).run(
            "tests.parity.cases:train",
            folder=str(folders[0.0]),
            kind=kind,
            ds_config=ds_config(stage, world_size, precision=precision),
            steps=3,
            chunk_size=CHUNKS[chunk],
            bidirectional=True,
            temperature=0.1,
            checkpointing="huggingface",
            slice_size=2,
            modes=modes,
        )

    return train


@pytest.mark.parametrize(
    ("kind", "way", "world_size", "chunk"),
    one_in(20, [*KINDS, "mixed", *FUSED, *TEXTS, "patches"], WAYS, [1, 2], ["one", "uneven"]),
)
def test_plain(
    run: Run, reference: Callable[..., Any], kind: str, way: str, world_size: int, chunk: str
) -> None:
    check(reference(kind), run(way, kind, chunk, world_size=world_size))


def test_a_layer_that_one_graph_calls_twice(run: Run, reference: Callable[..., Any]) -> None:
    """Texts alone, and texts with images; DeepSpeed's own reduction of such a layer fails."""
    check(reference("fused clip"), run("3 once, per chunk", "fused clip", "one"))


@pytest.mark.parametrize(("kind", "way"), one_in(4, ["shared", "clip", "skip"], WAYS))
@pytest.mark.one_in(2)
def test_bf16(run: Run, reference: Callable[..., Any], kind: str, way: str) -> None:
    dtype, tolerance, tensor_tolerance = PRECISIONS["bf16"]
    expected = reference(kind, dtype=dtype)
    for result in run(way, kind, "one", precision="bf16"):
        assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        error = update_error(expected, result["after"])
        assert error["whole"] <= tolerance, error
        assert error["worst"] <= tensor_tolerance, error
