"""What a rank of a test world runs: a few steps through the project's engine and step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch._dynamo.utils import counters

from tests.parity import data
from tests.parity.reference import NUM_PATCHES, PROJECTION
from tests.worlds import set_fp16_support
from vembed_ds.data.batches import plan_step
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.collators import Batch
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.engine.initialize import initialize_engine
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.engine.schedules import build_schedule
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import GradientError
from vembed_ds.losses import LossInputs, build_loss
from vembed_ds.models import compiled
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.rates import set_rates
from vembed_ds.steps.gradient_cache import compute_gradient
from vembed_ds.steps.kept_graphs import KeptGraphs
from vembed_ds.steps.random_draws import find_draws
from vembed_ds.steps.self_test import check_gradient
from vembed_ds.training.loss_inputs import loss_inputs

_PLAIN_EMBED = TrainEngine.embed


def train(
    *,
    folder: str,
    kind: str,
    ds_config: dict[str, Any],
    steps: int,
    chunk_size: int | None,
    bidirectional: bool,
    temperature: float,
    checkpointing: str | None = None,
    slice_size: int | None = None,
    weight_decay: float | None = None,
    cosine: tuple[int, int] | None = None,
    rates: dict[str, float] | None = None,
    merge: bool = False,
    modes: dict[str, str] | None = None,
    kept: int = 1,
    backend: str | None = None,
) -> dict[str, Any]:
    """Train as the project does; losses, norms, and whole parameters after the last step.

    Also how many ``rows`` this rank's model has embedded in each step.

    ``weight_decay`` sorts the parameters into the project's groups; ``None``: one group.
    ``cosine`` is ``(warm-up steps, steps of the whole run)``; ``None``: a constant rate.
    ``rates`` are those of parts of the model. With ``merge``, equal items are embedded once where
    the model draws no random numbers. ``modes`` are of gathering and reducing. ``kept`` chunks keep
    their graph. ``backend`` compiles the backbones, for texts that are all padded to one length; the
    result has the number of ``graphs``.
    """
    if ds_config["fp16"]["enabled"]:
        set_fp16_support(True)
    model = make_model(Path(folder), kind=kind, temperature=temperature)
    if checkpointing:
        for backbone in _backbones(model):
            enable_activation_checkpointing(
                backbone, mechanism=checkpointing, slice_size=slice_size
            )
    set_rates(model, rates or {})
    if backend:
        _compile(model, backend)
    engine = make_engine(
        model, ds_config=ds_config, weight_decay=weight_decay, cosine=cosine, modes=modes
    )
    torch.manual_seed(comm.rank())
    model.train()
    merged: set[str] = set()
    if merge:
        drawn = find_draws(engine, model.streams[:2], item=_filler, pad=_pad)
        merged = {stream for stream in model.streams if not drawn.get(stream)}
    losses, norms, rows = [], [], [0] * steps
    for step in range(steps):
        with _counting(model, rows, step):
            losses.append(
                train_step(
                    engine,
                    model,
                    kind,
                    step,
                    chunk_size,
                    bidirectional,
                    temperature,
                    merged=merged,
                    kept=kept,
                    pad=_pad_to_one_length if backend else _pad,
                )
            )
        norm = engine.step()
        norms.append(None if norm is None else float(norm))
    after = whole_parameters(engine)
    engine.engine.destroy()
    graphs = counters["stats"]["unique_graphs"]
    return {"losses": losses, "norms": norms, "after": after, "rows": rows, "graphs": graphs}


def _compile(model: EmbeddingModel, backend: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    parts = model.parts
    modules = {module: None for part in parts for module in model.encoder.backbone_modules(part)}
    with mock.patch.object(compiled, "BACKEND", backend):
        compiled.compile_in_place((m for m in modules if any(m.children())), num_lengths=1)


@contextlib.contextmanager
def _counting(model: EmbeddingModel, rows: list[int], step: int) -> Iterator[None]:
    def count(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        rows[step] += sum(len(next(iter(inputs.values()))) for inputs in arguments[0].values())

    hook = model.register_forward_pre_hook(count)
    yield
    hook.remove()


def train_by_kept(*, kept: Sequence[Sequence[int]], **settings: Any) -> list[dict[str, Any]]:
    """As :func:`train`, for every number of graphs, by rank; with how often the model was called."""
    found = []
    for numbers in kept:
        number = numbers[comm.rank()]
        with mock.patch.object(TrainEngine, "embed", autospec=True) as embed:
            embed.side_effect = _PLAIN_EMBED
            result = train(kept=number, **settings)
        found.append({**result, "forwards": embed.call_count})
    return found


def make_engine(
    model: EmbeddingModel,
    *,
    ds_config: dict[str, Any],
    weight_decay: float | None = None,
    cosine: tuple[int, int] | None = None,
    modes: dict[str, str] | None = None,
) -> TrainEngine:
    """The project's engine; see `train`."""
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if weight_decay is not None:
        groups = build_param_groups(model, weight_decay=weight_decay)
    schedule = None
    if cosine:
        warm_up, total = cosine
        schedule = build_schedule("cosine", num_steps=total, warmup_steps=warm_up, warmup_ratio=0.0)
    return initialize_engine(
        model, ds_config=ds_config, param_groups=groups, schedule=schedule, **(modes or {})
    )


