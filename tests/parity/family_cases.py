"""What a rank does with a family: three cached steps, then a checkpoint with its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from tests.parity.cases import make_engine, reference_name, whole_parameters
from tests.parity.family_reference import NEGATIVES, RANK_SHARE, TEMPERATURE
from tests.parity.lora_cases import ALPHA, RANK, start_value
from vembed_ds import Encoder
from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.data.batches import StepPlan, plan_step
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.collators import Batch
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.distributed import comm
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.losses import build_loss
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.lora import LoraSpec, add_adapters
from vembed_ds.models.reach import mark_unreached
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import compute_gradient, embed_plan
from vembed_ds.training.loss_inputs import loss_inputs

STREAMS = ("text", "image")


def load_processor(folder: Path, *, composed: bool) -> ItemProcessor:
    """The processor that the project finds in a folder."""
    if not composed:
        return Encoder(folder, device="cpu").processor
    parts = [str(folder / f"{stream}_encoder") for stream in STREAMS]
    return build_item_processor(*parts, max_length=16)


def load_model(folder: Path, *, composed: bool, heads: Mapping[str, Any]) -> EmbeddingModel:
    """The project's model on the weights that the reference has."""
    if not composed:
        return build_model(ModelSpec({"": BackboneSource(name=str(folder))}))
    sources = {s: BackboneSource(name=str(folder / f"{s}_encoder")) for s in STREAMS}
    model = build_model(ModelSpec(sources, projection_dim=12))
    for stream, state in heads.items():
        model.encoder.tower(stream).projection.load_state_dict(state)
    return model


def train(
    *,
    folder: str,
    composed: bool,
    ds_config: dict[str, Any],
    chunk_size: int,
    out: str | None,
    lora: bool = False,
) -> dict[str, Any]:
    """Losses, norms and whole parameters; with ``out`` also a checkpoint and embeddings."""
    saved = torch.load(Path(folder) / "items.pt", weights_only=False)
    torch.manual_seed(1)
    model = load_model(Path(folder), composed=composed, heads=saved["heads"])
    if lora:
        add_started_adapters(model)
    processor = load_processor(Path(folder), composed=composed)
    fillers = {part: processor.filler(part) for part in model.parts}
    mark_unreached(model, {part: processor.pad(part, [item]) for part, item in fillers.items()})
    # At ZeRO-3 each family has to say which modules read which parameters.
    engine = make_engine(model, ds_config=ds_config, modes={"zero3_gather": "per_module"})
    model.train()
    losses, norms = [], []
    for step, counts in zip(saved["steps"], NEGATIVES, strict=True):
        share = _share(step, counts)
        losses.append(_step(engine, model, processor, *share, fillers, chunk_size))
        norms.append(float(engine.step()))
    found = {_name(name, composed=composed): p for name, p in whole_parameters(engine).items()}
    result: dict[str, Any] = {"losses": losses, "norms": norms, "after": found}
    if out is not None:
        result["embeddings"] = _save(engine, model, processor, saved["probe"], Path(out))
    engine.engine.destroy()
    return result


def add_started_adapters(model: EmbeddingModel) -> None:
    """Adapters that begin where the plain ones do."""
    add_adapters(model.trained_backbones(), LoraSpec(r=RANK, alpha=ALPHA, dropout=0.0))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            plain = _name(reference_name(name), composed=False)
            parameter.data.copy_(start_value(plain, parameter.shape))


def _share(
    step: Mapping[str, list[Any]], counts: Sequence[int]
) -> tuple[dict[str, list[EncodedItem]], list[int]]:
    """This rank's items, and how many negatives each of its records has."""
    start = comm.rank() * RANK_SHARE
    mine = slice(start, start + RANK_SHARE)
    before, own = sum(counts[:start]), list(counts[mine])
    places = {"query": mine, "positive": mine, "negative": slice(before, before + sum(own))}
    roles = {
        role: [EncodedItem(*item) for item in items[places[role]]] for role, items in step.items()
    }
    return roles, own


def _plan(
    model: EmbeddingModel,
    roles: Mapping[str, list[EncodedItem]],
    fillers: Mapping[str, EncodedItem],
    chunk_size: int | None,
) -> StepPlan:
    budget = ChunkBudget(chunk_size)
    return plan_step(roles, budget=budget, streams=model.streams, filler=fillers.__getitem__)


def _step(
    engine: TrainEngine,
    model: EmbeddingModel,
    processor: ItemProcessor,
    roles: dict[str, list[EncodedItem]],
    negative_counts: list[int],
    fillers: Mapping[str, EncodedItem],
    chunk_size: int,
) -> float:
    late = next(iter(model.pooling().values())) == "none"
    loss_type = "colbert" if late else "infonce"
    loss = build_loss(loss_type, temperature=TEMPERATURE, loss_bidirectional=True)
    batch = Batch(indices=[], roles=roles, negative_counts=negative_counts)
    result = compute_gradient(
        engine,
        _plan(model, roles, fillers, chunk_size),
        loss_function=lambda rows, learned: loss(loss_inputs(batch, rows, learned)),
        pad=processor.pad,
        trainable=model.trainable,
    )
    return float(comm.mean_over_ranks(result.loss))


def _unit(rows: Embeddings) -> Embeddings:
    return Embeddings(functional.normalize(rows.values, dim=-1), rows.mask)


def _save(
    engine: TrainEngine,
    model: EmbeddingModel,
    processor: ItemProcessor,
    probe: list[Any],
    out: Path,
) -> list[Any]:
    """Write a checkpoint; the trained model's unit embeddings of the probe items."""
    engine.engine.save_checkpoint(str(out), tag="checkpoint-step-3")
    if comm.is_main():
        describe_model(
            out / "checkpoint-step-3" / "model", model=model, processor=processor, settings={}
        )
    model.eval()
    roles = {"probe": [EncodedItem(*item) for item in probe]}
    plan = _plan(model, roles, {}, None)
    rows = _unit(embed_plan(engine, plan, pad=processor.pad)["probe"])
    if rows.mask is None:
        return list(rows.values.cpu().numpy())
    return [v[m].cpu().numpy() for v, m in zip(rows.values, rows.mask, strict=True)]


def _name(name: str, *, composed: bool) -> str:
    """Name of the same parameter in the reference; `whole_parameters` has changed it once."""
    if name.startswith("projections."):
        return name
    kind, stream, rest = name.replace(".default.weight", "").split(".", 2)
    if not composed:
        return f"models.one.{rest}"
    return f"models.{stream}_head.{rest}" if kind == "heads" else f"models.{stream}.{rest}"
