"""What other programs want to find in a converted folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.checkpointing.sentence_transformers_layout import (
    sentence_transformers_call,
    write_sentence_transformers,
)
from vembed_ds.checkpointing.vembed_factory_layout import (
    predictor_call,
    predictor_errors,
    predictor_problems,
    write_vembed_factory,
)
from vembed_ds.errors import CheckpointError
from vembed_ds.models.saved_folder import SETTINGS_FILE


def write_companions(folder: Path, *, settings: Mapping[str, Any], adapter: bool) -> None:
    """Add the files by which other programs read the folder, beside those that are there.

    Called once per conversion, after the weights and before the folder gets its name; what is
    written here is published with the rest, or not at all.

    Args:
        folder: Holds everything else: configs, weights, projections, processor,
            ``vembed_config.json``.
        settings: Content of that ``vembed_config.json``.
        adapter: Whether adapters were written instead of merged weights.

    Raises:
        CheckpointError: The checkpoint does not say what the files have to.
    """
    if lacking := sorted({"backbones", "image_inputs"} - settings.keys()):
        raise CheckpointError(
            f"{SETTINGS_FILE} of the checkpoint: has no {lacking[0]}, so an earlier version of "
            "vembed_ds wrote it; convert with that version"
        )
    write_sentence_transformers(folder, settings, adapter=adapter)
    write_vembed_factory(folder, settings)


def describe_readers(folder: Path) -> list[str]:
    """How other programs read a converted folder, a line each, or why one cannot."""
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    outcomes = {
        "ends with an error": predictor_errors(settings),
        "gives other embeddings": predictor_problems(settings),
    }
    found = [f"{outcome}: {'; '.join(why)}" for outcome, why in outcomes.items() if why]
    predictor = (
        f"its Predictor {', and '.join(found)}" if found else predictor_call(folder, settings)
    )
    return [
        f"sentence-transformers: {sentence_transformers_call(folder, settings)}",
        f"vembed-factory: {predictor}",
    ]
