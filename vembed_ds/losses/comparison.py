"""Which columns are positives of a row and which are negatives, in every direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vembed_ds.losses.batch import Columns, GlobalBatch
from vembed_ds.losses.positives import Marked, Positives, own_column
from vembed_ds.losses.similarities import Similarities, similarities
from vembed_ds.similarity import Embeddings, paired_similarity

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
class Choice:
    """What the columns are to the rows, of a tile; what is neither of both is a negative.

    Most tiles have neither, and are known to without looking at them.

    Attributes:
        positive: Where there are positives; ``None``: nowhere.
        left_out: ``[r, c]`` bool, false at positives; ``None``: nothing is.
    """

    positive: Positives | None
    left_out: Tensor | None

    def negative(self, like: Tensor) -> Tensor:
        """``[r, c]`` bool, for similarities of that shape."""
        found = torch.ones_like(like, dtype=torch.bool)
        if self.positive is not None:
            found = self.positive.update(found, torch.zeros_like)
        return found if self.left_out is None else found & ~self.left_out


@dataclass(frozen=True)
class Comparison:
    """B rows of this rank against C columns of every rank, which are looked at a tile at a time.

    Attributes:
        similarities: Of the rows with the columns.
        choose: What the columns ``[c]`` are to the rows ``[r]``.
    """

    similarities: Similarities
    choose: Callable[[slice, slice], Choice]


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
    columns, of_queries = _columns(batch, direction), direction.startswith("query")
    tests: list[Callable[[slice, slice], Tensor]] = []
    if selection.mask_duplicates:
        tests.append(_holds_the_same(batch, columns))
    if batch.local.guide is not None:
        tests.append(_false_negatives(batch, columns, direction, selection))

    def choose(rows: slice, places: slice) -> Choice:
        choice = _by_owner(batch, columns, rows, places, direction, selection)
        left_out = choice.left_out
        for test in tests:
            left_out = _either(left_out, test(rows, places))
        if left_out is not None and choice.positive is not None:
            left_out = choice.positive.update(left_out, torch.zeros_like)
        return replace(choice, left_out=left_out)

    compared = similarities(
        batch.query if of_queries else batch.positive,
        columns.items,
        tile_size=batch.tile_size,
        # MaxSim is not symmetric: a query's tokens choose among a document's, never the reverse.
        columns_choose=not of_queries,
        reduction=reduction,
    )
    return Comparison(compared, choose)


def _by_owner(
    batch: GlobalBatch,
    columns: Columns,
    rows: slice,
    places: slice,
    direction: str,
    selection: Selection,
) -> Choice:
    """By what the pair of a column is to the row's: the same, of one label, another."""
    owner, explicit = columns.owner[places], columns.explicit[places]
    index, crossing = batch.index[rows].unsqueeze(1), direction in CROSSING
    first, last, _ = rows.indices(len(batch.query))
    start, stop, _ = places.indices(len(columns.items))
    # Told without the device: columns are the items of all pairs in order, and behind them the
    # explicit negatives.
    has_own = start < batch.first + last and batch.first + first < stop
    has_explicit = stop > batch.num_pairs
    positive: Positives | None = None
    left_out = None
    if crossing and has_own:
        positive = own_column(batch.index[rows], start, stop)
    if not crossing and (has_own or has_explicit):
        left_out = owner == index
    if selection.negatives_scope == "own" and has_explicit:
        left_out = _either(left_out, explicit & (owner != index))
    if batch.labels is not None and selection.label_mode != "ignore":
        same = (batch.labels[owner] == batch.labels[index]) & ~explicit
        if selection.label_mode == "multi_positive" and crossing:
            positive = Marked(same)  # its own among them
        else:
            left_out = _either(left_out, same)
    return Choice(positive, left_out)


def _either(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one | other


def _columns(batch: GlobalBatch, direction: str) -> Columns:
    if direction.endswith("_doc"):
        return batch.documents
    assert batch.queries is not None, "the loss did not ask for queries"
    return batch.queries


def _holds_the_same(batch: GlobalBatch, columns: Columns) -> Callable[[slice, slice], Tensor]:
    """Whether a column equals the item of its kind in the row's own pair."""
    local = batch.local
    own = local.query_keys if columns is batch.queries else local.positive_keys
    keys = columns.keys
    if own is None or keys is None:
        raise ValueError("mask_duplicates needs the content keys of all queries and documents")
    return lambda rows, places: keys[places] == own[rows].unsqueeze(1)


def _false_negatives(
    batch: GlobalBatch, columns: Columns, direction: str, selection: Selection
) -> Callable[[slice, slice], Tensor]:
    """Whether the guide finds a column closer than the row's own pair.

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
    bound = (own - margin + GUIDE_TIE).unsqueeze(1)
    found = similarities(
        query if direction.startswith("query") else positive,
        Embeddings(columns.guide),
        tile_size=batch.tile_size,
    )
    return lambda rows, places: found.tile(rows, places) > bound[rows]
