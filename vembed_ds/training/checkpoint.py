"""A checkpoint that is a plain Hugging Face folder and can be gone on from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.checkpointing.export import export_model
from vembed_ds.checkpointing.frozen import link_frozen_weights
from vembed_ds.checkpointing.names import LATEST
from vembed_ds.checkpointing.publish import new_folder, refuse_filled
from vembed_ds.checkpointing.restore import load_checkpoint as _load
from vembed_ds.checkpointing.saving import save_checkpoint as _save
from vembed_ds.checkpointing.store import find_checkpoint
from vembed_ds.config.schema import Config
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.distributed import comm
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import CheckpointError
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.training.config import as_config
from vembed_ds.training.facts import training_facts
from vembed_ds.training.run_saving import export_settings

STATE_FOLDER = "training_state"
_MADE = ".model"


def save_checkpoint(
    path: str | Path,
    model: EmbeddingModel,
    engine: TrainEngine,
    processor: Any = None,
    config: Config | Mapping[str, Any] | None = None,
) -> Path:
    """Write model, processor and settings as :class:`Encoder` reads them, and the engine's state.

    Collective: every rank calls it. The folder appears whole or not at all; in it,
    ``training_state/`` holds the ranks' shards, for :func:`load_checkpoint`.

    Args:
        path: New or empty folder, which all ranks share.
        model: The model inside the engine.
        engine: From :func:`prepare_engine`.
        processor: Tokenizer, image processor, both in one of Hugging Face's, or an
            :class:`ItemProcessor`; ``None``: none is written.
        config: Whose settings stand in ``vembed_config.json``; ``None``: the model's own only.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds something.
    """
    path = Path(path)
    comm.run_together(lambda: refuse_filled(path), doing=f"writing {path}")
    found = None if config is None else as_config(config)
    items = _item_processor(processor)

    def describe(place: Path) -> None:
        settings, facts = {}, None
        if found is not None:
            stage = engine.engine.zero_optimization_stage()
            settings = export_settings(found)
            facts = training_facts(found, step=step, zero_stage=stage)
        describe_model(place, model=model, processor=items, settings=settings, facts=facts)
        if found is not None:
            link_frozen_weights(Path(found.run.output_dir), place)

    state = path.with_name(f".{path.name}.{STATE_FOLDER}")
    step = int(engine.engine.global_steps)
    saved = _save(engine.engine, output_dir=state, step=step, state={}, describe=describe)
    trusted = found is not None and found.model.trust_remote_code
    comm.run_together(
        lambda: _finish(saved, state, path, trust_remote_code=trusted), doing=f"writing {path}"
    )
    return path


def load_checkpoint(path: str | Path, engine: TrainEngine) -> int:
    """Put weights, optimizer, schedule and random state back. Collective.

    Args:
        path: What :func:`save_checkpoint` wrote, on any number of ranks and with any ZeRO stage.
        engine: Of the same model, with the same kind of optimizer and a schedule as well.

    Returns:
        Optimizer steps that it had done.

    Raises:
        CheckpointError: On every rank: there is no such state, or it is damaged.
    """
    folder = Path(path) / STATE_FOLDER
    comm.run_together(lambda: _require_state(folder), doing=f"reading {folder}")
    checkpoint = find_checkpoint(str(folder), folder)
    assert checkpoint is not None  # only for "auto"
    _load(engine.engine, checkpoint)
    return int(engine.engine.global_steps)


def _require_state(folder: Path) -> None:
    if not (folder / LATEST).is_file():
        raise CheckpointError(
            f"{folder / LATEST}: missing; give a folder that save_checkpoint wrote, whole"
        )


def _finish(saved: Path, state: Path, path: Path, *, trust_remote_code: bool) -> None:
    """Model folder and state get the name together."""
    if not comm.is_main():
        return
    with new_folder(path) as folder:
        # Under the name that the model card shows.
        made = folder / _MADE / path.name
        export_model(saved, made, trust_remote_code=trust_remote_code)
        for entry in made.iterdir():
            entry.replace(folder / entry.name)
        shutil.rmtree(folder / _MADE)
        state.replace(folder / STATE_FOLDER)


def _item_processor(processor: Any) -> ItemProcessor:
    if isinstance(processor, ItemProcessor):
        return processor
    tokenizer = getattr(processor, "tokenizer", None)
    image_processor = getattr(processor, "image_processor", None)
    if processor is not None and tokenizer is None and image_processor is None:
        is_tokenizer = hasattr(processor, "get_vocab")
        tokenizer, image_processor = (processor, None) if is_tokenizer else (None, processor)
    return ItemProcessor(
        tokenizer=tokenizer,
        image_processor=image_processor,
        max_length=None if tokenizer is None else int(tokenizer.model_max_length),
    )
