"""A content hash of a table that does not depend on how its files or chunks are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import xxhash

from vembed_ds.distributed import comm
from vembed_ds.distributed.progress import watched

ROWS_PER_BLOCK = 512


def fingerprint(dataset: datasets.Dataset) -> str:
    """Hashes column names and every cell, in order.

    Collective: the ranks share the blocks of rows, memory-mapped; the result does not depend on
    their number. Files that image paths point to are not read.

    Args:
        dataset: The table, reduced to the columns that are used; the same on every rank.

    Returns:
        32 hexadecimal digits, equal in every process for equal content.
    """
    shares = comm.all_gather_objects(_digests(dataset, comm.rank(), comm.world_size()))
    return _whole(dataset, shares)


def own_fingerprint(dataset: datasets.Dataset) -> str:
    """The same number as :func:`fingerprint`, by one process alone."""
    return _whole(dataset, [_digests(dataset, 0, 1)])


def _digests(dataset: datasets.Dataset, rank: int, world_size: int) -> list[bytes]:
    """Of every ``world_size``-th block of rows."""
    names, table = sorted(dataset.column_names), dataset.with_format("arrow")
    share = range(0, dataset.num_rows, ROWS_PER_BLOCK)[rank::world_size]
    starts = watched(share, what="hashing the data")
    return [_block_digest(table[start : start + ROWS_PER_BLOCK], names) for start in starts]


def _whole(dataset: datasets.Dataset, shares: Sequence[Sequence[bytes]]) -> str:
    whole = xxhash.xxh3_128(repr((dataset.num_rows, sorted(dataset.column_names))).encode())
    for number in range(sum(map(len, shares))):
        turn, owner = divmod(number, len(shares))
        whole.update(shares[owner][turn])
    return whole.hexdigest()


def _block_digest(block: pa.Table, names: Sequence[str]) -> bytes:
    digest = xxhash.xxh3_128()
    for name in names:
        _update(digest, block[name])
    return digest.digest()


def _update(digest: Any, column: pa.Array | pa.ChunkedArray) -> None:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_struct(column.type):
        digest.update(np.asarray(column.is_valid()).tobytes())
        for index in range(column.type.num_fields):
            _update(digest, pc.struct_field(column, [index]))
    elif _is_bytes_like(column.type):
        _update_bytes(digest, column)
    else:
        digest.update(repr(column.to_pylist()).encode())


def _update_bytes(digest: Any, column: pa.Array) -> None:
    """Hashes lengths (-1 for null) and the bytes behind them, wherever the slice starts."""
    lengths = pc.fill_null(pc.cast(pc.binary_length(column), pa.int64()), -1)
    digest.update(np.asarray(lengths).tobytes())
    values = column.drop_null()  # null cells may hide bytes
    if not len(values):
        return
    wide = values.cast(pa.large_binary())
    _, offsets_buffer, data = wide.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[
        wide.offset : wide.offset + len(wide) + 1
    ]
    if data is not None:
        digest.update(memoryview(data)[offsets[0] : offsets[-1]])


def _is_bytes_like(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )
