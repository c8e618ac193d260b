"""What a rank does to follow teachers: three cached steps of the project's own training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.parity import family_cases
from tests.parity.cases import make_engine, whole_parameters
from tests.parity.distillation_reference import EMA_DECAY, Scenario, projections, scores_of
from tests.parity.family_reference import COMPOSED, NEGATIVES, RANK_SHARE, TEMPERATURE
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.collators import Batch
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.engine.replicas import ReplicaCheck
from vembed_ds.engine.teacher_config import resolve_teacher_config
from vembed_ds.losses import Distillation, Prefixes, alpha_schedule, build_loss
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.reach import mark_unreached
from vembed_ds.teachers.ema import EmaTeacher
from vembed_ds.teachers.teacher import Teacher, load_teacher
from vembed_ds.training.loop import Intervals, TrainingLoop
from vembed_ds.training.nonfinite import StepGuard
from vembed_ds.training.teacher_sources import (
    EmaSource,
    LiveTeacher,
    Source,
    StoredScores,
    Teachers,
)

CHUNK_SIZE = 4


def train(
    *,
    scenario: Scenario,
    folders: Mapping[str, str],
    items: Mapping[str, Any],
    heads: Mapping[str, Any],
    ds_config: dict[str, Any],
) -> dict[str, Any]:
    """Losses, norms and whole parameters; and live teachers' forward passes so far, behind their
    word and behind the replay of each step."""
    name = scenario.student
    torch.manual_seed(1)
    folder, composed = Path(folders[name]), name in COMPOSED
    model = family_cases.load_model(folder, composed=composed, heads=heads.get(name, {}))
    if scenario.lora:
        family_cases.add_started_adapters(model)
    processor = family_cases.load_processor(folder, composed=composed)
    fillers = {part: processor.filler(part) for part in model.parts}
    mark_unreached(model, {part: processor.pad(part, [item]) for part, item in fillers.items()})
    for number, matrix in projections(scenario).items():
        model.add_teacher_projection(
            number, width=matrix.in_features, teacher_width=matrix.out_features
        )
        model.teacher_projections[str(number)].weight.data.copy_(matrix.weight.data)
    sources = _sources(scenario, folders, model)
    engine = make_engine(model, ds_config=ds_config)
    loop = TrainingLoop(
        engine=engine,
        model=model,
        loader=[_batch(scenario, items, step) for step in range(3)],
        processor=processor,
        loss_functions=[_loss(scenario)],
        budget=ChunkBudget(CHUNK_SIZE),
        intervals=Intervals(num_steps=4, steps_per_epoch=None, logging_steps=99),
        tracker=None,
        save=lambda step: Path(),
        guard=StepGuard(engine, folder=Path()),
        replicas=ReplicaCheck(engine, every=0),
        teachers=Teachers(sources, widths={}),
    )
    model.train()
    losses, norms, asked, forwards = [], [], [], []
    live = [s.teacher for s in sources.values() if isinstance(s, LiveTeacher)]
    judge = loop.teachers.judge

    def count(*arguments: Any) -> Any:
        said = judge(*arguments)
        asked.append([teacher.forwards for teacher in live])
        return said

    loop.teachers.judge = count  # type: ignore[method-assign]
    for batch in loop.batches():
        result = loop.compute_gradient(batch)
        forwards.append([teacher.forwards for teacher in live])
        norm = engine.step()
        loop.step += 1
        loop.teachers.after_step(loop.step, updated=norm is not None)
        losses.append(float(comm.mean_over_ranks(result.loss)))
        norms.append(float(norm))
    found = {
        family_cases._name(n, composed=composed): p for n, p in whole_parameters(engine).items()
    }
    result = {
        "losses": losses,
        "norms": norms,
        "after": found,
        "asked": asked,
        "forwards": forwards,
    }
    for teacher in live:
        teacher.close()
    engine.engine.destroy()
    return result


def _sources(
    scenario: Scenario, folders: Mapping[str, str], model: EmbeddingModel
) -> dict[int, Source]:
    found: dict[int, Source] = {}
    ds_config = resolve_teacher_config(
        scenario.teacher_config,
        origin="test",
        precision=scenario.precision,
        world_size=comm.world_size(),
        device_type="cpu",
        fp16_supported=True,
        bf16_supported=True,
    )
    for number, name in enumerate(scenario.teachers):
        if name == "ema":
            average = EmaTeacher(model, ds_config=ds_config, decay=EMA_DECAY)
            found[number] = EmaSource(average, num_layers=1)
        else:
            found[number] = LiveTeacher(_teacher(name, folders, ds_config), batch_size=5)
    if scenario.scored:
        found[len(found)] = StoredScores(torch.device("cpu"))
    return found


def _teacher(name: str, folders: Mapping[str, str], ds_config: dict[str, Any]) -> Teacher:
    return load_teacher(folders[name], name=name, ds_config=ds_config)


def _loss(scenario: Scenario) -> Any:
    start, end = scenario.alpha
    late = scenario.student in ("colpali", "colqwen2")
    dims = scenario.mrl_dims
    options = {"use_mrl": True, "mrl_dims": dims} if dims else {}
    return build_loss(
        "colbert" if late else "infonce",
        temperature=TEMPERATURE,
        loss_bidirectional=True,
        distillation=Distillation(
            scenario.loss,
            weights=scenario.weights,
            alpha=alpha_schedule("linear", start=start, end=end, num_steps=3),
            temperature=scenario.temperature,
            scale=scenario.scale,
            prefixes=Prefixes(dims, (1.0,) * len(dims)) if dims else None,
        ),
        tile_size=2,  # several on every rank
        **options,
    )


def _batch(scenario: Scenario, items: Mapping[str, Any], step: int) -> Batch:
    """This rank's share of a step, as the student and as every teacher reads it."""
    start = comm.rank() * RANK_SHARE
    counts = NEGATIVES[step]
    before, own = sum(counts[:start]), list(counts[start : start + RANK_SHARE])
    mine = slice(start, start + RANK_SHARE)
    places = {"query": mine, "positive": mine, "negative": slice(before, before + sum(own))}

    def roles(family: str) -> dict[str, list[EncodedItem]]:
        return {
            role: [EncodedItem(*item) for item in found[places[role]]]
            for role, found in items[family][step].items()
        }

    positive, negative = scores_of(step)
    return Batch(
        indices=list(range(RANK_SHARE)),
        roles=roles(scenario.student),
        negative_counts=own,
        teacher_roles={name: roles(name) for name in scenario.teachers if name != "ema"},
        teacher_scores=positive[mine].tolist(),
        negative_scores=negative[places["negative"]].tolist(),
    )
