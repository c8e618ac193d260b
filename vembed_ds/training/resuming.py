"""Which checkpoint a run goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.resumable import check_resumable
from vembed_ds.checkpointing.store import find_checkpoint
from vembed_ds.config.schema import Config
from vembed_ds.training.data_setup import RunData
from vembed_ds.training.loop import Intervals

logger = logging.getLogger(__name__)


# May differ when a run is resumed: they change neither the samples nor the update.
FREE = frozenset(
    [
        "activation_checkpointing",
        "allow_image_urls",
        "allow_images_outside_root",
        "attn_implementation",
        "cache_frozen_encoder",
        "data_path",
        "epochs",
        "eval_batch_size",
        "eval_on_start",
        "eval_recall_k",
        "eval_steps",
        "gradient_cache_chunk_size",
        "gradient_checkpointing",
        "gradient_self_test",
        "image_root",
        "loader_timeout_seconds",
        "logging_steps",
        "max_steps",
        "num_workers",
        "output_dir",
        "persistent_workers",
        "pin_memory",
        "prefetch_factor",
        "report_to",
        "run_name",
        "save_steps",
        "teacher_cache",
        "teacher_ds_config",
        "teacher_trust_remote_code",
        "timeout_minutes",
        "trust_remote_code",
        "use_gradient_cache",
        "val_data_path",
    ]
)


def choose_checkpoint(
    config: Config,
    ds_config: Mapping[str, Any],
    identity: Mapping[str, Any],
    intervals: Intervals,
    resume: str | None,
) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and its step; ``(None, 0)`` for a fresh start. Collective."""
    if resume is None:
        return None, 0
    checkpoint = find_checkpoint(resume, Path(config.run.output_dir))
    if checkpoint is None:
        logger.warning("--resume auto: %s has no checkpoint; starting fresh", config.run.output_dir)
        return None, 0
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    step = check_resumable(checkpoint, zero_stage=stage, state=identity)
    logger.info("resuming from %s, step %d of %d", checkpoint, step, intervals.num_steps)
    if step >= intervals.num_steps:
        logger.warning("the run is complete: nothing is left to train")
    return checkpoint, step


def run_identity(
    config: Config, ds_config: Mapping[str, Any], data: RunData, intervals: Intervals
) -> dict[str, Any]:
    """What decides the samples, the rates and the update; a resumed run must have the same.

    Most of it would come from the checkpoint, whatever the configuration says then (the decay
    rates, the base of the learning rate), so that a change would be ignored without a word.
    """
    sections = config.model_dump(mode="json").values()
    settings = {key: value for section in sections for key, value in section.items()}
    return {
        **{key: value for key, value in settings.items() if key not in FREE},
        "optimizer (DeepSpeed)": ds_config["optimizer"],
        "num_steps": intervals.num_steps,
        "num_records": data.num_records,
        "data_fingerprint": data.fingerprint,
    }
