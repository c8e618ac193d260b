"""InfoNCE in all its forms, and ColBERT, which is InfoNCE over MaxSim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vembed_ds.losses.batch import GlobalBatch
from vembed_ds.losses.comparison import DIRECTIONS, Comparison, Selection, compare
from vembed_ds.losses.positives import Positives
from vembed_ds.losses.ranking import log_one_plus
from vembed_ds.losses.running import RunningSum
from vembed_ds.losses.tiles import Tile, TileLoss, by_rows, tiled


def info_nce(
    batch: GlobalBatch,
    *,
    temperature: float,
    selection: Selection,
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of each local row against the columns of every rank.

    ``L = mean_i[ log sum_{c in P_i or N_i} exp(s_ic / t) - mean_{p in P_i} s_ip / t ]`` (van den
    Oord et al. 2018, arXiv 1807.03748, eq. 4; several positives: Khosla et al. 2020, arXiv
    2004.11362, eq. 2, without excluding the row itself). ``joint`` takes one sum over the columns
    of all directions (Li et al. 2023, arXiv 2308.03281, eq. 2), ``per_direction`` the mean of a
    loss per direction (CLIP, Radford et al. 2021, fig. 3).

    Local: the mean over this rank's rows.

    Args:
        batch: The gathered batch.
        temperature: Divides similarities; > 0. Unused when the model learns a logit scale.
        selection: What is a positive and a negative.
        directions: Some of ``comparison.DIRECTIONS``; query_to_doc among them.
        partition: ``joint`` or ``per_direction``.
        reduction: MaxSim's, for token embeddings.

    Returns:
        Scalar float32.
    """
    directions = sorted(directions, key=DIRECTIONS.index)  # query_to_doc is the first
    found = [compare(batch, d, selection=selection, reduction=reduction) for d in directions]
    # One process has all pairs as rows: what it searches with documents is in the first matrix.
    mirrored = {"doc_to_query"} if batch.num_pairs == len(batch.query) else set()
    numbered = dict(enumerate(found))
    mean = _Mean([_CrossEntropy({number: own}) for number, own in numbered.items()])
    loss: TileLoss = _CrossEntropy(numbered) if partition == "joint" else mean
    terms = tiled(
        loss,
        [
            None if direction in mirrored else comparison.similarities
            for direction, comparison in zip(directions, found, strict=True)
        ],
        scale=batch.scale(temperature),
    )
    if len(directions) > 1:
        for direction, own_loss in zip(directions, mean.losses, strict=False):
            batch.note(direction, own_loss)
    return terms.mean()


def colbert(batch: GlobalBatch, **options: object) -> Tensor:
    """:func:`info_nce` over MaxSim, with the same options.

    Raises:
        ValueError: The model gives one vector per item.
    """
    if batch.query.mask is None:
        raise ValueError(
            "loss_type=colbert compares token embeddings [n, L, D], but the model gives one vector "
            f"per item, {tuple(batch.query.values.shape)}"
        )
    return info_nce(batch, **options)  # type: ignore[arg-type]


def in_batch_hard(
    batch: GlobalBatch,
    *,
    temperature: float,
    selection: Selection,
    hard_mining_topk: int,
    use_all_negatives: bool = False,
) -> Tensor:
    """InfoNCE against the K closest negatives of each query only.

    In-batch and explicit negatives compete for the K places. A query without any negative
    contributes 0. Local: the mean over this rank's rows.

    Args:
        batch: The gathered batch.
        temperature: As in :func:`info_nce`.
        selection: What is a negative; without ``multi_positive``.
        hard_mining_topk: K; a query with fewer negatives takes them all.
        use_all_negatives: Take all of them anyway.

    Returns:
        Scalar float32.
    """
    found, every = compare(batch, "query_to_doc", selection=selection), slice(None)

    def losses(rows: slice, logits: Tensor) -> Tensor:
        margins = logits - logits.gather(1, batch.index[rows].unsqueeze(1))
        negative = found.choose(rows, every).negative(logits)
        hard = margins.masked_fill(~negative, -torch.inf)
        if not use_all_negatives:
            hard = hard.topk(min(hard_mining_topk, hard.shape[1]), dim=1).values
        return log_one_plus(torch.logsumexp(hard, dim=1))

    return by_rows(found.similarities, losses, scale=batch.scale(temperature)).mean()


