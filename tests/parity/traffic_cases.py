"""What a rank of a test world runs: what its steps send, and what its engine holds in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.traffic import CountedTraffic
from tests.parity import cases, data
from vembed_ds.data.batches import lay_out
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.distributed import comm
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.engine.initialize import initialize_engine
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import ConfigError, DistributedError
from vembed_ds.steps.gradient_cache import embed_plan

BERT = data.TEXT | {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 256}


def count_bytes(
    *,
    folder: str,
    ds_config: dict[str, Any],
    modes: dict[str, str],
    chunk_size: int | None,
    slice_size: int | None = None,
    kept: int = 1,
    looked_at: bool = False,
) -> dict[str, Any]:
    """Bytes that this rank sends in its fifth step, and what they depend on.

    Args:
        looked_at: The model embeds before its first step and between others, as in a run.
    """
    model = cases.make_model(Path(folder), kind="shared", temperature=0.1)
    if slice_size:
        backbone = model.trained_backbones()[0]
        enable_activation_checkpointing(backbone, mechanism="", slice_size=slice_size)
    engine = cases.make_engine(model, ds_config=ds_config, modes=modes)
    model.train()

    def take_step(step: int) -> None:
        cases.train_step(engine, model, "shared", step, chunk_size, True, 0.1, kept=kept)
        engine.step()

    for number, step in enumerate((0, 1, 2, 1)):
        if looked_at and number in (0, 2):
            _evaluate(engine)
            model.train()
        take_step(step)
    with CountedTraffic() as traffic:
        take_step(3)
    sizes = {p: getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    roles = cases.rank_roles("shared", 3)
    found = {
        "sent": dict(traffic.sent),
        "parameters": sum(sizes.values()),
        "trained": sum(size for p, size in sizes.items() if p.requires_grad),
        "persistent": sum(size for p, size in sizes.items() if getattr(p, "ds_persist", False)),
        "chunks": len(lay_out(roles, budget=ChunkBudget(chunk_size)).alone().chunks),
    }
    engine.engine.destroy()
    return found


def _evaluate(engine: TrainEngine) -> None:
    roles = {"query": cases.rank_roles("shared", 7)["query"]}  # as many on every rank
    plan = lay_out(roles, budget=ChunkBudget(2)).alone()
    engine.module.eval()
    embed_plan(engine, plan, pad=_pad)


def whole_gradients(*, folder: str, ds_config: dict[str, Any], modes: dict[str, str]) -> list[int]:
    """Elements of all gradients, and the most that were whole at one time of a step."""
    model = cases.make_model(Path(folder), kind="shared", temperature=0.1)
    engine = cases.make_engine(model, ds_config=ds_config, modes=modes)
    trained = [p for p in model.parameters() if p.requires_grad]
    whole: list[int] = []

    def look(parameter: nn.Parameter) -> None:
        whole.append(sum(p.grad.numel() for p in trained if p.grad is not None))

    for parameter in trained:  # behind DeepSpeed's hook, which may have reduced it
        parameter.register_post_accumulate_grad_hook(look)
    cases.train_step(engine, model, "shared", 0, 3, True, 0.1)
    engine.engine.destroy()
    return [sum(getattr(p, "ds_numel", p.numel()) for p in trained), max(whole)]


def live(engine: TrainEngine) -> set[str]:
    """Names of the parameters that are whole."""
    return {name for name, p in engine.module.named_parameters() if p.numel()}


def hold(*, folder: str, ds_config: dict[str, Any], gather: str) -> dict[str, Any]:
    """What is whole when; and whether evaluations between steps embed as the weights say."""
    model = cases.make_model(Path(folder), kind="clip", temperature=0.1)
    idle = list(model.encoder.backbone.vision_model.parameters()) if gather == "idle" else []
    engine = initialize_engine(
        model,
        ds_config=ds_config,
        param_groups=[{"params": [p for p in model.parameters() if p.requires_grad]}],
        zero3_gather="once" if idle else gather,
        idle=idle,
    )
    found: dict[str, Any] = {"all": {n for n, _ in model.named_parameters()}}
    with engine.parameters_held():
        found["held"] = live(engine)
        with engine.reduce_once():
            pass
        found["reduced"] = live(engine)
    found["afterwards"] = live(engine)
    with pytest.raises(ZeroDivisionError), engine.parameters_held():
        raise ZeroDivisionError
    found["after an error"] = live(engine)
    if idle:
        return found
    distances = []
    for step in range(3):
        distances.append(_distance_of_evaluation(engine, folder))
        model.train()
        with pytest.raises(ZeroDivisionError), engine.parameters_held(), engine.reduce_once():
            raise ZeroDivisionError
        cases.train_step(engine, model, "clip", step, 3, True, 0.1)
        engine.step()
    found["distances"] = distances
    found["after"] = cases.whole_parameters(engine)
    engine.engine.destroy()
    return found


def _distance_of_evaluation(engine: TrainEngine, folder: str) -> float:
    """Between the engine's embeddings and those of a plain model with its weights."""
    plain = cases.make_model(Path(folder), kind="clip", temperature=0.1).eval()
    weights = cases.whole_parameters(engine)
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(weights[cases.reference_name(name)].view(parameter.shape))
    roles = cases.rank_roles("clip", 7)
    plan = lay_out(roles, budget=ChunkBudget(2)).alone()
    engine.module.eval()
    rows, expected = (
        embed_plan(embedder, plan, pad=_pad)  # type: ignore[arg-type]
        for embedder in (engine, _Plain(plain))
    )
    return max(float((rows[role].values - expected[role].values).abs().max()) for role in rows)


def _pad(stream: str, items: Any) -> dict[str, Tensor]:
    return data.pad(stream, [item.inputs for item in items])


class _Plain:
    device = torch.device("cpu")

    def __init__(self, model: nn.Module) -> None:
        self.embed = model


def refuse(*, folder: str, ds_config: dict[str, Any], gather: str) -> str:
    """What is said when DeepSpeed has hooks that are not known here; the mode that is taken else."""
    model = cases.make_model(Path(folder), kind="shared", temperature=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vembed_ds.engine.whole_parameters._HOOKS_PER_MODULE", 5)
        try:
            engine = cases.make_engine(model, ds_config=ds_config, modes={"zero3_gather": gather})
        except ConfigError as error:
            return str(error)
    engine.engine.destroy()
    return str(engine._gather)


def per_rank_graphs(*, folder: str, ds_config: dict[str, Any]) -> str:
    """The message where the ranks' chunks do not use the same parameters."""
    model = cases.make_model(Path(folder), kind="composed", temperature=0.1)
    engine = cases.make_engine(
        model, ds_config=ds_config, modes={"gradient_reduction": "per_chunk"}
    )
    # Of one size, so that DeepSpeed reduces one with the other and notices nothing.
    chosen = model.encoder.tower(("text", "image")[comm.rank()]).projection.weight
    try:
        with engine.parameters_held(), engine.reduce_once():
            engine.engine.optimizer.clear_backward_seen_flag()
            engine.backward(chosen.sum() * 1.0)
    except DistributedError as error:
        return str(error)
    finally:
        engine.engine.destroy()
    return ""
