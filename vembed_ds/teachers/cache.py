"""Tables of a frozen model's vectors that runs share and extend.

Items are found by their content, so the data is no part of a table's identity: a run on other data
adds what is missing. Two runs at once on one table do not disturb each other. Both embed what they
found missing, and both add it; the older vectors count.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.data.vector_table import VectorTable, ensure_table, list_segments, read_identity
from vembed_ds.distributed import comm
from vembed_ds.errors import DataError
from vembed_ds.teachers.identity import identity_digest

# What a model is called says nothing of its vectors: its weights and its processor do.
NAMES = ("name", "revision")


def open_cache(folder: Path, *, identity: Mapping[str, Any]) -> VectorTable | None:
    """The table in a folder, every file read and compared with its checksum. Collective.

    Args:
        folder: Every rank must see it.
        identity: What the vectors depend on: plain values. ``name`` and ``revision`` may differ.

    Returns:
        The table; ``None`` where there is none yet.

    Raises:
        DataError: On every rank: the table belongs to another model (names both digests, and what
            differs), or a file is damaged.
    """
    found = comm.run_on_main(lambda: read_identity(folder), doing=f"reading {folder}")
    if not found:
        return None
    comm.raise_together(_difference(folder, found, identity))
    table = open_table(folder)
    share = table.segments[comm.rank() :: comm.world_size()]
    comm.run_together(lambda: table.verify(share), doing=f"reading {folder}")
    return table


def ensure_cache(folder: Path, *, identity: Mapping[str, Any]) -> VectorTable:
    """As :func:`open_cache`; where there is no table yet, an empty one is made. Collective.

    Raises:
        VembedError: On every rank: as of :func:`open_cache`, or the folder cannot be written.
    """
    comm.run_on_main(lambda: ensure_table(folder, identity=identity), doing=f"writing {folder}")
    table = open_cache(folder, identity=identity)
    assert table is not None
    return table


def open_table(folder: Path) -> VectorTable:
    """The same segments on every rank, whatever other runs add meanwhile. Collective.

    Raises:
        DataError: On every rank, when a file is missing or cut short.
    """
    segments = comm.run_on_main(lambda: list_segments(folder), doing=f"reading {folder}")
    return comm.run_together(lambda: VectorTable(folder, segments), doing=f"reading {folder}")


def _difference(
    folder: Path, found: Mapping[str, Any], identity: Mapping[str, Any]
) -> DataError | None:
    there, here = _compared(found), _compared(identity)
    if identity_digest(there) == identity_digest(here):
        return None
    entries = "; ".join(
        f"{entry} was {there.get(entry)!r}, is {here.get(entry)!r}"
        for entry in sorted({*there, *here})
        if there.get(entry) != here.get(entry)
    )
    return DataError(
        f"teacher_cache={folder}: holds the vectors of another teacher, {identity_digest(there)}; "
        f"this one is {identity_digest(here)}: {entries}; name another folder, or delete this one"
    )


def _compared(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {entry: value for entry, value in identity.items() if entry not in NAMES}
