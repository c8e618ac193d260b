"""What reaches the loss of a batch: every field in its place."""

from __future__ import annotations

import torch

from vembed_ds.data.collators import Batch
from vembed_ds.similarity import Embeddings
from vembed_ds.training.loss_inputs import loss_inputs


def test_every_field_is_passed_on() -> None:
    batch = Batch(
        indices=[4, 7],
        keys={"query": [-1, 2], "positive": [3, 4], "negative": [5, 6, 2**62]},
        negative_counts=[1, 2],
        labels=[8, -9],
        scores=[0.5, 0.25],
    )
    rows = {
        role: Embeddings(torch.randn(number, 3))
        for role, number in (("query", 2), ("positive", 2), ("negative", 3))
    }
    learned = {"logit_scale": torch.tensor([1.0]), "logit_bias": torch.tensor([2.0])}
    found = loss_inputs(batch, rows, learned)
    assert (found.query, found.positive, found.negative) == tuple(rows.values())
    expected = {
        "negative_counts": [1, 2],
        "labels": [8, -9],
        "query_keys": [-1, 2],
        "positive_keys": [3, 4],
        "negative_keys": [5, 6, 2**62],
    }
    for name, values in expected.items():
        assert getattr(found, name).tolist() == values
        assert getattr(found, name).dtype == torch.int64
    assert found.scores is not None
    assert found.scores.tolist() == [0.5, 0.25]
    assert found.scores.dtype == torch.float64
    assert found.logit_scale is learned["logit_scale"]
    assert found.logit_bias is learned["logit_bias"]


def test_what_the_data_lacks_is_none() -> None:
    rows = {role: Embeddings(torch.randn(2, 3)) for role in ("query", "positive")}
    # Not even a cached teacher of that name is taken for a guide.
    found = loss_inputs(Batch(indices=[0, 1], vectors={"guide": rows}), rows, {})
    for name in ("negative", "negative_counts", "labels", "scores", "guide", "logit_scale"):
        assert getattr(found, name) is None
