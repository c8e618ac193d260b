"""Filling the tables of cached teachers without training."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vembed_ds.config.distillation import TeacherEntry, teacher_entries
from vembed_ds.config.schema import Config
from vembed_ds.data.vector_table import IDENTITY_FILE, VectorTable
from vembed_ds.distributed import comm
from vembed_ds.engine.extensions import prepare_extensions
from vembed_ds.errors import ConfigError
from vembed_ds.training.data_setup import RunData, dataset_entries, setup_data
from vembed_ds.training.loss_setup import loss_configs
from vembed_ds.training.model_setup import model_spec
from vembed_ds.training.teacher_loading import load_teacher_of
from vembed_ds.training.teachers import cache_folder, precompute_teacher

logger = logging.getLogger(__name__)


def precompute_teachers(config: Config, *, dry_run: bool = False) -> dict[str, int]:
    """Embed all items of the training data with every cached teacher, one in memory at a time.

    Collective, after ``comm.init_distributed``. Records that training would leave out are left out.

    Args:
        config: The configuration of a run.
        dry_run: Say what would be done, before a teacher is loaded, and write nothing.

    Returns:
        How many items were embedded, by the names of the teachers.

    Raises:
        VembedError: On every rank, also when no teacher is cached.
    """
    entries = _cached(config)
    losses = loss_configs(config.loss, dataset_entries(config.data))
    data = setup_data(config, model_spec(config.model, layers=losses[0].mrl_layers or ()))
    if dry_run:
        comm.run_on_main(lambda: _say_plan(config, data, entries), doing="reading teacher_cache")
        return {}
    prepare_extensions({})  # for engines without optimizer
    embedded: dict[str, int] = {}
    for entry in entries:
        teacher, folder = load_teacher_of(entry, config, data), cache_folder(config, entry)
        table, embedded[teacher.name] = precompute_teacher(teacher, config, data, folder=folder)
        teacher.close()
        if comm.is_main():
            logger.info(
                "teacher %s: embedded %d items; %s has %d",
                teacher.name,
                embedded[teacher.name],
                folder,
                len(table),
            )
    return embedded


def _say_plan(config: Config, data: RunData, entries: Sequence[TeacherEntry]) -> None:
    """Which tables would be filled, and what is in them."""
    for entry in entries:
        folder = cache_folder(config, entry)
        there = len(VectorTable(folder)) if (folder / IDENTITY_FILE).exists() else 0
        logger.info(
            "teacher %s (%s): would embed what %s, with %d items, lacks of %d records",
            entry.name,
            entry.model_name,
            folder,
            there,
            sum(len(member) for member in data.tables),
        )
    logger.info("a dry run: nothing was embedded or written")


def _cached(config: Config) -> list[TeacherEntry]:
    found = [
        entry
        for entry in teacher_entries(config.distillation)
        if entry.model_name is not None and entry.mode != "live"
    ]
    if not found:
        raise ConfigError(
            "teacher_mode: no teacher of this run is cached, so there is nothing to embed "
            "beforehand; set teacher_model_name, and teacher_mode to cached or first_epoch"
        )
    return found
