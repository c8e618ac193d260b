"""What embeddings and loss take is counted by the step's own code, for a world that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from vembed_ds.data.collators import Batch
from vembed_ds.distributed import comm
from vembed_ds.distributed.gather import gather_rows
from vembed_ds.losses import build_loss
from vembed_ds.planning import loss as counted
from vembed_ds.planning.loss import Embedded, LossMemory, loss_memory
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import BatchLoss
from vembed_ds.training.loss_inputs import loss_inputs

PAIRS = Embedded(
    roles={"query": ("text", 1), "positive": ("text", 1)},
    shapes={"text": (64,)},
    learned={},
    dtype=torch.float32,
)


def infonce(**options: Any) -> BatchLoss:
    function = build_loss("infonce", temperature=0.05, **options)

    def loss(rows: Mapping[str, Embeddings], learned: Mapping[str, Tensor]) -> Tensor:
        return function(loss_inputs(Batch(indices=[]), rows, learned))

    return loss


def test_a_pretended_world() -> None:
    with comm.pretend(4):
        assert (comm.world_size(), comm.rank(), comm.is_main()) == (4, 0, True)
        assert comm.all_max([3, 1]) == [3, 1]
        assert comm.all_sum([3, 1]) == [12, 4]
        assert comm.all_gather_ints([3, 1]) == [[3, 1]] * 4
        rows = torch.ones(2, 3, requires_grad=True)
        gathered = gather_rows(rows)
        assert gathered.shape == (8, 3)
        gathered.sum().backward()
        assert rows.grad is not None
        assert rows.grad.eq(4).all()
    assert comm.world_size() == 1


def test_embeddings_and_their_gradient_are_kept() -> None:
    memory = loss_memory(PAIRS, infonce(), batch_size=32, ranks=1, tile_size=512)
    assert memory.kept == 2 * (64 * 64 * 4)
    half = Embedded(PAIRS.roles, PAIRS.shapes, {}, torch.bfloat16)
    assert loss_memory(half, infonce(), batch_size=32, ranks=1, tile_size=512).kept == 64 * 64 * (
        2 + 4
    )


def test_columns_of_all_ranks_count() -> None:
    one, four = (
        loss_memory(PAIRS, infonce(), batch_size=512, ranks=n, tile_size=512).peak for n in (1, 4)
    )
    columns = 512 * 64 * 4
    assert four - one >= 2 * 3 * columns  # gathered, and their gradient


def test_negatives_tokens_and_what_the_loss_learns() -> None:
    def loss(rows: Mapping[str, Embeddings], learned: Mapping[str, Tensor]) -> Tensor:
        function = build_loss("colbert", temperature=0.05)
        batch = Batch(indices=[], negative_counts=[1, 2, 0, 1])
        return function(loss_inputs(batch, rows, learned))

    embedded = Embedded(
        roles={"query": ("text", 1), "positive": ("text", 1), "negative": ("text", 1)},
        shapes={"text": (6, 8)},
        learned={"logit_scale": (1,)},
        dtype=torch.float32,
    )
    memory = loss_memory(embedded, loss, batch_size=4, ranks=2, tile_size=512)
    assert memory.kept == 2 * (12 * 6 * 8 * 4 + 4)


@pytest.mark.parametrize("tile_size", [64, None])
def test_large_batches_and_worlds_lie_on_the_curve_of_small_ones(
    tile_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(batch_size: int, ranks: int) -> LossMemory:
        loss = infonce(tile_size=tile_size)
        return loss_memory(PAIRS, loss, batch_size=batch_size, ranks=ranks, tile_size=tile_size)

    monkeypatch.setattr(counted, "_of_tiles", lambda count, pairs, tile: count(pairs))
    exact = found(256, 8)
    monkeypatch.undo()
    monkeypatch.setattr(counted, "RANKS", (2, 4))
    monkeypatch.setattr(counted, "WHOLE", 8 * 128**2)
    assert found(256, 8).kept == exact.kept
    assert found(256, 8).peak == pytest.approx(exact.peak, rel=0.05)
