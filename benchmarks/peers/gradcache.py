"""luyug/GradCache, and vembed-factory's fork of it, from where the user has them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.meter import Meter
from benchmarks.peers.deepspeed_plain import drive_engine, start
from benchmarks.peers.encoder import load_encoder
from benchmarks.peers.job import Job
from benchmarks.peers.plain import Batch, Loss, drive, loss_of

LUYUG, VEMBED = "src/grad_cache", "vembed/grad_cache"


def luyug(job: Job, meter: Meter) -> None:
    """As :func:`_train`."""
    _train(job, meter, LUYUG)


def vembed(job: Job, meter: Meter) -> None:
    """As :func:`_train`."""
    _train(job, meter, VEMBED)


def _train(job: Job, meter: Meter, package: str) -> None:
    """Options: ``chunk``; ``ddp``, ``reduce_last`` (its ``no_sync_except_last``); or ``stage`` of DeepSpeed."""
    assert job.code is not None
    model: Any = load_encoder(job)
    if job.options.get("ddp"):
        model = DistributedDataParallel(model)
    if "stage" in job.options:
        model = start(job, model)
    arguments = {"no_sync_except_last": True} if job.options.get("reduce_last") else {}
    chunk = job.options.get("chunk", job.task.chunk)
    cache = _load(job.code / package).GradCache(
        models=[model, model], chunk_sizes=chunk, loss_fn=_loss(job)
    )

    def gradient(batch: Batch) -> Tensor:
        loss: Tensor = cache(batch["query"], batch["positive"], **arguments)
        return loss / dist.get_world_size()

    (drive_engine if "stage" in job.options else drive)(job, meter, model, gradient)


def _loss(job: Job) -> Loss:
    """Of the whole batch on every rank: its DistributedContrastiveLoss, times the ranks.

    It gathers without gradient, so that averaging would divide by the ranks once too often.
    """
    whole = loss_of(job)
    ranks = dist.get_world_size()

    def loss(query: Tensor, positive: Tensor) -> Tensor:
        return ranks * whole(_gather(query), _gather(positive))

    return loss


def _gather(rows: Tensor) -> Tensor:
    found = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(found, rows)
    found[dist.get_rank()] = rows
    return torch.cat(found)


def _load(package: Path) -> ModuleType:
    """The package in a folder, without the one around it, which needs more."""
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{package}: no package there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[package.name] = module
    spec.loader.exec_module(module)
    return module
