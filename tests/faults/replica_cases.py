"""What a rank of a test world runs: a few steps, in which one rank's copy of something is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed.train_cases import run_train
from tests.parity.cases import make_engine, make_model, train_step
from vembed_ds.distributed import comm
from vembed_ds.engine.replicas import ReplicaCheck
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import ReplicaError

DAMAGED_RANK = 1
DAMAGED_STEP = 3


def damage(
    *,
    folder: str,
    ds_config: dict[str, Any],
    what: str,
    name: str,
    kind: str = "clip",
    every: int = 1,
) -> str | None:
    """Five steps with a comparison ``every`` so many; the error that ended them."""
    model = make_model(Path(folder), kind=kind, temperature=0.1)
    model.register_buffer("table", torch.arange(4.0))
    # Ranks may differ in what is not saved.
    model.register_buffer("scratch", torch.full((2,), comm.rank()), persistent=False)
    engine = make_engine(model, ds_config=ds_config)
    replicas = ReplicaCheck(engine, every=every)
    if what == "nothing is reduced":
        engine.engine.allreduce_gradients = lambda: None
    model.train()
    error = None
    try:
        for step in range(1, 6):
            train_step(engine, model, kind, step % 3, 3, True, 0.1)
            engine.step()
            if step == DAMAGED_STEP and comm.rank() == DAMAGED_RANK:
                _damage(engine, what=what, name=name)
            replicas.after_step(step)
    except ReplicaError as found:
        error = str(found)
    engine.engine.destroy()
    return error


def train_damaged(*, step: int, **run: Any) -> dict[str, Any]:
    """A whole run in which one rank's temperature is damaged behind a step."""
    plain = TrainEngine.step
    done = 0

    def damaged(self: TrainEngine) -> Tensor | None:
        nonlocal done
        norm = plain(self)
        done += 1
        if done == step and comm.rank() == DAMAGED_RANK:
            _damage(self, what="weight", name="logit_scale")
        return norm

    TrainEngine.step = damaged  # type: ignore[method-assign]
    try:
        return run_train(**run)
    finally:
        TrainEngine.step = plain  # type: ignore[method-assign]


def _damage(engine: TrainEngine, *, what: str, name: str) -> None:
    module, optimizer = engine.module, engine.engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    if what == "rate":
        inner.param_groups[0]["lr"] *= 1.0000001
        return
    if what == "buffer":
        _flip(module.get_buffer(name))
        return
    found = module.get_parameter(name)
    if what == "weight":
        _flip(found.data)
        return
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {p: m for group, own in pairs for p, m in zip(group, own, strict=True)}
        found = masters[found]
    _flip(found.data if what == "master" else inner.state[found]["exp_avg_sq"])


def _flip(tensor: Tensor) -> None:
    """Turn over the lowest bit of the last element."""
    assert tensor.is_contiguous()
    tensor.view(torch.uint8).flatten()[-tensor.element_size()] ^= 1
