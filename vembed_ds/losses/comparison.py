"""Which columns are positives of a row and which are negatives, in every direction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vembed_ds.losses.batch import Columns, GlobalBatch
from vembed_ds.similarity import Embeddings, paired_similarity, similarity

DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
CROSSING = ("query_to_doc", "doc_to_query")
# Similarities of a guide as close as this are equal: rounding depends on how many rows a rank has.
GUIDE_TIE = 1e-6


@dataclass(frozen=True)
class Selection:
    """What makes a column a negative.

    Attributes:
        negatives_scope: Explicit negatives are seen by all queries (``shared``), or by their
            ``own`` only.
        label_mode: Other columns of the row's label are ``multi_positive`` or left out
            (``mask``); ``ignore``: labels are not looked at.
        mask_duplicates: Leave out columns that hold the same as the row's own partner.
        guide_margin: Leave out columns that the guide finds closer than the row's own pair minus
            this.
        guide_margin_type: The margin is ``absolute``, or ``relative`` to the pair's similarity.
    """

    negatives_scope: str = "shared"
    label_mode: str = "ignore"
    mask_duplicates: bool = False
    guide_margin: float = 0.0
    guide_margin_type: str = "absolute"


@dataclass(frozen=True)
class Comparison:
    """B rows of this rank against C columns.

    Attributes:
        similarity: ``[B, C]`` float32.
        positive: ``[B, C]`` bool.
        negative: ``[B, C]`` bool; disjoint from ``positive``. What is neither is left out.
    """

    similarity: Tensor
    positive: Tensor
    negative: Tensor


def compare(
    batch: GlobalBatch,
    direction: str,
    *,
    selection: Selection,
    reduction: str = "mean",
) -> Comparison:
    """Compare this rank's rows with the columns of every rank.

    In the directions query_to_query and doc_to_doc the row's own pair, its explicit negatives
    included, is left out: all other columns are negatives, none is a positive.

    Args:
        batch: The gathered batch.
        direction: One of ``DIRECTIONS``.
        selection: What is a negative.
        reduction: As in :func:`vembed_ds.similarity.similarity`.

    Raises:
        ValueError: Keys, or the guide's vectors of some items, are needed and missing.
    """
    columns, crossing = _columns(batch, direction), direction in CROSSING
    own = columns.owner == batch.index.unsqueeze(1)
    positive = own & ~columns.explicit if crossing else own & False
    negative = ~(positive if crossing else own)
    if selection.negatives_scope == "own":
        negative = negative & (own | ~columns.explicit)
    if batch.labels is not None and selection.label_mode != "ignore":
        same = batch.labels[columns.owner] == batch.labels[batch.index].unsqueeze(1)
        same = same & ~columns.explicit
        negative = negative & ~same
        if selection.label_mode == "multi_positive" and crossing:
            positive = positive | same
    if selection.mask_duplicates:
        negative = negative & ~_holds_the_same(batch, columns)
    if batch.local.guide is not None:
        negative = negative & ~_false_negatives(batch, columns, direction, selection)
    found = _similarity(batch, columns, direction, reduction)
    return Comparison(found, positive=positive, negative=negative)


def _columns(batch: GlobalBatch, direction: str) -> Columns:
    if direction.endswith("_doc"):
        return batch.documents
    assert batch.queries is not None, "the loss did not ask for queries"
    return batch.queries


def _similarity(batch: GlobalBatch, columns: Columns, direction: str, reduction: str) -> Tensor:
    if direction.startswith("query"):
        return similarity(batch.query, columns.items, reduction=reduction)
    # MaxSim is not symmetric: a query's tokens choose among a document's, never the reverse.
    return similarity(columns.items, batch.positive, reduction=reduction).T


def _holds_the_same(batch: GlobalBatch, columns: Columns) -> Tensor:
    """``[B, C]``: the column equals the item of its kind in the row's own pair."""
    local = batch.local
    keys = local.query_keys if columns is batch.queries else local.positive_keys
    if keys is None or columns.keys is None:
        raise ValueError("mask_duplicates needs the content keys of all queries and documents")
    return columns.keys == keys.unsqueeze(1)


def _false_negatives(
    batch: GlobalBatch, columns: Columns, direction: str, selection: Selection
) -> Tensor:
    """``[B, C]``: the guide finds the column closer than the row's own pair.

    GISTEmbed (Solatorio 2024, arXiv 2402.16829, section 3); the margins are those of
    NV-Retriever (Moreira et al. 2024, arXiv 2407.15831, section 4.2).
    """
    guide = batch.local.guide
    if guide is None or columns.guide is None:
        raise ValueError("the guide needs vectors of all queries and documents")
    query, positive = Embeddings(guide.query), Embeddings(guide.positive)
    own = paired_similarity(query, positive)
    margin: Tensor | float = selection.guide_margin
    if selection.guide_margin_type == "relative":
        margin = margin * own.abs()
    rows = query if direction.startswith("query") else positive
    found = similarity(rows, Embeddings(columns.guide))
    return found > (own - margin + GUIDE_TIE).unsqueeze(1)