def train_step(
    engine: TrainEngine,
    model: EmbeddingModel,
    kind: str,
    step: int,
    chunk_size: int | None,
    bidirectional: bool,
    temperature: float,
    merged: Collection[str] = (),
    kept: int = 1,
    pad: Callable[[str, Sequence[EncodedItem]], dict[str, Tensor]] | None = None,
) -> float:
    """Gradient of one step, left in the engine; the loss of the global batch."""
    loss_type = "colbert" if kind in ("tokens", "patches") else "infonce"
    loss_function = build_loss(loss_type, temperature=temperature, loss_bidirectional=bidirectional)
    roles = rank_roles(kind, step)
    batch = Batch(indices=[], roles=roles, negative_counts=negative_counts(kind, step))
    plan = plan_step(
        roles,
        budget=ChunkBudget(chunk_size),
        streams=model.streams,
        filler=_filler,
        merged=merged,
    )
    result = compute_gradient(
        engine,
        plan,
        loss_function=lambda rows, learned: loss_function(loss_inputs(batch, rows, learned)),
        pad=pad or _pad,
        trainable=model.trainable,
        graphs=KeptGraphs(kept),
    )
    return float(comm.mean_over_ranks(result.loss))


def _pad(stream: str, items: Sequence[EncodedItem]) -> dict[str, Tensor]:
    return data.pad(stream, [item.inputs for item in items])


def _pad_to_one_length(stream: str, items: Sequence[EncodedItem]) -> dict[str, Tensor]:
    return data.pad(stream, [item.inputs for item in items], at_least=data.MOST_TOKENS)


def _filler(stream: str) -> EncodedItem:
    return EncodedItem(*data.fillers()[stream])


def count_reductions(
    *, folder: str, kind: str, ds_config: dict[str, Any], chunk_size: int | None
) -> dict[str, int]:
    """How often this rank reduced something over the ranks until a step's gradient was there."""
    model = make_model(Path(folder), kind=kind, temperature=0.1)
    engine = make_engine(model, ds_config=ds_config)
    model.train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_step(engine, model, kind, 0, chunk_size, True, 0.1)
    engine.engine.destroy()
    counts = {event.key: int(event.count) for event in profile.key_averages()}
    return {name: n for name, n in counts.items() if "c10d::" in name and "reduce" in name}


def rank_roles(kind: str, step: int) -> dict[str, list[EncodedItem]]:
    """This rank's contiguous share of the global batch."""
    records = _rank_records(kind, step)
    roles = {
        role: [EncodedItem(*record[role]) for record in records] for role in ("query", "positive")
    }
    if kind in data.TEXTS:
        negatives = [item for record in records for item in record["negatives"]]
        roles["negative"] = [EncodedItem(*item) for item in negatives]
    return roles


def negative_counts(kind: str, step: int) -> list[int] | None:
    """How many negatives each of this rank's records has."""
    if kind not in data.TEXTS:
        return None
    return [len(record["negatives"]) for record in _rank_records(kind, step)]


def _rank_records(kind: str, step: int) -> list[dict[str, Any]]:
    per_rank = data.GLOBAL_BATCH // comm.world_size()
    return data.make_batch(kind, step)[comm.rank() * per_rank :][:per_rank]


def make_model(folder: Path, *, kind: str, temperature: float) -> EmbeddingModel:
    """The project's model on the weights that the reference has."""
    if kind in data.CLIPS:
        spec = ModelSpec({"": BackboneSource(name=str(folder / "clip"))})
        return build_model(spec, init_logit_scale=-math.log(temperature))
    if kind == "patches":
        source = BackboneSource(name=str(folder / "image"))
        return build_model(ModelSpec({"": source}, pooling={"": "none"}, topk_tokens=NUM_PATCHES))
    if kind in data.SHARED:
        pooling = "none" if kind == "tokens" else "mean"
        spec = ModelSpec({"": BackboneSource(name=str(folder / "text"))}, pooling={"": pooling})
        return build_model(spec)
    sources = {s: BackboneSource(name=str(folder / s)) for s in ("text", "image")}
    spec = ModelSpec(
        sources,
        pooling={"text": "cls", "image": "cls"},
        projection_dim=PROJECTION,
        projection_layers=1,
    )
    model = build_model(spec, freeze={"text": kind == "frozen"})
    heads = torch.load(folder / "heads.pt")
    for stream, weight in heads.items():
        model.encoder.tower(stream).projection.weight.data.copy_(weight)
    return model


