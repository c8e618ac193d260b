"""A checkpoint's weights, optimizer, schedule and random state, put back into an engine.

Not by DeepSpeed's own loading, which runs whatever code the files hold, and knows only the number
of ranks and the ZeRO stage that wrote them. Here every rank reads the ranges of every parameter
that it holds now, wherever they lie, and writes them in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from vembed_ds.checkpointing.layouts import WEIGHT
from vembed_ds.checkpointing.random_state import load_random_state
from vembed_ds.checkpointing.shards import CheckpointReader, open_checkpoint
from vembed_ds.distributed import comm
from vembed_ds.engine.held_state import (
    HeldState,
    release_parameters,
    shard_range,
    whole_shape,
    write_shard,
)
from vembed_ds.engine.loss_scale import restore_loss_scale
from vembed_ds.engine.schedules import move_schedule
from vembed_ds.errors import CheckpointError
from vembed_ds.models.quantized import dequantized
from vembed_ds.models.quantized import whole_shape as shape_in_4_bit

_SHOWN = 3


def load_checkpoint(engine: DeepSpeedEngine, folder: Path, *, seed: int = 0) -> None:
    """Put everything back that :func:`save_checkpoint` wrote. Collective.

    The number of ranks, the ZeRO stage and where the optimizer lies may be others than those of the
    run that wrote the checkpoint; on the same ones training goes on bit for bit. Rates, decay and
    the other hyperparameters are the engine's own.

    Args:
        engine: With the model and the kind of optimizer of the run that wrote it.
        folder: A checkpoint.
        seed: Random states are this rank's own; on another number of ranks they are drawn anew,
            from this, the step and the rank.

    Raises:
        CheckpointError: On every rank: a file of any rank is missing, damaged or holds code, or
            the checkpoint is of another model or kind of optimizer.
    """
    doing = f"reading {folder}"
    reader = comm.run_together(lambda: open_checkpoint(folder, near=comm.rank()), doing=doing)
    held = HeldState(engine)
    release_parameters(engine)

    def read() -> None:
        _check_fit(reader, engine.module)
        _read_trained(reader, held)
        _read_untrained(reader, engine.module)
        _restore_counters(reader, engine)
        load_random_state(
            folder, saved_ranks=reader.world_size, seed=seed, step=engine.global_steps
        )

    comm.run_together(read, doing=doing)
    held.publish()


def _read_trained(reader: CheckpointReader, held: HeldState) -> None:
    kinds = _state_kinds(reader, held)
    for own in held.ranges():
        start, stop = own.start, own.start + own.length
        held.write_master(own, reader.read(own.name, WEIGHT, start, stop))
        for kind in kinds:
            held.write_state(own, kind, reader.read(own.name, kind, start, stop))
    if kinds:
        held.finish_state(reader.optimizer.step)
    else:
        held.forget_state()


def _state_kinds(reader: CheckpointReader, held: HeldState) -> list[str]:
    """What there is to read of the optimizer's state; nothing before its first step."""
    saved, counters = reader.optimizer.kinds, reader.counters
    if not saved and counters["global_steps"] == counters["skipped_steps"]:
        return []
    if saved != held.kinds:
        raise CheckpointError(
            f"{reader.folder}: its optimizer keeps {', '.join(saved) or 'nothing'} of a parameter, "
            f"and this one {', '.join(held.kinds) or 'nothing'}; resume with the optimizer of the "
            "DeepSpeed JSON that it was written with, or start a new run from its converted model"
        )
    return saved


def _read_untrained(reader: CheckpointReader, module: nn.Module) -> None:
    """Frozen parameters and buffers."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        if shape_in_4_bit(parameter) is not None:
            _check_4_bit(reader, module, name)
            continue
        start, length = shard_range(parameter)
        if length:
            write_shard(parameter, reader.read(name, WEIGHT, start, start + length))
    for name, buffer in _persistent_buffers(module).items():
        buffer.copy_(reader.weight(name))


def _check_4_bit(reader: CheckpointReader, module: nn.Module, name: str) -> None:
    """A weight that is held in 4 bit is not written; it must be what was trained on."""
    own = dequantized(module.get_submodule(name.rpartition(".")[0]))
    if not torch.equal(reader.weight(name).to(own), own):
        raise CheckpointError(
            f"{reader.folder}: {name}: the base model is not the one that this was trained on; "
            "give the same model_name_or_path"
        )


def _restore_counters(reader: CheckpointReader, engine: DeepSpeedEngine) -> None:
    for name, count in reader.counters.items():
        setattr(engine, name, count)
    position = reader.schedule
    if (position is None) != (engine.lr_scheduler is None):
        was, now = ("without", "with") if position is None else ("with", "without")
        raise CheckpointError(
            f"{reader.folder}: was written {was} a learning rate schedule, and this engine is made "
            f"{now} one; make it as the one that was saved"
        )
    if position is not None:
        move_schedule(engine.lr_scheduler, **position)
    if engine.fp16_enabled():
        restore_loss_scale(engine.optimizer, reader.loss_scaler)


def _check_fit(reader: CheckpointReader, module: nn.Module) -> None:
    """See that the checkpoint has just what the module has, trained and frozen alike."""
    here = _shapes(module)
    there = {name: reader.shape(name) for name in reader.names() if name not in reader.aliases}
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    both, was_trained = here.keys() & there.keys(), reader.trained.keys()
    findings = {
        "only in the model": here.keys() - there.keys(),
        "only in the checkpoint": there.keys() - here.keys() - _further_names(module),
        "of another shape": {
            f"{name} ({list(there[name])} there, {list(here[name])} here)"
            for name in both
            if there[name] != here[name]
        },
        "trained now and frozen there": (trained - was_trained) & both,
        "frozen now and trained there": (was_trained - trained) & both,
    }
    words = [
        f"{what}: {len(names)} ({', '.join(sorted(names)[:_SHOWN])}"
        f"{', ...' * (len(names) > _SHOWN)})"
        for what, names in findings.items()
        if names
    ]
    if words:
        raise CheckpointError(
            f"{reader.folder}: is of another model: {'; '.join(words)}. Resume with "
            "the model settings that it was written with, or start a new run from its converted "
            "model"
        )


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    shapes = {
        name: torch.Size(shape_in_4_bit(parameter) or whole_shape(parameter))
        for name, parameter in module.named_parameters()
    }
    return shapes | {name: buffer.shape for name, buffer in _persistent_buffers(module).items()}


def _further_names(module: nn.Module) -> set[str]:
    """Second names of shared parameters; not every rank's files tell that they are that."""
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in module.named_parameters()}


def _persistent_buffers(module: nn.Module) -> Mapping[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: buffer
        for path, owner in module.named_modules(remove_duplicate=False)
        for name, buffer in owner.named_buffers(recurse=False)
        if name not in owner._non_persistent_buffers_set
    }
