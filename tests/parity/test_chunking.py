"""Chunks by length, and equal items encoded once: the update is that of the plain whole batch.

Lengths that differ much between the ranks are a kind of `test_step_matrix`. Here: that its ranks
really would make unequal chunks, and batches with repeated items, which the reference embeds each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.conftest import ds_config
from tests.parity.data import GLOBAL_BATCH, REPEATED, make_batch
from tests.parity.test_step_matrix import CHUNKS, STAGES, check
from tests.thinning import one_in
from tests.worlds import World
from vembed_ds.data.batches import lay_out
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.processors import EncodedItem

ITEMS = GLOBAL_BATCH  # of a rank of two: a query and a positive of every second record
DISTINCT = 7  # of them
STEPS = 3

pytestmark = [pytest.mark.parity]


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("chunk", ["many", "uneven"])
def test_ranks_of_other_lengths_would_make_other_chunks(chunk: str, step: int) -> None:
    records = make_batch("lengths", step)
    counts = []
    for share in (records[: GLOBAL_BATCH // 2], records[GLOBAL_BATCH // 2 :]):
        items = [i for r in share for i in (r["query"], r["positive"], *r["negatives"])]
        roles = {"all": [EncodedItem(*item) for item in items]}
        layout = lay_out(roles, budget=ChunkBudget(CHUNKS[chunk]))
        counts += layout.count_chunks(["text"])
    assert counts[0] > counts[1]


def run(
    world: World, folder: Path, *, kind: str, stage: int, chunk: str, **changes: Any
) -> list[dict[str, Any]]:
    return world.run(
        "tests.parity.cases:train",
        folder=str(folder),
        kind=kind,
        ds_config=ds_config(stage, 2),
        steps=STEPS,
        chunk_size=CHUNKS[chunk],
        bidirectional=True,
        temperature=0.1,
        merge=True,
        **changes,
    )


@pytest.mark.parametrize(("kind", "stage", "chunk"), one_in(3, REPEATED, STAGES, CHUNKS))
def test_equal_items_are_embedded_once(
    world: Callable[[int], World],
    folders: dict[float, Path],
    reference: Callable[..., Any],
    kind: str,
    stage: int,
    chunk: str,
) -> None:
    results = run(world(2), folders[0.0], kind=kind, stage=stage, chunk=chunk)
    check(reference(kind), results)
    if chunk == "one":  # and so nothing is embedded a second time
        assert [result["rows"] for result in results] == [[DISTINCT] * STEPS] * 2


@pytest.mark.parametrize(("kind", "stage", "chunk"), one_in(2, REPEATED, STAGES, ["one", "uneven"]))
def test_with_dropout_every_copy_has_a_mask_of_its_own(
    world: Callable[[int], World],
    folders: dict[float, Path],
    reference: Callable[..., Any],
    kind: str,
    stage: int,
    chunk: str,
) -> None:
    results = run(world(2), folders[0.2], kind=kind, stage=stage, chunk=chunk)
    plan = (2, CHUNKS[chunk] or 2 * GLOBAL_BATCH)
    check(reference(kind, dropout=0.2, dropout_plan=plan), results)
    if chunk == "one":
        assert [result["rows"] for result in results] == [[ITEMS] * STEPS] * 2
