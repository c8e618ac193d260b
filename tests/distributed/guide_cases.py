"""What a rank runs to see the guide's vectors on their way into the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

from torch import Tensor

from tests.distributed.train_cases import run_train
from vembed_ds.data.collators import Batch
from vembed_ds.losses import LossInputs
from vembed_ds.similarity import Embeddings
from vembed_ds.training import loop
from vembed_ds.training.loss_inputs import loss_inputs


def run_and_watch(**arguments: Any) -> dict[str, Any]:
    """As ``run_train``; with ``seen``: of every batch the records, and what the loss was given."""
    seen: list[dict[str, Any]] = []

    def watched(
        batch: Batch, rows: Mapping[str, Embeddings], learned: Mapping[str, Tensor], **more: Any
    ) -> LossInputs:
        inputs = loss_inputs(batch, rows, learned, **more)
        guide = inputs.guide
        seen.append(
            {
                "records": batch.indices,
                "counts": batch.negative_counts,
                "rows": {role: found.values.detach().numpy() for role, found in rows.items()},
                "guide": None
                if guide is None
                else {
                    role: getattr(guide, role).numpy()
                    for role in ("query", "positive", "negative")
                    if getattr(guide, role) is not None
                },
            }
        )
        return inputs

    with mock.patch.object(loop, "loss_inputs", watched):
        return {**run_train(**arguments), "seen": seen}
