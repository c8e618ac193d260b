"""InfoNCE (van den Oord et al. 2018, eq. 4) over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vembed_ds.distributed import comm
from vembed_ds.distributed.gather import gather_rows


def info_nce(
    query_emb: Tensor,
    positive_emb: Tensor,
    *,
    temperature: float,
    logit_scale: Tensor | None = None,
    bidirectional: bool = False,
) -> Tensor:
    """Cross-entropy of each local query against the positives of every rank.

    ``L = -mean_i log( exp(s_ii / t) / sum_j exp(s_ij / t) )``, s the cosine. Bidirectional
    adds the same with the roles exchanged and halves the sum (CLIP, Radford et al. 2021, fig. 3).

    Collective: every rank calls it with equal B. Averaged over ranks, value and parameter
    gradients are those of one process on the whole batch.

    Args:
        query_emb: ``[B, D]`` float32; normalised here.
        positive_emb: ``[B, D]`` float32, row i matches query i.
        temperature: Divides the cosine; > 0. Ignored when ``logit_scale`` is given.
        logit_scale: ``[1]``, log of the inverse temperature, learned; ``exp`` multiplies.
        bidirectional: Also rank the queries of every rank for each local positive.

    Returns:
        Scalar float32, the mean over local rows.

    Raises:
        ValueError: On shape mismatch, naming both shapes.
    """
    if query_emb.shape != positive_emb.shape:
        raise ValueError(
            f"queries {tuple(query_emb.shape)} and positives {tuple(positive_emb.shape)} "
            "must have one shape [B, D]"
        )
    query_BD = functional.normalize(query_emb, dim=-1)
    positive_BD = functional.normalize(positive_emb, dim=-1)
    scale = logit_scale.exp() if logit_scale is not None else 1.0 / temperature
    loss = _rank_columns(query_BD, gather_rows(positive_BD), scale)
    if bidirectional:
        loss = (loss + _rank_columns(positive_BD, gather_rows(query_BD), scale)) / 2
    return loss


def _rank_columns(rows_BD: Tensor, columns_CD: Tensor, scale: Tensor | float) -> Tensor:
    logits_BC = rows_BD @ columns_CD.T * scale
    num_rows = rows_BD.shape[0]
    own = torch.arange(num_rows, device=rows_BD.device) + comm.rank() * num_rows
    return functional.cross_entropy(logits_BC, own)
