"""What a rank runs to compare an EMA teacher with a plain average of whole weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.parity import cases, data, lora_cases
from vembed_ds.checkpointing.restore import load_checkpoint
from vembed_ds.checkpointing.saving import save_checkpoint
from vembed_ds.data.batches import StepPlan, plan_step
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import CheckpointError
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.steps.gradient_cache import embed_plan
from vembed_ds.teachers.ema import EmaTeacher

DECAY = 0.7
CHUNK = 5


def follow(
    *,
    folder: str,
    kind: str,
    ds_config: dict[str, Any],
    teacher_ds_config: dict[str, Any],
    lora: bool = False,
) -> dict[str, Any]:
    """Train three steps with a teacher that follows, beside a plain float32 average.

    Returns:
        ``steps``: for each the largest difference of a weight, and of an embedding from that of
        a plain model with the averages, how far the ``student`` is away, the collectives of
        ``update`` and of an embed phase, and the elements held in between. What was held and
        embedded, and whether the rest is the student's.
    """
    model = _make_model(folder, kind, lora=lora)
    plain = copy.deepcopy(model).to(_dtype(ds_config)).eval()
    teacher = EmaTeacher(model, ds_config=teacher_ds_config, decay=DECAY)
    engine = cases.make_engine(model, ds_config=ds_config)
    average = _whole(model)
    torch.manual_seed(comm.rank())
    model.train()
    steps = []
    for step in range(3):
        _train(engine, model, kind, step)
        weights = _whole(model)
        for name, weight in weights.items():
            average[name] = DECAY * average[name] + (1 - DECAY) * weight
        _, collectives = _counted(teacher.update)
        held = teacher.residence()
        averages = _averages(teacher)
        # In 16 bit the last bit of an average may decide how its weight is rounded.
        _put(plain, {**average, **averages})
        plan = _plan(model, kind, step)
        rows, embedding_collectives = _counted(lambda plan=plan: _embed(teacher, plan))
        steps.append(
            {
                "collectives": collectives,
                "held": held.shard + held.live,
                "embedding collectives": embedding_collectives,
                "embeddings": _distance(rows, _embed(_engine(plain), plan)),
                "weights": _distance(averages, average),
                "student": _distance(weights, average),
            }
        )
    copied = teacher.model
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    weights, copies = _whole(model), _whole(copied)
    found = {
        "steps": steps,
        "total": sum(weight.numel() for weight in weights.values()),
        "parameters": len(weights),
        "frozen": len(frozen),
        "frozen are the student's": all(torch.equal(weights[n], copies[n]) for n in frozen),
        "buffers are the student's": all(map(torch.equal, copied.buffers(), model.buffers())),
        "forwards": teacher.forwards,
        "chunks": len(plan.chunks),
        "training": copied.training,
    }
    _close(teacher, engine)
    return found


def resume(
    *, folder: str, output: str, ds_config: dict[str, Any], teacher_ds_config: dict[str, Any]
) -> dict[str, Any]:
    """Four steps, once without and once with an end and a new start in the middle."""
    results = []
    for restart in (False, True):
        teacher, engine, model = _start(folder, ds_config, teacher_ds_config)
        for step in (0, 1):
            _train(engine, model, "shared", step)
            teacher.update()
        place = save_checkpoint(
            engine.engine,
            output_dir=Path(output),
            step=2,
            state={},
            describe=lambda place: place.mkdir(exist_ok=True),
            write=teacher.save,
        )
        if restart:
            _close(teacher, engine)
            teacher, engine, model = _start(folder, ds_config, teacher_ds_config)
            load_checkpoint(engine.engine, place)
            teacher.load(place)
        for step in (2, 3):
            _train(engine, model, "shared", step)
            teacher.update()
        rows = _embed(teacher, _plan(model, "shared", 0))
        results.append({**_averages(teacher), **_whole(teacher.model), **rows})
        if not restart:
            _close(teacher, engine)
    error = _error(lambda: teacher.load(Path(output)))
    _close(teacher, engine)
    same = [torch.equal(value, results[1][name]) for name, value in results[0].items()]
    return {"same": all(same), "checkpoint": str(place), "error": error}


def _start(
    folder: str, ds_config: dict[str, Any], teacher_ds_config: dict[str, Any]
) -> tuple[EmaTeacher, TrainEngine, EmbeddingModel]:
    model = _make_model(folder, "shared", lora=False)
    teacher = EmaTeacher(model, ds_config=teacher_ds_config, decay=DECAY)
    engine = cases.make_engine(model, ds_config=ds_config)
    model.train()
    return teacher, engine, model


def _close(teacher: EmaTeacher, engine: TrainEngine) -> None:
    teacher.close()
    engine.engine.destroy()


def _make_model(folder: str, kind: str, *, lora: bool) -> EmbeddingModel:
    if lora:
        return lora_cases.make_model(Path(folder), kind, variant="lora", dropout=0.0)
    return cases.make_model(Path(folder), kind=kind, temperature=0.1)


def _dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    return torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32


def _train(engine: TrainEngine, model: EmbeddingModel, kind: str, step: int) -> None:
    cases.train_step(engine, model, kind, step, CHUNK, True, 0.1)
    assert engine.step() is not None


def _plan(model: EmbeddingModel, kind: str, step: int) -> StepPlan:
    return plan_step(
        cases.rank_roles(kind, step),
        budget=ChunkBudget(CHUNK),
        streams=model.streams,
        filler=lambda stream: EncodedItem(*data.fillers()[stream]),
    )


def _embed(engine: Any, plan: StepPlan) -> dict[str, Tensor]:
    def pad(stream: str, items: Any) -> dict[str, Tensor]:
        return data.pad(stream, [item.inputs for item in items])

    found = embed_plan(engine, plan, pad=pad)
    return {role: functional.normalize(rows.values, dim=-1) for role, rows in found.items()}


def _engine(model: nn.Module) -> Any:
    """What `embed_plan` needs, without any."""
    return SimpleNamespace(device=torch.device("cpu"), embed=model)


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a forward pass uses, gathered, float32."""
    named = list(model.named_parameters())
    parts = [p for _, p in named if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(parts):
        return {name: p.detach().float().clone() for name, p in named}


def _averages(teacher: EmaTeacher) -> dict[str, Tensor]:
    """The float32 averages, whole."""
    shapes = {n: p.ds_shape for n, p in teacher.model.named_parameters()}
    shards = comm.all_gather_objects(
        {name: shard.clone() for name, shard in teacher._average.state_dict().items()}
    )
    return {
        name: torch.cat([of_rank[name] for of_rank in shards]).reshape(shapes[name])
        for name in shards[0]
    }


def _put(plain: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(weights[name])


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def _counted(action: Callable[[], Any]) -> tuple[Any, int]:
    """What ``action`` returns, and how often this rank talked to the others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = action()
    return result, sum(e.count for e in profile.key_averages() if "c10d::" in e.key)


def _error(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""
