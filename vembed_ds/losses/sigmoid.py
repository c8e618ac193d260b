"""SigLIP: every pair is a decision of its own."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vembed_ds.losses.batch import GlobalBatch
from vembed_ds.losses.comparison import Selection, compare


def sigmoid(batch: GlobalBatch, *, selection: Selection) -> Tensor:
    """Sigmoid loss with trained scale and bias (Zhai et al. 2023, arXiv 2303.15343, eq. 1).

    ``L = -(1/B) sum_ij log sigmoid(z_ij (exp(t) s_ij + b))``, z is 1 for positives and -1 for
    negatives, explicit ones included. Columns that are neither have no term.

    Local: the sum over this rank's rows, divided by their number.

    Args:
        batch: The gathered batch, with ``logit_scale`` t and ``logit_bias`` b.
        selection: What is a positive and a negative.

    Returns:
        Scalar float32.

    Raises:
        ValueError: Scale or bias is missing.
    """
    scale, bias = batch.local.logit_scale, batch.local.logit_bias
    if scale is None or bias is None:
        raise ValueError("loss_type=sigmoid needs logit_scale and logit_bias of the model")
    found = compare(batch, "query_to_doc", selection=selection)
    logits = found.similarity * scale.exp() + bias
    signs = found.positive.to(logits.dtype) - found.negative.to(logits.dtype)
    terms = functional.logsigmoid(signs * logits).masked_fill(signs == 0, 0.0)
    return -terms.sum() / len(batch.query)
