"""What a rank of a small run really holds and sends, to be compared with its plan."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks.measuring import memory, reset_peak
from benchmarks.traffic import CountedTraffic
from vembed_ds.checkpointing.saver import SavePolicy, Saver
from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import Config
from vembed_ds.data.collators import Batch
from vembed_ds.distributed import comm
from vembed_ds.engine.ds_config import load_ds_config
from vembed_ds.engine.extensions import prepare_extensions
from vembed_ds.engine.gradients import LocalGradients
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.training import chunk_choice
from vembed_ds.training.engine_setup import prepare_model, read_model, start_engine
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.memory_setup import is_to_be_chosen
from vembed_ds.training.plan import RunPlan, plan_run
from vembed_ds.training.run import build_loop
from vembed_ds.training.teacher_sources import NO_TEACHERS


def measure(values: dict[str, Any], ds_config: str) -> dict[str, int]:
    """Bytes by what they are, of this rank: held between steps, at most in a step, and sent."""
    config = parse_config(values)
    return_freed_memory()
    loop, engine, _ = build(config, ds_config)
    batches = loop.batches()
    found: dict[str, int] = {}
    step(loop, next(batches))  # allocates what is allocated once
    found["parameters"] = _bytes(parameters_of(engine))
    found["optimizer"] = _bytes(optimizer_of(engine))
    with CountedTraffic() as counted, noted_gradients(engine) as summed:
        step(loop, next(batches))
    found["sent"] = sum(counted.sent.values())
    found["gradients"] = summed[-1] if summed else 0  # they are reduced as they come
    before = reset_peak()
    step(loop, next(batches))
    found["peak"] = 1024 * (memory("VmHWM") - before)
    engine.engine.destroy()
    return found


@contextmanager
def noted_gradients(engine: TrainEngine) -> Iterator[list[int]]:
    """Bytes of the local gradient, behind the last chunk and before it is reduced."""
    found: list[int] = []
    finish = LocalGradients.finish

    def noting(local: Any) -> None:
        own = [p.grad for p in engine.module.parameters() if p.grad is not None]
        found.append(_bytes([*own, *local._sums.values()]))
        finish(local)

    with mock.patch.object(LocalGradients, "finish", noting):
        yield found


def return_freed_memory() -> None:
    """Let the allocator give back every tensor of 64 kB and more as soon as it is freed."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def build(config: Config, ds_config: str) -> tuple[TrainingLoop, TrainEngine, RunPlan]:
    """The loop of a run, as the command builds it."""
    plan = plan_run(
        config, load_ds_config(ds_config), ds_origin=ds_config, origins={}, resumption=None
    )
    plan.folder.mkdir(parents=True, exist_ok=True)
    prepare_extensions(plan.ds_config)
    model = read_model(config, plan.spec, plan.data, zero_stage=plan.zero_stage)
    prepare_model(config, model, plan.data, plan.folder)
    engine = start_engine(config, model, plan.ds_config, plan.intervals)
    loop = build_loop(
        config,
        model,
        engine,
        plan.data,
        plan.intervals,
        Saver(engine.engine, output_dir=plan.folder, policy=SavePolicy()),
        {},
        tracker=None,
        resumption=None,
        attach=lambda batch: batch,
        teachers=NO_TEACHERS,
    )
    model.train()
    return loop, engine, plan


def step(loop: TrainingLoop, batch: Batch) -> None:
    """One step, without logging."""
    loop.compute_gradient(batch)
    loop.engine.step()


def parameters_of(engine: TrainEngine) -> Iterable[Tensor]:
    """What is held of parameters and buffers between steps."""
    for parameter in engine.module.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor
    yield from engine.module.buffers()


def optimizer_of(engine: TrainEngine) -> Iterable[Tensor]:
    """Its state, and the float32 copies that it updates."""
    optimizer: Any = engine.engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    own = {t.untyped_storage().data_ptr() for t in parameters_of(engine)}
    # At stage 3 the groups are filled only while they are updated.
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", ())
    updated = [tensor for group in inner.param_groups for tensor in group["params"]]
    for tensor in (*flat, *updated):
        if tensor.untyped_storage().data_ptr() not in own:
            yield tensor
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def _sum(engine: TrainEngine) -> float:
    """Of all parameters."""
    return sum(float(p.detach().double().sum()) for p in engine.module.parameters())


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages, each counted once."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def choose(values: dict[str, Any], ds_config: str, free: list[int]) -> dict[str, Any]:
    """Train two steps in chunks of the size that is configured, or chosen by what is ``free``."""
    config = parse_config(values)
    loop, engine, plan = build(config, ds_config)
    with mock.patch.object(chunk_choice, "free_bytes", return_value=free[comm.rank()]):
        if is_to_be_chosen(config.training, None):
            chunk_choice.choose_chunks(loop, plan)
    start = _sum(engine)
    for batch in loop.batches():
        step(loop, batch)
    after, size = _sum(engine), loop.budget.items
    engine.engine.destroy()
    return {"size": size, "start": start, "sum": after}
