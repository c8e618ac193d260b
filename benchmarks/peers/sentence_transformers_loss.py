"""sentence-transformers' losses alone, in one process: what its Trainer would call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn

from benchmarks.meter import Meter
from benchmarks.peers.job import CPU, Job, Setting
from benchmarks.peers.plain import Batch, drive

BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def build_model(folder: Path, setting: Setting = CPU) -> SentenceTransformer:
    """The mean of a text model's tokens; the losses take cosines."""
    transformer = Transformer(str(folder))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[transformer, pooling], device=setting.device)
    if setting.bf16:  # as accelerate does it for its Trainer
        model.forward = torch.autocast(setting.device, torch.bfloat16)(model.forward)
    return model


def build_loss(job: Job, model: SentenceTransformer, **options: Any) -> nn.Module:
    """Options: ``cached``, ``tokens`` (of a mini-batch)."""
    options |= {"scale": 1 / job.task.temperature, **(BOTH if job.symmetric else {})}
    if not job.options.get("cached"):
        return MultipleNegativesRankingLoss(model, **options)
    return CachedMultipleNegativesRankingLoss(
        model,
        mini_batch_size=job.task.chunk,
        mini_batch_num_tokens=job.options.get("tokens"),
        **options,
    )


def train(job: Job, meter: Meter) -> None:
    """Options as of :func:`build_loss`."""
    model = build_model(job.model, job.setting)
    loss_function = build_loss(job, model)

    def gradient(batch: Batch) -> Tensor:
        loss: Tensor = loss_function([dict(inputs) for inputs in batch.values()], None)
        loss.backward()
        return loss.detach()

    drive(job, meter, model, gradient)
