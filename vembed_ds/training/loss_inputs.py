"""From a batch and its embeddings to what a loss looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vembed_ds.data.collators import Batch
from vembed_ds.losses import Guide, LossInputs, TeacherScores, TeacherVectors, Watched
from vembed_ds.similarity import Embeddings
from vembed_ds.streams import projection_name

GUIDE = "/guide"  # name of the guide's vectors in a batch; a teacher's name has no slash


def loss_inputs(
    batch: Batch,
    rows: Mapping[str, Embeddings],
    learned: Mapping[str, Tensor],
    *,
    teachers: Sequence[TeacherVectors | TeacherScores] = (),
    step: int = 0,
    watched: Watched | None = None,
) -> LossInputs:
    """This rank's share of the global batch.

    Args:
        batch: The records.
        rows: Embeddings of every role's items, in the order of ``batch``.
        learned: What the loss learns, by name.
        teachers: What every teacher says of the batch.
        step: Optimizer steps already done.
        watched: Where the loss says what is logged of the step; ``None``: it is not logged.
    """
    device = rows["query"].values.device

    def numbers(values: Sequence[float] | None, dtype: torch.dtype = torch.int64) -> Tensor | None:
        if values is None:
            return None
        # Not `device=`: that waits for the accelerator.
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    counts = batch.negative_counts
    return LossInputs(
        query=rows["query"],
        positive=rows["positive"],
        negative=rows.get("negative"),
        negative_counts=None if counts is None else torch.tensor(counts, dtype=torch.int64),
        labels=numbers(batch.labels),
        scores=numbers(batch.scores, torch.float64),
        query_keys=numbers(batch.keys.get("query")),
        positive_keys=numbers(batch.keys.get("positive")),
        negative_keys=numbers(batch.keys.get("negative")),
        guide=_guide(batch, device),
        teachers=tuple(teachers),
        step=step,
        watched=watched,
        projections={
            number: learned[projection_name(number)]
            for number in range(len(teachers))
            if projection_name(number) in learned
        },
        logit_scale=learned.get("logit_scale"),
        logit_bias=learned.get("logit_bias"),
    )


def _guide(batch: Batch, device: torch.device) -> Guide | None:
    if GUIDE not in batch.vectors:
        return None
    found = batch.vectors[GUIDE]
    return Guide(**{role: rows.to(device).values for role, rows in found.items()})
