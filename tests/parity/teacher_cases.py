"""What a rank does with a teacher: embed the same items sharded and, beside it, whole."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups
from torch import Tensor
from torch.nn import functional

from tests.worlds import set_fp16_support
from vembed_ds import Encoder
from vembed_ds.data.batches import lay_out
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.distributed import comm
from vembed_ds.engine.teacher_config import resolve_teacher_config
from vembed_ds.engine.teacher_engine import TeacherEngine
from vembed_ds.errors import VembedError
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.hollow import HollowModel
from vembed_ds.steps.gradient_cache import embed_plan
from vembed_ds.teachers.identity import model_digest, weights_digest
from vembed_ds.teachers.teacher import Teacher, load_teacher, shard_weights

M_MMAP_THRESHOLD = -3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Whole:
    """The model on this rank alone, in the place of an engine."""

    device = torch.device("cpu")

    def __init__(self, model: EmbeddingModel) -> None:
        self.model = model.eval()

    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return self.model(inputs)


def teacher_config(precision: str = "fp32", **zero: Any) -> dict[str, Any]:
    return resolve_teacher_config(
        {"zero_optimization": {"stage": 3, **zero}},
        origin="teacher.json",
        precision=precision,
        world_size=comm.world_size(),
        device_type="cpu",
        fp16_supported=True,
        bf16_supported=True,
    )


def load(reference: Any, *, precision: str = "fp32", zero: Any = None, **options: Any) -> Teacher:
    config = teacher_config(precision, **(zero or {}))
    return load_teacher(reference, name="teacher", ds_config=config, **options)


def embed(
    engine: Any, model: EmbeddingModel, processor: ItemProcessor, items: Sequence[Item]
) -> Tensor:
    """Unit rows of the items, in chunks of two."""
    encoded = [processor.encode(item, origin="test", augment_seed=None) for item in items]
    plan = lay_out({"query": encoded}, budget=ChunkBudget(2)).alone()
    rows = embed_plan(engine, plan, pad=processor.pad)["query"]
    return functional.normalize(rows.values.detach(), dim=-1)


def compare(
    *, folder: str, items: list[Item], precision: str = "fp32", zero: dict[str, Any] | None = None
) -> dict[str, Any]:
    """How far the sharded embeddings are from the whole model's, and what the rank holds."""
    set_fp16_support(True)  # else DeepSpeed refuses it on a CPU
    whole = Encoder(folder, device="cpu")
    digest = weights_digest(whole.model.state_dict().items())
    for parameter in whole.model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    torch.manual_seed(3)
    linear, numbers = functional.linear, torch.get_rng_state()
    teacher = load(folder, precision=precision, zero=zero)
    # What the student would notice.
    untouched = (
        functional.linear is linear
        and torch.equal(torch.get_rng_state(), numbers)
        and groups._get_zero_param_intra_parallel_group() is None
    )
    loaded, live = teacher.residence(), watch_live(teacher)
    expected = embed(Whole(whole.model), whole.model, whole.processor, items)
    got = embed(teacher, teacher.model, teacher.processor, items)
    again = embed(teacher, teacher.model, teacher.processor, items)  # along the recorded trace
    result = {
        "error": float((got - expected).abs().max()),
        "repeatable": bool(torch.equal(got, again)),
        "width": (teacher.width, expected.shape[-1]),
        "pooling": (teacher.model.pooling(), whole.model.pooling()),
        "whole digest": digest,
        "model digest": model_digest(whole.model),
        "identity": dict(teacher.identity),
        "instructions": teacher.instructions,
        "untouched": untouched,
        "loaded": loaded._asdict(),
        "after": teacher.residence()._asdict(),
        "most live": max(live),
        "largest module": max(own_elements(teacher.model)),
        "forwards": teacher.forwards,
    }
    teacher.close()
    return result


def watch_live(teacher: Teacher) -> list[int]:
    """Elements of whole parameters, at the start of every module's forward pass from now on."""
    seen: list[int] = []
    for module in teacher.model.modules():
        module.register_forward_pre_hook(lambda *_: seen.append(teacher.residence().live))
    return seen


def own_elements(model: torch.nn.Module) -> list[int]:
    return [sum(p.ds_numel for p in m.parameters(recurse=False)) for m in model.modules()]


def status(key: str) -> float:
    """Megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def reset_peak() -> float:
    """Megabytes that the process holds; from now on ``VmHWM`` is the most since."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def memory(*, folder: str, items: list[Item]) -> dict[str, float]:
    """Megabytes beyond what the process held before."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)  # what is freed goes back to the system
    before = reset_peak()
    teacher = load(folder)
    result = {"loading": status("VmHWM") - before, "loaded": status("VmRSS") - before}
    reset_peak()
    embed(teacher, teacher.model, teacher.processor, items)
    result["forward"] = status("VmHWM") - before
    result["total"] = teacher.residence().total * 4 / 2**20
    result["largest"] = teacher.residence().largest * 4 / 2**20
    teacher.close()
    return result


def failure(*, broken_on: int | None = None, folder: str, **options: Any) -> str:
    """The message of what loading raises; the other ranks have a folder that is whole."""
    broken = broken_on in (None, comm.rank())
    try:
        load(folder if broken else str(Path(folder) / "whole"), **options)
    except VembedError as error:
        return str(error)
    raise AssertionError("it was loaded")


def from_memory(*, folder: str, items: list[Item]) -> dict[str, Any]:
    """A model that is whole on each rank, and one with random weights."""
    whole = Encoder(folder, device="cpu")
    expected = embed(Whole(whole.model), whole.model, whole.processor, items)
    try:
        TeacherEngine(whole.model, ds_config=teacher_config())
    except ValueError as error:
        refused = str(error)
    engine = TeacherEngine(whole.model.requires_grad_(False), ds_config=teacher_config())
    got = embed(engine, whole.model, whole.processor, items)
    shard = engine.residence().shard
    engine.close()
    config = {**whole.model.encoder.tower("text").backbone.config.to_dict()}
    drawn = [load({"config": config}, processor=whole.processor, seed=s) for s in (1, 1, 2)]
    digests = [teacher.identity["weights"] for teacher in drawn]
    for teacher in drawn:
        teacher.close()
    return {
        "error": float((got - expected).abs().max()),
        "shard": shard,
        "refused": refused,
        "tied": two_values_of_one(),
        "digests": digests,
    }


def two_values_of_one() -> str:
    """The message for files that hold a tied weight twice, unlike each other."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in "ab"})
    model["b"].weight = model["a"].weight
    for values in ((1.0, 1.0), (1.0, 2.0)):
        stored = {f"{n}.weight": torch.full((2, 2), v) for n, v in zip("ab", values, strict=True)}
        hollow: Any = HollowModel(deepcopy(model), frozenset(stored), (iter(stored.items()),))
        try:
            shard_weights(hollow, teacher_config(), doing="loading")
        except VembedError as error:
            assert values == (1.0, 2.0)
            return str(error)
    return "nothing was refused"
