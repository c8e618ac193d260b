"""A trained checkpoint as a plain Hugging Face folder.

What the weights belong to lies beside them, see ``describe.py``.

=====================  =====================================  ==============================
                       one backbone                           composed encoder
=====================  =====================================  ==============================
root                   config.json, model.safetensors,        tokenizer and image processor,
                       tokenizer, image processor,            vembed_config.json, README.md
                       vembed_config.json, README.md
text_encoder/,         -                                      config.json, model.safetensors,
image_encoder/                                                own tokenizer, image processor
projection, if any     projection_head.safetensors            text_projection.safetensors,
                                                              image_projection.safetensors
=====================  =====================================  ==============================

Adapters are merged into the weights, or written instead of them: then ``adapter_config.json`` and
``adapter_model.safetensors`` take the place of ``config.json`` and ``model.safetensors``.

One tensor is in memory at a time, or those that one conversion of transformers takes together (the
experts of a layer); a merged layer costs its weight twice and some rows in float64.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from vembed_ds.checkpointing.card import read_evaluations, read_facts, write_card
from vembed_ds.checkpointing.companions import write_companions
from vembed_ds.checkpointing.describe import write_json
from vembed_ds.checkpointing.files import resolve_checkpoint
from vembed_ds.checkpointing.manifest import (
    MANIFEST,
    extra_files,
    find_damage,
    read_manifest,
    reading,
)
from vembed_ds.checkpointing.planning import (
    DTYPES,
    Options,
    Plan,
    left_out,
    plan_export,
    read_settings,
)
from vembed_ds.checkpointing.publish import new_folder, refuse_filled, refuse_without_space
from vembed_ds.errors import CheckpointError
from vembed_ds.models.saved_folder import SETTINGS_FILE

logger = logging.getLogger(__name__)

_INDEX = "safetensors.index.json"
_PROGRESS_AFTER_SECONDS = 5


def export_model(checkpoint: Path, out: Path, **options: Any) -> Path:
    """Convert a checkpoint to a Hugging Face folder.

    The checkpoint is compared with its manifest first. The folder appears whole or not at all: it
    is written under another name beside ``out``.

    Args:
        checkpoint: ``<output_dir>/checkpoint-step-<N>``, or ``<output_dir>`` for its ``latest``.
        out: New or empty folder.
        options: Those of :class:`Options`.

    Returns:
        The folder ``checkpoint-step-<N>``.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete, damaged or does not fit its description,
            ``out`` holds something or lies in the checkpoint, there is no adapter to write, a value is
            beyond ``dtype``, or the disk is full.
    """
    wanted = Options(**options)
    refuse_filled(out.resolve())
    checkpoint = resolve_checkpoint(checkpoint)
    _refuse_inside(checkpoint, out)
    with reading(checkpoint):
        _compare_with_manifest(checkpoint, show_progress=wanted.show_progress)
        _write(plan_export(checkpoint, wanted), out.resolve())
    return checkpoint


def _refuse_inside(checkpoint: Path, out: Path) -> None:
    if out.resolve().is_relative_to(checkpoint.resolve()):
        raise CheckpointError(
            f"{out}: lies in the checkpoint {checkpoint}, with which training deletes it "
            "(save_total_limit); give a folder outside of it"
        )


def _write(plan: Plan, out: Path) -> None:
    sizes = plan.sizes()
    refuse_without_space(out, size=sum(sizes.values()))
    with new_folder(out) as folder:
        omitted = left_out(plan.description, plan.options)
        shutil.copytree(
            plan.description,
            folder,
            ignore=lambda place, names: [name for name in names if Path(place, name) in omitted],
            dirs_exist_ok=True,
        )
        for component, model in plan.models.items():
            with _without_bars():  # config and code; of the weights there are none
                model.save_pretrained(folder / component, state_dict={})
        _write_parts(folder, plan, total=sum(sizes.values()))
        settings = _write_settings(folder, plan)
        write_companions(folder, settings=settings, adapter=plan.options.adapter)
        facts = read_facts(plan.description)
        write_card(
            folder,
            name=out.name,
            settings=settings,
            facts=facts,
            evaluations=read_evaluations(plan.checkpoint, last_step=facts.get("step")),
            adapter=plan.options.adapter,
        )


def _compare_with_manifest(checkpoint: Path, *, show_progress: bool) -> None:
    """See that every file is what the run committed.

    Raises:
        CheckpointError: One is not; names it.
    """
    if not (checkpoint / MANIFEST).is_file():
        logger.warning(
            "%s: has no %s (written before checkpoints had one?), so its files are not compared "
            "with what was written",
            checkpoint,
            MANIFEST,
        )
        return
    manifest = read_manifest(checkpoint)
    if manifest.num_disks > 1:
        more = extra_files(checkpoint, manifest)
        logger.warning(
            "%s: lists the files of one of %d machines (node_local_output), so %d of %d files are "
            "compared with what was written; not compared: %s",
            checkpoint / MANIFEST,
            manifest.num_disks,
            len(manifest.files),
            len(manifest.files) + len(more),
            ", ".join(more) or "none, so those of the other machines are missing",
        )
    with _progress(manifest.num_bytes, "checking", shown=show_progress) as progress:
        for name, record in manifest.files.items():
            if damage := find_damage(checkpoint, {name: record}):
                raise CheckpointError(f"{damage[0]}; take another checkpoint")
            progress.update(record.num_bytes)


def _progress(total: int, doing: str, *, shown: bool) -> Any:
    """A bar that appears when there is something to wait for."""
    return tqdm(
        total=total,
        desc=doing,
        unit="B",
        unit_scale=True,
        delay=_PROGRESS_AFTER_SECONDS,
        disable=not shown,
    )


def _write_parts(folder: Path, plan: Plan, *, total: int) -> None:
    dtype = DTYPES[plan.options.dtype]
    with _progress(total, "writing", shown=plan.options.show_progress) as progress:
        for part in plan.parts:
            files = part.files(folder)
            for file in dict.fromkeys(files.values()):
                file.create()
            for piece in part.pieces:
                for name, tensor in piece.make().items():
                    _refuse_beyond(name, tensor, dtype)
                    progress.update(files[name].write(name, tensor))
            for file in dict.fromkeys(files.values()):
                file.finish()
            if (index := part.index()) is not None:
                text = json.dumps(index, indent=2, sort_keys=True) + "\n"
                (folder / f"{part.stem}.{_INDEX}").write_text(text, encoding="utf-8")


def _refuse_beyond(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """See that the format to write holds every value; numbers that count keep theirs.

    Raises:
        CheckpointError: A value is beyond what the format holds.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype or not tensor.numel():
        return
    low, high = torch.aminmax(tensor)
    largest, limit = max(-float(low), float(high)), torch.finfo(dtype).max
    if largest > limit:
        raise CheckpointError(
            f"{name}: holds {largest:.6g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{limit:.6g}; write float32, or bfloat16"
        )


def _write_settings(folder: Path, plan: Plan) -> dict[str, Any]:
    learned = {name: float(plan.values.read(own)) for name, own in plan.learned.items()}
    settings = read_settings(folder) | {"dtype": plan.options.dtype} | learned
    write_json(folder / SETTINGS_FILE, settings)
    return settings


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
