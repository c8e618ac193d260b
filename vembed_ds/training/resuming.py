"""Which checkpoint a run goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.store import check_resumable, find_checkpoint
from vembed_ds.config.schema import Config
from vembed_ds.distributed import comm
from vembed_ds.training.data_setup import RunData
from vembed_ds.training.trainer import Intervals

logger = logging.getLogger(__name__)


def choose_checkpoint(
    config: Config,
    ds_config: Mapping[str, Any],
    data: RunData,
    intervals: Intervals,
    resume: str | None,
) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and its step; ``(None, 0)`` for a fresh start."""
    if resume is None:
        return None, 0
    checkpoint = comm.run_together(
        lambda: find_checkpoint(resume, Path(config.run.output_dir)), doing=f"--resume {resume}"
    )
    comm.require_equal(checkpoint and checkpoint.name, what=f"--resume {resume}")
    if checkpoint is None:
        logger.warning("--resume auto: %s has no checkpoint; starting fresh", config.run.output_dir)
        return None, 0
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    state = run_identity(config, data, intervals)
    step = check_resumable(checkpoint, zero_stage=stage, state=state)
    logger.info("resuming from %s, step %d of %d", checkpoint, step, intervals.num_steps)
    if step >= intervals.num_steps:
        logger.warning("the run is complete: nothing is left to train")
    return checkpoint, step


def run_identity(config: Config, data: RunData, intervals: Intervals) -> dict[str, Any]:
    """What decides which samples and rates come next; a resumed run must have the same."""
    return {
        "batch_size": config.training.batch_size,
        "seed": config.training.seed,
        "num_steps": intervals.num_steps,
        "num_records": len(data.train),
        "data_fingerprint": data.fingerprint,
    }
