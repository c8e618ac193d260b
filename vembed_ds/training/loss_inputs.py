"""From a batch and its embeddings to what a loss looks at."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vembed_ds.data.collators import Batch
from vembed_ds.losses import LossInputs
from vembed_ds.similarity import Embeddings


def loss_inputs(
    batch: Batch, rows: Mapping[str, Embeddings], learned: Mapping[str, Tensor]
) -> LossInputs:
    """This rank's share of the global batch."""
    return LossInputs(rows["query"].values, rows["positive"].values, learned.get("logit_scale"))
