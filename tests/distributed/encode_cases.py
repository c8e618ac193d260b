"""What the ranks of ``test_encode.py`` run."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from vembed_ds import encode
from vembed_ds.distributed import comm
from vembed_ds.encoding import run as encoding_run
from vembed_ds.encoding import store
from vembed_ds.errors import VembedError


def encode_files(
    argv: list[str], *, block_rows: int, fails_at: int | None = None, fails_on: int = 0
) -> dict[str, Any]:
    """Run the command on this rank; the disk of one rank may be full from its n-th block on.

    Returns:
        ``error``, where there was one, and how many blocks this rank wrote.
    """
    written: list[int] = []
    arguments = encode.build_parser().parse_args(argv)
    failing = fails_at if comm.rank() == fails_on else None
    try:
        with small_blocks(block_rows), _counted(written, failing):
            encode.run(arguments)
    except VembedError as error:
        return {"error": f"{type(error).__name__}: {error}", "written": written}
    return {"written": written}


@contextmanager
def small_blocks(block_rows: int) -> Iterator[None]:
    """Blocks of so few rows that a small table has several."""
    options = encoding_run.Options

    def small(**given: Any) -> Any:
        return options(**given, block_rows=block_rows)

    with mock.patch.object(encoding_run, "Options", small):
        yield


@contextmanager
def _counted(written: list[int], fails_at: int | None) -> Iterator[None]:
    def wrapped(write: Any) -> Any:
        def counting(self: Any, start: int, rows: Any) -> None:
            if len(written) == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, start, rows)
            written.append(start)

        return counting

    with (
        mock.patch.object(store.VectorFile, "write", wrapped(store.VectorFile.write)),
        mock.patch.object(store.TokenFiles, "write", wrapped(store.TokenFiles.write)),
    ):
        yield


def files_of(folder: Path) -> dict[str, bytes]:
    """The files that do not say when or how they were made."""
    names = (store.EMBEDDINGS_FILE, store.OFFSETS_FILE, store.IDS_FILE)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
