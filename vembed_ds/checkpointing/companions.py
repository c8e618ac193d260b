"""What other programs want to find in a converted folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_companions(folder: Path, *, settings: Mapping[str, Any], adapter: bool) -> None:
    """Add the files by which other programs read the folder, beside those that are there.

    Called once per conversion, after the weights and before the folder gets its name; what is
    written here is published with the rest, or not at all.

    Args:
        folder: Holds everything else: configs, weights, projections, processor,
            ``vembed_config.json``.
        settings: Content of that ``vembed_config.json``.
        adapter: Whether adapters were written instead of merged weights.
    """
