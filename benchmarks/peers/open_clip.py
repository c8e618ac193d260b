"""open_clip's loss (its file, from where the user has it), and its way of accumulating.

``--accum-freq k``: features of k batches without gradient, then each batch again with it, its
features in the place of the old ones, and the whole loss each time.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.meter import Meter
from benchmarks.peers.encoder import load_encoder
from benchmarks.peers.job import Job
from benchmarks.peers.plain import Batch, cut, drive


def load_loss(file: Path) -> nn.Module:
    """Its ``ClipLoss`` of one process."""
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{file}: no Python file there")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss: nn.Module = module.ClipLoss()
    return loss


def train(job: Job, meter: Meter) -> None:
    """As many batches as there are chunks of queries; the loss has both directions."""
    assert job.code is not None
    encoder = load_encoder(job)
    loss_function = load_loss(job.code)
    scale = torch.tensor(1 / job.task.temperature, device=job.setting.device)

    def gradient(batch: Batch) -> Tensor:
        pairs = list(zip(*(cut(batch[r], job.task.chunk) for r in batch), strict=True))
        with torch.no_grad():
            features = [[encoder(**part) for part in pair] for pair in pairs]
        for number, pair in enumerate(pairs):
            rows = [*features]
            rows[number] = [encoder(**part) for part in pair]
            query, positive = (torch.cat(role) for role in zip(*rows, strict=True))
            loss = loss_function(query, positive, scale)
            loss.backward()
        return loss.detach()

    drive(job, meter, encoder, gradient)