def whole_parameters(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """Trained float32 weights, gathered, under the reference's names."""
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    return {reference_name(name): _master(engine, p).float().cpu().clone() for name, p in named}


def _master(engine: TrainEngine, parameter: torch.nn.Parameter) -> torch.Tensor:
    if engine.zero_stage > 0:
        return safe_get_full_fp32_param(parameter)
    optimizer = engine.engine.optimizer
    if hasattr(optimizer, "fp32_groups"):  # ZeRO-0 in 16 bit
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for candidate, master in zip(group, masters, strict=True):
                if candidate is parameter:
                    return master.detach()
    return parameter.detach()


def reference_name(name: str) -> str:
    """Name of the same parameter in ``reference.PlainModel``."""
    if name in ("logit_scale", "logit_bias"):
        return name
    if name.startswith("teacher_projections."):
        return name.removeprefix("teacher_")
    name = name.removeprefix("encoder.")
    if name.startswith("backbone."):
        return "parts.clip." + name.removeprefix("backbone.")
    _, stream, rest = name.split(".", 2)
    if rest.startswith("projection."):
        return f"heads.{stream}.{rest.removeprefix('projection.')}"
    return f"parts.{stream}.{rest.removeprefix('backbone.')}"


def _backbones(model: EmbeddingModel) -> list[torch.nn.Module]:
    encoder = model.encoder
    return (
        [encoder.backbone]
        if hasattr(encoder, "backbone")
        else [t.backbone for t in encoder.towers.values()]
    )


def self_test(
    *,
    folder: str,
    ds_config: dict[str, Any],
    fault: str | None = None,
    kind: str = "clip",
    tolerance: float = 1e-3,
    modes: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run the start-up self-test, then three steps; ``fault`` breaks the schedule first."""
    if ds_config["fp16"]["enabled"]:
        set_fp16_support(True)
    model = make_model(Path(folder), kind=kind, temperature=0.1)
    engine = make_engine(model, ds_config=ds_config, modes=modes)
    if fault == "repeated backward":
        engine.reduce_once = contextlib.nullcontext  # every backward reduces by itself
    if fault == "batch statistics":
        model.encoder.backbone.visual_projection.register_forward_hook(
            lambda module, inputs, output: output - output.mean(dim=0)
        )
    if fault == "padding":
        model.encoder.tower("text").backbone.embeddings.register_forward_hook(
            lambda module, inputs, output: output + 0.01 * output.mean(dim=1, keepdim=True)
        )
    loss_function = build_loss("infonce", temperature=0.1, loss_bidirectional=True)
    if fault == "loss without gradient":

        def loss_function(inputs: LossInputs) -> Tensor:
            return 0.0 * inputs.query.values.sum()

    roles = {role: items[:3] for role, items in rank_roles(kind, 0).items()}
    batch = Batch(indices=[], roles=roles)
    torch.manual_seed(comm.rank())
    model.train()
    state = torch.get_rng_state()
    try:
        difference = check_gradient(
            engine,
            roles,
            loss_function=lambda rows, learned: loss_function(loss_inputs(batch, rows, learned)),
            pad=_pad,
            streams=model.streams,
            trainable=model.trainable,
            filler=_filler,
            tolerance=tolerance,
        )
    except GradientError as error:
        return {"error": str(error)}
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    scale = engine.loss_scale
    losses, norms = [], []
    for step in range(3):
        losses.append(train_step(engine, model, kind, step, 3, True, 0.1))
        norm = engine.step()
        norms.append(None if norm is None else float(norm))
    return {
        "difference": difference,
        "scale": scale,
        "losses": losses,
        "norms": norms,
        "after": whole_parameters(engine),
    }


def sum_chunks(
    *, folder: str, kind: str, ds_config: dict[str, Any], modes: dict[str, str] | None = None
) -> list[dict[str, Tensor]]:
    """One step of one-item chunks; per trained parameter, all float32:

    ``reduced``: what the engine would step with. ``summed``: the gradients of this rank's chunks,
    as autograd hands them over in 16 bit, summed in float32. ``rounded``: the same, rounded to 16
    bit after every chunk, as plain accumulation in ``.grad`` does. ``each``: those of all chunks.
    """
    model = make_model(Path(folder), kind=kind, temperature=0.1)
    engine = make_engine(model, ds_config=ds_config, modes=modes)
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    chunks: list[list[Tensor]] = [[] for _ in trained]
    for seen, parameter in zip(chunks, trained, strict=True):
        parameter.register_hook(lambda grad, seen=seen: seen.append(grad.detach().clone()))
    model.train()
    train_step(engine, model, kind, 0, 1, True, 0.1)
    found = [
        {
            "reduced": reduced.clone(),
            "summed": sum((grad.float() for grad in seen), torch.zeros_like(reduced)),
            "rounded": sum(seen, torch.zeros_like(reduced, dtype=torch.bfloat16)).float(),
            "each": torch.stack(seen).flatten(1).float(),
        }
        for reduced, seen in zip(engine.full_gradients(), chunks, strict=True)
    ]
    engine.engine.destroy()
    return found


def overflow(
    *, folder: str, kind: str, ds_config: dict[str, Any], steps: int, cosine: tuple[int, int]
) -> dict[str, Any]:
    """Train in fp16, repeating every step until its gradient does not overflow.

    Returns:
        ``attempts``: per call of ``engine.step()`` its norm, and loss scale, next learning rate
        and whether a weight (fp32 or fp16) changed behind it. ``after``: as `train` has it.
    """
    set_fp16_support(True)
    model = make_model(Path(folder), kind=kind, temperature=0.1)
    engine = make_engine(model, ds_config=ds_config, cosine=cosine)
    model.train()
    attempts = []
    done = 0
    while done < steps:
        before = _all_weights(engine)
        train_step(engine, model, kind, done, 3, True, 0.1)
        norm = engine.step()
        done += norm is not None
        same = map(torch.equal, before, _all_weights(engine))
        attempts.append(
            {
                "norm": None if norm is None else float(norm),
                "scale": float(engine.engine.optimizer.loss_scale),
                "rate": engine.learning_rate(),
                "changed": not all(same),
            }
        )
    after = whole_parameters(engine)
    engine.engine.destroy()
    return {"attempts": attempts, "after": after}


def _all_weights(engine: TrainEngine) -> list[Tensor]:
    """Copies of the whole float32 weights and of what this rank holds of the 16-bit ones."""
    held = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]
    return [*whole_parameters(engine).values(), *held]
