"""What a rank does with a teacher: embed the same items sharded and, beside it, whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vembed_ds import Encoder
from vembed_ds.data.batches import count_streams, plan_step
from vembed_ds.data.processors import EncodedItem
from vembed_ds.data.records import Item
from vembed_ds.distributed import comm
from vembed_ds.engine.teacher_config import resolve_teacher_config
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import embed_plan
from vembed_ds.teachers.identity import weights_digest
from vembed_ds.teachers.teacher import Teacher, load_teacher


class Whole:
    """The model on this rank alone, in the place of an engine."""

    device = torch.device("cpu")

    def __init__(self, model: EmbeddingModel) -> None:
        self.model = model

    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return self.model(inputs)


def teacher_config(precision: str = "fp32", **zero: Any) -> dict[str, Any]:
    return resolve_teacher_config(
        {"zero_optimization": {"stage": 3, **zero}},
        origin="teacher.json",
        precision=precision,
        world_size=comm.world_size(),
        device_type="cpu",
        fp16_supported=False,
        bf16_supported=True,
    )


def load(reference: Any, *, precision: str = "fp32", zero: Any = None, **options: Any) -> Teacher:
    config = teacher_config(precision, **(zero or {}))
    return load_teacher(reference, name="teacher", ds_config=config, **options)


def embed(engine: Any, model: EmbeddingModel, processor: Any, items: Sequence[Item]) -> Embeddings:
    """In chunks of two."""
    encoded = [processor.encode(item, origin="test", augment_seed=None) for item in items]
    roles: dict[str, list[EncodedItem]] = {"query": encoded}
    counts = dict(zip(model.streams, count_streams(roles, model.streams), strict=True))
    plan = plan_step(roles, chunk_size=2, counts=counts, fillers={})
    return embed_plan(engine, plan, pad=processor.pad)["query"]


def compare(
    *, folder: str, items: list[Item], precision: str = "fp32", zero: dict[str, Any] | None = None
) -> dict[str, Any]:
    """How far the sharded embeddings are from the whole model's, and what the rank holds."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    whole = Encoder(folder, device="cpu")
    digest = weights_digest(whole.model.state_dict().items())
    for parameter in whole.model.parameters():
        parameter.data = parameter.data.to(dtype)
    teacher = load(folder, precision=precision, zero=zero)
    loaded = teacher.residence()
    expected = embed(Whole(whole.model.eval()), whole.model, whole.processor, items)
    with torch.no_grad():
        got = embed(teacher, teacher.model, teacher.processor, items)
        again = embed(teacher, teacher.model, teacher.processor, items)  # along the recorded trace
    result = {
        "error": float((got.values - expected.values.detach()).abs().max()),
        "again": bool(torch.equal(got.values, again.values)),
        "norm": float(expected.values.norm(dim=-1).mean()),
        "width": (teacher.width, expected.values.shape[-1]),
        "pooling": (teacher.model.pooling(), whole.model.pooling()),
        "digest": (teacher.identity["weights"], digest),
        "identity": dict(teacher.identity),
        "loaded": loaded._asdict(),
        "after": teacher.residence()._asdict(),
        "forwards": teacher.forwards,
    }
    teacher.close()
    return result