class _Mean:
    """The mean of cross-entropies, each over a matrix of its own."""

    def __init__(self, losses: Sequence[_CrossEntropy]) -> None:
        self._losses = losses
        self.losses: list[Tensor] = []
        """Each by itself, once the terms are known."""

    def add(self, tile: Tile) -> None:
        """See :class:`TileLoss`."""
        self._losses[tile.matrix].add(tile)

    def terms(self) -> Tensor:
        """See :class:`TileLoss`."""
        terms = torch.stack([loss.terms() for loss in self._losses])
        self.losses = list(terms.mean(dim=1))
        return terms.mean(dim=0)

    def gradient(self, tile: Tile, outer: Tensor) -> Tensor:
        """See :class:`TileLoss`."""
        return self._losses[tile.matrix].gradient(tile, outer / len(self._losses))


class _CrossEntropy:
    """``log sum_c exp(z_ic) - mean_{p in P_i} z_ip`` of every row i.

    The sum goes over the columns of all comparisons that are not left out, the mean over the
    positives of the first. A small loss is the last digits of a sum: what is not a positive has a
    sum R of its own, all sums are kept in float64, and the gradient at the only positive p of a row
    is ``-R / (R + exp(z_p))``, not 1 less than the quotient.

    Args:
        comparisons: Of the same rows, by the numbers of their matrices; the first has a positive
            in every row.
    """

    def __init__(self, comparisons: Mapping[int, Comparison]) -> None:
        self._comparisons, self._first = comparisons, min(comparisons)
        self._running = RunningSum(("own", "others"), of=comparisons[self._first].similarities)
        self._positives = torch.zeros_like(self._running.sums["own"])  # their number
        self._pull = torch.zeros_like(self._positives)  # sum of z_ip

    def add(self, tile: Tile) -> None:
        """See :class:`TileLoss`."""
        logits, positive = self._compared(tile)
        powers, sums = self._running.rise(tile.rows, logits), self._running.sums
        if positive is not None:
            sums["own"][tile.rows] += positive.sums(powers)
            powers = positive.update(powers, torch.zeros_like)
            self._positives[tile.rows] += positive.count()
            self._pull[tile.rows] += positive.sums(logits)
        sums["others"][tile.rows] += powers.sum(dim=1)

    def terms(self) -> Tensor:
        """See :class:`TileLoss`."""
        own, others = self._running.sums["own"], self._running.sums["others"]
        highest = self._running.highest.squeeze(1).double()
        return highest + (own + others).log() - self._pull / self._positives

    def gradient(self, tile: Tile, outer: Tensor) -> Tensor:
        """See :class:`TileLoss`."""
        logits, positive = self._compared(tile)
        own, others = (self._running.sums[n][tile.rows].unsqueeze(1) for n in ("own", "others"))
        weight = outer / (own + others)
        grad = self._running.powers(tile.rows, logits).mul_(weight.to(logits.dtype))
        if positive is None:
            return grad
        number = self._positives[tile.rows].unsqueeze(1)
        lone, share = (x.to(logits.dtype) for x in (-others * weight, outer / number))
        return positive.update(grad, lambda p: torch.where(number == 1, lone, p - share))

    def _compared(self, tile: Tile) -> tuple[Tensor, Positives | None]:
        """Logits, minus infinity where a column is left out; and what attracts the rows."""
        choice = self._comparisons[tile.matrix].choose(tile.rows, tile.columns)
        logits = tile.logits
        if choice.left_out is not None:
            logits = logits.masked_fill(choice.left_out, -torch.inf)
        return logits, choice.positive if tile.matrix == self._first else None
