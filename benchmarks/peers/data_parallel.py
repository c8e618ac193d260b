"""Plain PyTorch on several ranks: DDP, and FSDP2 with and without its flags for accumulation."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.meter import Meter
from benchmarks.peers.encoder import PairEncoder, load_encoder
from benchmarks.peers.job import Job
from benchmarks.peers.plain import Batch, Loss, cached_gradient, drive, loss_of


def ddp(job: Job, meter: Meter) -> None:
    """The whole graph under DDP."""
    model = DistributedDataParallel(PairEncoder(load_encoder(job)))
    loss_function = distributed_loss(job)

    def gradient(batch: Batch) -> Tensor:
        loss = loss_function(*model(**batch))
        loss.backward()
        return loss.detach()

    drive(job, meter, model, gradient)


def fsdp2(job: Job, meter: Meter) -> None:
    """Gradient caching on FSDP2, every layer a group; reduces at the last chunk.

    Option ``gather_once``: parameters stay whole from the first forward pass of the step to its last
    backward pass (``reshard_after_forward=False``, ``set_reshard_after_backward``).
    """
    once = bool(job.options.get("gather_once"))
    encoder = load_encoder(job)
    for layer in encoder.backbone.encoder.layer:
        fully_shard(layer, reshard_after_forward=not once)
    model = fully_shard(encoder, reshard_after_forward=not once)
    loss_function = distributed_loss(job)

    def backward(surrogate: Tensor, last: bool) -> None:
        model.set_requires_gradient_sync(last)
        if once:
            model.set_reshard_after_backward(last)
        surrogate.backward()

    assert isinstance(model, FSDPModule)
    gradient = partial(
        cached_gradient,
        model,
        chunk=job.task.chunk,
        loss_function=loss_function,
        backward=backward,
    )
    drive(job, meter, model, gradient)


def distributed_loss(job: Job) -> Loss:
    """This rank's queries against the positives of all, gathered with gradient."""
    return loss_of(job, gather=gather_rows, rank=dist.get_rank())


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows; their gradient is the sum over the ranks."""
    return torch.cat(dist.nn.functional.all_gather(rows))
