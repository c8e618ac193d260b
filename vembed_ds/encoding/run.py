"""Encoding a table on all ranks, so that a second call goes on where the first was killed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vembed_ds.data.fingerprint import fingerprint
from vembed_ds.distributed import comm
from vembed_ds.encoding.embedding import (
    embed_groups,
    embedder,
    groups_of,
    model_fingerprint,
)
from vembed_ds.encoding.items import ItemTable
from vembed_ds.encoding.store import (
    BLOCK_ROWS,
    Identity,
    Manifest,
    TokenFiles,
    VectorFile,
    check_complete,
    check_folder,
    open_files,
    read_manifest,
    remove_files,
    require_same,
    write_ids,
)
from vembed_ds.errors import ConfigError, DataError, counted
from vembed_ds.inference import Encoder
from vembed_ds.similarity import Embeddings, concatenate


@dataclass(frozen=True)
class Options:
    """How a table is encoded.

    Attributes:
        batch_size: Items in one forward pass.
        num_workers: Loader processes per rank, at most.
        dtype: ``float32`` or ``float16``, of the files.
        dims: First dimensions that are kept; ``None``: all.
        normalize: Scale what is kept to length 1.
        precision: Name of the weights' number format, for the manifest.
        block_rows: Rows that are done or not done together.
    """

    batch_size: int = 32
    num_workers: int = 4
    dtype: str = "float32"
    dims: int | None = None
    normalize: bool = True
    precision: str = "fp32"
    block_rows: int = BLOCK_ROWS


@dataclass(frozen=True)
class Plan:
    """What is to be done in a folder.

    Attributes:
        folder: Of the output.
        manifest: As it is, or will be when the work begins.
        found: Whether the folder holds it already.
    """

    folder: Path
    manifest: Manifest
    found: bool

    @property
    def rows_left(self) -> int:
        """Rows that are not on the disk yet."""
        return sum(len(self.manifest.rows(block)) for block in self.manifest.pending())


def plan_encoding(
    encoder: Encoder,
    items: ItemTable,
    *,
    folder: Path,
    options: Options,
    model_name: str,
    data_paths: Sequence[str],
    overwrite: bool,
) -> Plan:
    """What there is to do; writes nothing. Collective, the result is the same on every rank.

    Raises:
        ConfigError: The folder holds something else, or more dimensions are asked for than there are.
        DataError: A file is missing, or cut short, of a folder that is complete.
        DistributedError: The ranks see different models or data.
    """
    probe = embedder(encoder)([encoder.processor.filler(encoder.model.parts[0])])
    if options.dims is not None and options.dims > probe.width:
        raise ConfigError(
            f"--dims {options.dims}: the model's embeddings have {counted(probe.width, 'dimension')}; "
            f"give at most {probe.width}"
        )
    comm.require_equal(len(items), what=f"number of records in {items.origin}")
    identity = Identity(
        model=model_fingerprint(encoder),
        data=fingerprint(items.table),
        count=len(items),
        dims=options.dims or probe.width,
        dtype=options.dtype,
        tokens=probe.mask is not None,
        settings={
            "columns": {**items.columns.parts, "id": items.columns.id},
            "instruction": items.instruction,
            "image_root": items.image_root,
            "normalize": options.normalize,
            "precision": options.precision,
        },
    )
    names = {"model_name": model_name, "data_paths": list(data_paths)}
    fresh = Manifest(identity, names, block_rows=options.block_rows)
    comm.run_on_main(lambda: check_folder(folder), doing=f"reading {folder}")
    if overwrite:
        return Plan(folder, fresh, found=False)
    found = comm.run_on_main(lambda: read_manifest(folder), doing=f"reading {folder}")
    if found is None:
        return Plan(folder, fresh, found=False)
    require_same(folder, found.identity, identity)
    if found.complete:
        comm.run_on_main(lambda: check_complete(folder, identity), doing=f"reading {folder}")
    return Plan(folder, found, found=True)


def encode_table(encoder: Encoder, items: ItemTable, plan: Plan, *, options: Options) -> None:
    """Embed the rows that are not done, each rank a share of their blocks, and complete the folder.

    Collective; a complete folder stays as it is. Which rows are embedded together does not depend on
    the number of ranks, nor on what an earlier call did, so the files are the same.

    Raises:
        VembedError: On every rank: a record cannot be used, an embedding is not finite, or a file
            cannot be written.
    """
    folder, manifest = plan.folder, plan.manifest
    files = open_files(folder, manifest.identity)
    if manifest.complete:  # but a run that was killed then may have left what it made it of
        comm.run_on_main(files.clean, doing=f"writing {folder}")
        return
    comm.run_on_main(lambda: _begin(plan, files), doing=f"writing {folder}")
    pending, size = manifest.pending(), comm.world_size()
    own = pending[comm.rank() :: size]
    blocks = _blocks(encoder, items, [manifest.rows(block) for block in own], options=options)
    for turn in range(-(-len(pending) // size)):
        rows = manifest.rows(own[turn]) if turn < len(own) else None  # other ranks have one more
        write = functools.partial(_write_block, blocks, files, rows, items, options)
        comm.run_together(write, doing=f"writing {folder}")
        # All ranks' blocks are on the disk now; only then are they marked.
        done = pending[turn * size : (turn + 1) * size]
        manifest.blocks_done = tuple(sorted((*manifest.blocks_done, *done)))
        comm.run_on_main(lambda: manifest.write(folder), doing=f"writing {folder}")
    comm.run_on_main(lambda: _finish(plan, files, items), doing=f"writing {folder}")


def _begin(plan: Plan, files: VectorFile | TokenFiles) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    if not plan.found:
        remove_files(plan.folder)
        plan.manifest.write(plan.folder)
    files.begin(anew=not plan.manifest.blocks_done)


def _finish(plan: Plan, files: VectorFile | TokenFiles, items: ItemTable) -> None:
    files.finish()
    write_ids(plan.folder, items.table, items.columns.id)
    plan.manifest.complete = True
    plan.manifest.write(plan.folder)
    files.clean()


def _blocks(
    encoder: Encoder, items: ItemTable, blocks: Sequence[range], *, options: Options
) -> Iterator[Embeddings]:
    """The embeddings of every block, as the files shall hold them. Not collective."""
    groups = [groups_of(rows, batch_size=options.batch_size) for rows in blocks]
    parts = embed_groups(
        items,
        [group for block in groups for group in block],
        embed=embedder(encoder),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        name="encoding",
    )
    for block in groups:
        yield shaped(concatenate([next(parts) for _ in block]), options)


def shaped(rows: Embeddings, options: Options) -> Embeddings:
    """Cut to the dimensions that are kept (Kusupati et al. 2022), and scaled to length 1."""
    rows = rows if options.dims is None else rows.prefix(options.dims)
    return rows.normalized() if options.normalize else rows


def _write_block(
    blocks: Iterator[Embeddings],
    files: VectorFile | TokenFiles,
    rows: range | None,
    items: ItemTable,
    options: Options,
) -> None:
    if rows is None:
        return
    found = next(blocks)
    _check_finite(found, rows, items, options)
    files.write(rows.start, found)


def _check_finite(found: Embeddings, rows: range, items: ItemTable, options: Options) -> None:
    """Name the first row that holds no numbers, or none that the files can hold.

    Raises:
        DataError: There is one.
    """
    values = found.values
    if found.mask is not None:
        values = values.masked_fill(~found.mask.unsqueeze(-1), 0.0)
    bad = ~torch.isfinite(values).flatten(1).all(dim=1)
    if bad.any():
        raise DataError(
            f"{items.origin}, record {rows[int(bad.long().argmax())]}: the embedding is NaN or infinite "
            f"({counted(int(bad.sum()), 'record')} of {rows.start} to {rows.stop - 1}): the model has "
            "diverged, or needs --precision fp32"
        )
    limit = float(np.finfo(options.dtype).max)
    large = (values.abs() > limit).flatten(1).any(dim=1)
    if large.any():
        raise DataError(
            f"{items.origin}, record {rows[int(large.long().argmax())]}: the embedding has values above "
            f"{limit:g}, which --dtype {options.dtype} does not hold; give --dtype float32 or --normalize"
        )
