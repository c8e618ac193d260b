"""What a converted folder holds for readers other than this package and transformers."""

from __future__ import annotations

from pathlib import Path


def write_other_readers(folder: Path) -> None:
    """Add the files of other programs to a converted folder, before it gets its name.

    Args:
        folder: Complete for :class:`Encoder`, its ``vembed_config.json`` included.
    """
