"""Gradient caching on a DeepSpeed engine as one would write it: a backward pass for each chunk.

At ZeRO-1 and 2 every one of them is a boundary of accumulation, and the others are lost.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor

from benchmarks.meter import Meter
from benchmarks.peers.data_parallel import distributed_loss
from benchmarks.peers.encoder import PlainEncoder, load_encoder
from benchmarks.peers.job import Job
from benchmarks.peers.plain import Gradient, cached_gradient


def train(job: Job, meter: Meter) -> None:
    """Option: ``stage``."""
    engine = start(job, load_encoder(job))

    def backward(surrogate: Tensor, last: bool) -> None:
        engine.backward(surrogate)

    gradient = partial(
        cached_gradient,
        engine,
        chunk=job.task.chunk,
        loss_function=distributed_loss(job),
        backward=backward,
    )
    drive_engine(job, meter, engine, gradient)


def start(job: Job, encoder: PlainEncoder) -> Any:
    """An engine of ZeRO ``stage`` with torch's AdamW; otherwise DeepSpeed's defaults."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": job.task.pairs_per_rank,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": job.options["stage"]},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(trained, lr=job.task.lr, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=encoder, optimizer=optimizer, config=config)
    return engine


def drive_engine(job: Job, meter: Meter, engine: Any, gradient: Gradient) -> None:
    """Train what an engine wraps on the job's batch."""
    batch = job.batch()
    meter.watch(engine.module)
    engine.train()
    for _ in range(meter.steps):
        with meter.step():
            loss = gradient(batch)
            engine.step()
        meter.tell(loss, engine.get_global_grad_norm())
