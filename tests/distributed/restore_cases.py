"""A run that is saved and goes on, and runs of any topology that go on from what it saved."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

from tests.parity import cases, lora_cases
from tests.worlds import set_fp16_support
from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.checkpointing.frozen import keep_frozen_weights, link_frozen_weights
from vembed_ds.checkpointing.layouts import WEIGHT
from vembed_ds.checkpointing.restore import load_checkpoint
from vembed_ds.checkpointing.saving import save_checkpoint
from vembed_ds.checkpointing.shards import CheckpointReader, open_checkpoint
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.distributed import comm
from vembed_ds.engine.initialize import initialize_engine
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.engine.schedules import build_schedule
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.models.embedding_model import EmbeddingModel

BEFORE, AFTER, CHUNK = 2, 2, 5
SEED = 11


def save(
    *, folder: str, kind: str, ds_config: dict[str, Any], out: str, fused: bool = False
) -> dict[str, Any]:
    """Train, save, and train on: what an uninterrupted run has."""
    engine, model = _start(folder, kind, ds_config, out=out, fused=fused)
    torch.manual_seed(comm.rank())
    np.random.seed(comm.rank())
    scale = engine.loss_scale
    _train(engine, model, kind, range(BEFORE))
    place = _save(engine, model, Path(out))
    found = {
        "place": str(place),
        "scales": [scale, engine.loss_scale],
        "state": read_state(open_checkpoint(place)),
    }
    found |= _go_on(engine, model, kind, out=Path(out) / "end")
    engine.engine.destroy()
    return found


def resume(
    *,
    folder: str,
    kind: str,
    ds_config: dict[str, Any],
    place: str,
    out: str,
    perturb: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Make another engine, load, say what it has, and train on."""
    engine, model = _start(folder, kind, ds_config, perturb=perturb, **changes)
    with _Messages() as messages:
        load_checkpoint(engine.engine, Path(place), seed=SEED)
    found: dict[str, Any] = {
        "messages": messages.lines,
        "rate": engine.learning_rate(),
        "scale": engine.loss_scale,
        "random": [torch.initial_seed(), *map(int, np.random.get_state()[1][:4])],
        "gathered": sum(p.numel() for p in model.parameters()) if engine.zero_stage == 3 else 0,
    }
    copy = _save(engine, model, Path(out) / "copy")
    found["state"] = read_state(open_checkpoint(copy))
    found |= _go_on(engine, model, kind, out=Path(out) / "end")
    engine.engine.destroy()
    return found


def refuse(
    *, folder: str, kind: str, ds_config: dict[str, Any], places: list[str], **changes: Any
) -> list[str]:
    """What loading says of checkpoints that it does not take."""
    engine, _ = _start(folder, kind, ds_config, **changes)
    messages = []
    for place in places:
        try:
            load_checkpoint(engine.engine, Path(place))
            messages.append("")
        except Exception as error:  # noqa: BLE001 (the test sees which)
            messages.append(f"{type(error).__name__}: {error}")
    engine.engine.destroy()
    return messages


def read_state(reader: CheckpointReader) -> dict[str, Any]:
    """Every value of a checkpoint, by name and kind, and what it counts."""
    trained = reader.trained
    values = {(name, WEIGHT): reader.weight(name) for name in reader.names()}
    for name, shape in trained.items():
        for kind in reader.optimizer.kinds:
            values[name, kind] = reader.read(name, kind, 0, shape.numel()).view(shape)
    counted = {"step": reader.optimizer.step, **reader.counters, **(reader.schedule or {})}
    return {"values": values, "counted": counted, "trained": sorted(trained)}


def _start(
    folder: str,
    kind: str,
    ds_config: dict[str, Any],
    *,
    out: str | None = None,
    perturb: bool = False,
    schedule: bool = True,
    freeze: str | None = None,
    fused: bool = False,
) -> tuple[TrainEngine, EmbeddingModel]:
    if ds_config["fp16"]["enabled"]:
        set_fp16_support(True)
    model = _make_model(Path(folder), kind)
    for name, parameter in model.named_parameters():
        if freeze and freeze in name:
            parameter.requires_grad_(False)
        if perturb and parameter.is_floating_point():  # whatever is not loaded would show
            parameter.data.add_(0.05)
    if out is not None and ds_config["bf16"]["enabled"]:
        if comm.is_main():
            Path(out).mkdir(parents=True)
        keep_frozen_weights(model, Path(out))
    # DeepSpeed flattens the masters of a fused Adam, and its own needs a GPU.
    fusing = mock.patch("deepspeed.runtime.engine.FusedAdam", torch.optim.AdamW)
    with fusing if fused else nullcontext():
        engine = _make_engine(model, ds_config, schedule=schedule)
    assert isinstance(engine.engine.optimizer, FP16_Optimizer) == fused
    model.train()
    return engine, model


def _make_engine(
    model: EmbeddingModel, ds_config: dict[str, Any], *, schedule: bool
) -> TrainEngine:
    return initialize_engine(
        model,
        ds_config=ds_config,
        param_groups=build_param_groups(model, weight_decay=0.1),
        schedule=build_schedule("cosine", num_steps=10, warmup_steps=1, warmup_ratio=0.0)
        if schedule
        else None,
    )


def _make_model(folder: Path, kind: str) -> EmbeddingModel:
    if kind in ("lora", "qlora"):
        return lora_cases.make_model(folder, "clip", variant=kind, dropout=0.0)
    if kind == "tied":
        model = cases.make_model(folder, kind="shared", temperature=0.1)
        layers = model.encoder.towers["text"].backbone.encoder.layer
        layers[1].output.dense.weight = layers[0].output.dense.weight
        return model
    return cases.make_model(folder, kind=kind, temperature=0.1)


def _train(engine: TrainEngine, model: EmbeddingModel, kind: str, steps: range) -> list[float]:
    data_kind = {"lora": "clip", "qlora": "clip", "tied": "shared"}.get(kind, kind)
    losses = []
    for step in steps:
        losses.append(cases.train_step(engine, model, data_kind, step, CHUNK, True, 0.1))
        engine.step()
    return losses


def _go_on(engine: TrainEngine, model: EmbeddingModel, kind: str, *, out: Path) -> dict[str, Any]:
    losses = _train(engine, model, kind, range(BEFORE, BEFORE + AFTER))
    end = _save(engine, model, out)
    return {"losses": losses, "end": read_state(open_checkpoint(end))}


def _save(engine: TrainEngine, model: EmbeddingModel, out: Path) -> Path:
    def describe(place: Path) -> None:
        describe_model(place, model=model, processor=ItemProcessor(), settings={})
        link_frozen_weights(out, place)

    comm.run_together(lambda: out.mkdir(parents=True, exist_ok=True), doing="making")
    return save_checkpoint(
        engine.engine,
        output_dir=out,
        step=int(engine.engine.global_steps),
        state={},
        describe=describe,
    )


class _Messages(logging.Handler):
    """What this rank logs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _Messages:
        logging.getLogger("vembed_ds").addHandler(self)
        logging.getLogger("vembed_ds").setLevel(logging.INFO)
        return self

    def __exit__(self, *error: Any) -> None:
        logging.getLogger("vembed_ds").removeHandler(self)
