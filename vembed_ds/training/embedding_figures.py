"""What the embeddings of a step look like, of a sample that is looked at on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vembed_ds.losses import SAMPLE
from vembed_ds.similarity import Embeddings, unit_length

ROLES = ("query", "positive")
UNIFORMITY = "embeddings/uniformity"


class EmbeddingSample:
    """The first pairs of a rank's batch, on the device; nothing is computed yet. Local.

    Args:
        rows: Of the batch, by role.
        num_layers: That the embeddings hold side by side; the last one is taken.
    """

    def __init__(self, rows: Mapping[str, Embeddings], *, num_layers: int = 1) -> None:
        self._rows = {role: _first(rows[role], num_layers) for role in ROLES}

    def figures(self) -> dict[str, float]:
        """Of this rank; all but the uniformity, which :func:`finished` completes, are means. Local.

        In float64 on the host. Token embeddings count in ``norm`` one by one; else an item's vector
        is the mean of its tokens of length 1.
        """
        found: dict[str, float] = {}
        units: dict[str, Tensor] = {}
        for role, rows in self._rows.items():
            values = rows.values.cpu().double()
            mask = None if rows.mask is None else rows.mask.cpu()
            real = values if mask is None else values[mask]
            found[f"embeddings/{role}_norm"] = float(real.norm(dim=-1).mean())
            units[role] = unit_length(_item_vectors(values, mask))
            found[f"embeddings/{role}_effective_rank"] = effective_rank(units[role])
        distance = (units["query"] - units["positive"]).square().sum(dim=1)
        found["embeddings/alignment"] = float(distance.mean())
        if len(distance) > 1:
            for role in ROLES:
                found[f"embeddings/{role}_mean_cosine"] = _mean_of_pairs(_cosines(units[role]))
            kernels = [(4 * _cosines(units[role]) - 4).exp() for role in ROLES]
            for role, kernel in zip(ROLES, kernels, strict=True):
                found[f"{UNIFORMITY}_{role}"] = _mean_of_pairs(kernel)
        return found


def finished(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures of a log line, from their means over the ranks.

    The uniformity of a role is the logarithm of a mean over pairs, which must be taken last.
    """
    found = dict(figures)
    kernels = [
        found.pop(f"{UNIFORMITY}_{role}") for role in ROLES if f"{UNIFORMITY}_{role}" in found
    ]
    if kernels:
        logarithms = [math.log(kernel) if kernel > 0 else math.nan for kernel in kernels]
        found[UNIFORMITY] = sum(logarithms) / len(logarithms)
    return found


def effective_rank(units: Tensor) -> float:
    """``exp(-sum_k p_k log p_k)`` of the singular values, each as a share of their sum.

    Roy and Vetterli 2007; of embeddings: RankMe, Garrido et al. 2023, arXiv 2210.02885, eq. 1. 1: all lie
    on one line; at most the smaller of n and D.

    Args:
        units: ``[n, D]`` float64 on the host, unit length, not centred.
    """
    if not bool(units.isfinite().all()):
        return math.nan
    gram = units @ units.T if len(units) <= units.shape[1] else units.T @ units
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def _first(rows: Embeddings, num_layers: int) -> Embeddings:
    width = rows.width
    some = rows.rows(slice(SAMPLE)).dims(width - width // num_layers, width)
    # Of memory of their own: the whole batch is to be freed.
    mask = None if some.mask is None else some.mask.clone()
    return Embeddings(some.values.detach().clone(), mask)


def _item_vectors(values: Tensor, mask: Tensor | None) -> Tensor:
    """``[n, D]``."""
    if mask is None:
        return values
    tokens = unit_length(values.masked_fill(~mask.unsqueeze(-1), 0.0))
    return tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _cosines(units: Tensor) -> Tensor:
    return units @ units.T


def _mean_of_pairs(values: Tensor) -> float:
    """Mean over all pairs of different items."""
    number = len(values)
    return float((values.sum() - values.diagonal().sum()) / (number * (number - 1)))
