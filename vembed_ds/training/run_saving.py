"""What a run's checkpoints hold, and when they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.checkpointing.frozen import link_frozen_weights
from vembed_ds.checkpointing.saver import SavePolicy, Saver, resume_best
from vembed_ds.config.loading import dump_config
from vembed_ds.config.schema import Config, RunConfig
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.training.data_setup import dataset_entries
from vembed_ds.training.facts import training_facts
from vembed_ds.training.loss_setup import export_loss
from vembed_ds.training.resuming import EARLIER, SETTINGS, Resumption
from vembed_ds.training.teacher_sources import Teachers


def build_saver(config: Config, engine: TrainEngine, resumption: Resumption | None) -> Saver:
    """Whoever writes this run's checkpoints. Collective."""
    folder = Path(config.run.output_dir)
    return Saver(
        engine.engine,
        output_dir=folder,
        policy=save_policy(config.run),
        config_digest=config_digest(config),
        best=resume_best(
            None if resumption is None else resumption.folder,
            folder,
            metric=config.run.best_metric,
            node_local=config.run.node_local_output,
        ),
    )


def save_policy(run: RunConfig) -> SavePolicy:
    """What the configuration says of checkpoints."""
    return SavePolicy(
        total_limit=run.save_total_limit,
        best_metric=run.best_metric,
        on_error=run.on_save_error,
        background=run.save_async,
        timeout_minutes=run.timeout_minutes,
        node_local=run.node_local_output,
    )


def config_digest(config: Config) -> str:
    """Tells two resolved configurations apart."""
    return xxhash.xxh3_128(dump_config(config).encode()).hexdigest()


def save_step(
    config: Config,
    model: EmbeddingModel,
    saver: Saver,
    processor: ItemProcessor,
    state: Mapping[str, Any],
    teachers: Teachers,
    step: int,
) -> Path | None:
    """Write the checkpoint of a step; as :meth:`Saver.save`. Collective."""

    def describe(place: Path) -> None:
        settings = export_settings(config)
        stage = saver.engine.zero_optimization_stage()
        facts = training_facts(
            config,
            step=step,
            zero_stage=stage,
            settings=state[SETTINGS],
            earlier=state[EARLIER],
        )
        describe_model(place, model=model, processor=processor, settings=settings, facts=facts)
        link_frozen_weights(saver.output_dir, place)

    return saver.save(step, state=state, describe=describe, write=teachers.save)


def export_settings(config: Config) -> dict[str, Any]:
    """What ``vembed_config.json`` says beside the shape of the model.

    What differs between the data sets is null there: no reader may take one for all.
    """
    entries = [entry.model_dump() for entry in dataset_entries(config.data).values()]
    names = (
        "retrieval_mode",
        "column_mapping",
        "image_root",
        "query_instruction",
        "document_instruction",
    )
    shared = {
        name: entries[0][name] if all(e[name] == entries[0][name] for e in entries) else None
        for name in names
    }
    return {
        **shared,
        "prompt": config.data.prompt,
        **export_loss(config.loss),
        "precision": config.model.precision,
    }
