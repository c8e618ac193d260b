"""When memory runs out: which work asked for how much, and what makes it smaller."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from deepspeed.accelerator import get_accelerator

from vembed_ds.config.schema import Config
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.distributed import comm
from vembed_ds.distributed.host_memory import free_host_bytes
from vembed_ds.distributed.phases import Kind, status_of
from vembed_ds.errors import OutOfMemoryError, one_line
from vembed_ds.steps.shortage import memory_cause
from vembed_ds.training.engine_setup import chunk_budget, inference_batch_size

P = ParamSpec("P")
T = TypeVar("T")

_ON_HOST = re.compile(r"DefaultCPUAllocator|cannot allocate memory|unable to allocate", re.I)
_SIZE = r"([\d.]+ (?:[KMGTPE]iB|bytes))"
_ASKED = re.compile(rf"(?:tried to allocate|unable to allocate) {_SIZE}", re.I)
_FREE = re.compile(rf"total capacity of {_SIZE} of which {_SIZE} is free", re.I)


class Setting(NamedTuple):
    """What of a run decides how much memory it takes.

    Attributes:
        batch_size: Pairs per rank and step.
        budget: Of the chunks of a step.
        kept_graphs: Chunks that keep their graph.
        loss_in_one_piece: Whether the loss holds all its similarities at once.
        eval_batch_size: Items per forward pass of an evaluation.
        gradient_checkpointing: Whether activations are computed again.
        zero_stage: Of DeepSpeed.
        offload: Whether the optimizer's state lies on the host.
        world_size: Ranks.
        on_device: Whether the ranks have an accelerator.
        num_workers: Loader processes per rank.
        prefetch_factor: Batches that they prepare ahead.
    """

    batch_size: int
    budget: ChunkBudget
    kept_graphs: int
    loss_in_one_piece: bool
    eval_batch_size: int
    gradient_checkpointing: bool
    zero_stage: int
    offload: bool
    world_size: int
    on_device: bool
    num_workers: int
    prefetch_factor: int


def reports_memory(
    work: Callable[Concatenate[Config, Mapping[str, Any], P], T],
) -> Callable[Concatenate[Config, Mapping[str, Any], P], T]:
    """Let a run name what had no memory, instead of ending by a stack.

    Args:
        work: Called with the configuration and DeepSpeed's; the rest passes.

    Raises:
        OutOfMemoryError: In place of what torch, numpy or Python raise. On this rank only: the
            others learn of it when it ends.
    """

    @functools.wraps(work)
    def reporting(
        config: Config, ds_config: Mapping[str, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        try:
            return work(config, ds_config, *args, **kwargs)
        except OutOfMemoryError:  # a step has said more
            raise
        except Exception as error:
            cause = memory_cause(error)
            if cause is None:
                raise
            zero = ds_config.get("zero_optimization") or {}
            offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
            found = setting(config, zero_stage=zero.get("stage", 0), offload=offload)
            raise report(cause, found) from error

    return reporting


def report(error: BaseException, setting: Setting) -> OutOfMemoryError:
    """The message of a run that had no memory.

    Args:
        error: What torch, numpy or Python raised.
        setting: Of the run.
    """
    text, status = str(error), status_of(error)
    on_host = not setting.on_device or isinstance(error, MemoryError) or bool(_ON_HOST.search(text))
    place = "host" if on_host else str(get_accelerator().current_device_name())
    helps = suggestions(status.kinds, setting, on_host=on_host)
    numbered = "; ".join(f"({number}) {words}" for number, words in enumerate(helps, start=1))
    return OutOfMemoryError(
        f"{status}: no memory on the {place}{_figures(text, on_host=on_host)}; what helps, in this "
        f"order: {numbered}. [{type(error).__name__}: {one_line(error, length=150)}]"
    )


def suggestions(kinds: Sequence[Kind], setting: Setting, *, on_host: bool) -> list[str]:
    """What makes a phase's work smaller, the harmless first; only what can still be changed.

    Args:
        kinds: Of the phases in which memory ran out, from the outermost.
        setting: Of the run.
        on_host: The host's memory ran out, not the accelerator's.
    """
    inside = set(kinds)
    if on_host and setting.on_device:
        return [*_loader(setting), *_no_offload(setting), _FEWER_RANKS]
    if on_host and {Kind.LOADING, Kind.SAVING} & inside:
        return [_FEWER_RANKS]
    if Kind.DATA in inside:
        found = [*_loader(setting), *_batch(setting)]
    elif Kind.EVALUATION in inside:
        found = [*_evaluation(setting), *_zero(setting)]
    elif Kind.TEACHER in inside:
        found = [*_chunks(setting), _TEACHER]
    elif Kind.LOSS in inside:
        found = [
            *([_TILES] if setting.loss_in_one_piece else []),
            *_graphs(setting),
            *_batch(setting),
            *_chunks(setting),
            *_zero(setting),
            *_offload(setting),
        ]
    elif _WHOLE_MODEL & inside:
        found = [*_zero(setting), *_offload(setting), _LESS_TRAINED]
    else:
        found = [
            *_graphs(setting),
            *_chunks(setting),
            *_checkpointing(setting),
            *_zero(setting),
            *_offload(setting),
            *_batch(setting),
        ]
    return found or [_LESS_TRAINED]


# Phases in which parameters, gradients and the optimizer's state take the memory, not the batch.
_WHOLE_MODEL = {Kind.LOADING, Kind.BUILDING, Kind.REDUCTION, Kind.OPTIMIZER, Kind.SAVING}
_FEWER_RANKS = (
    "fewer ranks on this machine, or more memory: every rank holds the whole model on the host "
    "while it is loaded or described"
)
_TEACHER = "teacher_mode: cached, teacher_precision: bf16, or offload_param in the file of teacher_ds_config"
_TILES = "loss_tile_size: auto, not null (the update stays the same)"
_LESS_TRAINED = "a smaller model, precision: bf16, or use_lora: true"


def _graphs(setting: Setting) -> list[str]:
    if setting.kept_graphs == 1:
        return []
    return [
        f"gradient_cache_kept_graphs: 1, not {setting.kept_graphs} (slower, the update stays the same)"
    ]


def _chunks(setting: Setting) -> list[str]:
    items, tokens = setting.budget.items, setting.budget.tokens
    if (items or setting.batch_size) == 1:
        return []
    if items is None:
        half = f"gradient_cache_chunk_size: {setting.batch_size // 2}, half of batch_size"
        return [f"use_gradient_cache: true, with {half} (the update stays the same)"]
    halves = [f"gradient_cache_chunk_size: {items // 2}"]
    if isinstance(tokens, int):
        halves.append(f"gradient_cache_chunk_tokens: {tokens // 2}")
    return [f"{' and '.join(halves)}, half of now (slower, the update stays the same)"]


def _checkpointing(setting: Setting) -> list[str]:
    return [] if setting.gradient_checkpointing else ["gradient_checkpointing: true (slower)"]


def _evaluation(setting: Setting) -> list[str]:
    size = setting.eval_batch_size
    return [f"eval_batch_size below {size}"] if size > 1 else []


def _zero(setting: Setting) -> list[str]:
    if setting.zero_stage == 3 or setting.world_size == 1:
        return []
    return [
        f"a higher ZeRO stage than {setting.zero_stage} "
        f"(--ds_config ds_configs/zero{max(2, setting.zero_stage + 1)}.json)"
    ]


def _offload(setting: Setting) -> list[str]:
    if setting.offload or not setting.on_device:
        return []
    stage = 3 if setting.zero_stage == 3 else 2
    return [f"the optimizer on the host (--ds_config ds_configs/zero{stage}_offload.json)"]


def _batch(setting: Setting) -> list[str]:
    if setting.batch_size == 1:
        return []
    return [f"batch_size below {setting.batch_size} (fewer negatives: another training)"]


def _loader(setting: Setting) -> list[str]:
    if not setting.num_workers:
        return []
    ahead = setting.prefetch_factor
    return [
        f"num_workers below {setting.num_workers}"
        + (f", or prefetch_factor below {ahead}" if ahead > 1 else "")
    ]


def _no_offload(setting: Setting) -> list[str]:
    return ["DeepSpeed's JSON file without offload"] if setting.offload else []


def _figures(text: str, *, on_host: bool) -> str:
    """What was asked and what is free, as far as it is known."""
    asked, free = _ASKED.search(text), _FREE.search(text)
    known = [f"{_readable(asked[1])} asked"] if asked else []
    if free:
        known.append(f"{free[2]} of {free[1]} free")
    elif on_host and (available := free_host_bytes()):
        known.append(f"{_readable(f'{available} bytes')} free now")
    return f" ({', '.join(known)})" if known else ""


def _readable(size: str) -> str:
    number, unit = size.split()
    return f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else size


def setting(config: Config, *, zero_stage: int, offload: bool) -> Setting:
    """What a run has set.

    Args:
        config: Of the run.
        zero_stage: Of DeepSpeed.
        offload: Whether the optimizer's state lies on the host.
    """
    training = config.training
    kept = training.gradient_cache_kept_graphs
    return Setting(
        batch_size=training.batch_size,
        budget=chunk_budget(training),
        kept_graphs=1 if kept == "auto" else kept,
        loss_in_one_piece=training.loss_tile_size is None,
        eval_batch_size=inference_batch_size(config),
        gradient_checkpointing=config.model.gradient_checkpointing,
        zero_stage=zero_stage,
        offload=offload,
        world_size=comm.world_size(),
        on_device=get_accelerator().device_name() != "cpu",
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
    )
