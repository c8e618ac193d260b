"""When ZeRO-3 gathers parameters and when gradients are reduced, where ``auto`` leaves it to us."""

from __future__ import annotations

import logging
from enum import StrEnum

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from vembed_ds.distributed import comm
from vembed_ds.engine.memory import WholeBytes, rank_bytes
from vembed_ds.engine.whole_parameters import missing_internals
from vembed_ds.errors import ConfigError

logger = logging.getLogger(__name__)

AUTO = "auto"
GATHER_SHARE = 0.25
"""Most of a rank's memory that ``zero3_gather: auto`` gives to what it holds whole."""
GRADIENT_SHARE = 0.25
"""Most of a rank's memory that ``gradient_reduction: auto`` gives to whole gradients."""


class Gather(StrEnum):
    """When ZeRO-3 gathers parameters; the more a rank may hold, the less has to travel."""

    ONCE = "once"
    CACHE_PASS = "cache_pass"
    PER_MODULE = "per_module"


class Reduce(StrEnum):
    """When gradients are reduced over the ranks."""

    ONCE = "once"
    PER_CHUNK = "per_chunk"


def choose_reduce(wanted: str, need: WholeBytes, *, zero_stage: int) -> Reduce:
    """How gradients are reduced, the same on every rank. Collective with ``auto``.

    Args:
        wanted: A value of :class:`Reduce`, or ``auto``.
        need: Of the model.
        zero_stage: Below 2 every rank keeps whole gradients in any case.
    """
    if wanted != AUTO:
        return Reduce(wanted)
    if zero_stage < 2:
        return Reduce.ONCE
    has = rank_bytes()
    too_much = reduce_that_fits(need, has) is Reduce.PER_CHUNK
    chosen = Reduce.PER_CHUNK if comm.all_max([int(too_much)])[0] else Reduce.ONCE
    if comm.is_main():
        logger.info(
            "gradient_reduction: %s (whole gradients take %s of %s per rank, limit %.0f %%)",
            *(chosen, _gigabytes(need.gradients), _gigabytes(has), 100 * GRADIENT_SHARE),
        )
    return chosen


def choose_gather(wanted: str, engine: DeepSpeedEngine, need: WholeBytes) -> Gather:
    """How ZeRO-3 gathers, the same on every rank. Collective at stage 3.

    Args:
        wanted: A value of :class:`Gather`, or ``auto``.
        engine: Of any stage; below 3 nothing is gathered.
        need: What a rank would hold whole in a step.

    Raises:
        ConfigError: DeepSpeed does not gather as the version that this was written for.
    """
    if engine.zero_optimization_stage() != 3 or wanted == Gather.PER_MODULE:
        return Gather.PER_MODULE
    missing = missing_internals(engine)
    if missing and wanted != AUTO:
        raise ConfigError(
            f"zero3_gather={wanted}: DeepSpeed {deepspeed.__version__} gathers parameters in another "
            f"way than 0.19.8 ({missing}); set zero3_gather: per_module"
        )
    if wanted != AUTO:
        return Gather(wanted)
    has = rank_bytes()
    chosen = Gather.PER_MODULE if missing else gather_that_fits(need, has)
    order = list(Gather)
    chosen = order[comm.all_max([order.index(chosen)])[0]]
    if comm.is_main():
        logger.info(
            "zero3_gather: %s (whole parameters take %s, gradients %s of %s per rank, limit %.0f %%%s)",
            *(chosen, _gigabytes(need.parameters), _gigabytes(need.gradients), _gigabytes(has)),
            *(100 * GATHER_SHARE, f"; {missing}" if missing else ""),
        )
    return chosen


def reduce_that_fits(need: WholeBytes, has: int) -> Reduce:
    """What ``gradient_reduction: auto`` is on a rank with so much memory, from ZeRO-2 on."""
    return Reduce.PER_CHUNK if need.gradients > GRADIENT_SHARE * has else Reduce.ONCE


def gather_that_fits(need: WholeBytes, has: int) -> Gather:
    """What ``zero3_gather: auto`` is on a rank with so much memory."""
    limit = GATHER_SHARE * has
    if need.parameters + need.gradients <= limit:
        return Gather.ONCE
    return Gather.CACHE_PASS if need.parameters <= limit else Gather.PER_MODULE


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"
