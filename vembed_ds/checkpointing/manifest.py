"""What a checkpoint consists of: ``manifest.json``, the size and checksum of every other file.

It is the last file that is written into a checkpoint, so a folder without it is not whole.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

import vembed_ds
from vembed_ds.durable import FileRecord, hash_file, sync_folder
from vembed_ds.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_LIBRARIES = ("torch", "deepspeed", "transformers")
_CHECKSUM = "manifest_xxh3_128"
_TICK = 1e-3  # seconds


@dataclass(frozen=True)
class Manifest:
    """A checkpoint as it was committed.

    Attributes:
        step: Optimizer steps done.
        world_size: Ranks that wrote it.
        zero_stage: DeepSpeed's stage that wrote it.
        files: By path within the folder, with ``/``.
        config_digest: Of the run's resolved configuration; ``None``: it had none.
        versions: Of this package and the libraries that wrote the files.
        written_at: Seconds since 1970, by the writing rank's clock; in one folder always increasing.
        save_id: Of this very save; on disks of several machines all parts have the same.
        num_disks: Machines that have a part each; 1: a shared folder has all of it.
    """

    step: int
    world_size: int
    zero_stage: int
    files: Mapping[str, FileRecord]
    config_digest: str | None
    versions: Mapping[str, str]
    written_at: float
    save_id: str = ""
    num_disks: int = 1

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(record.num_bytes for record in self.files.values())


def new_manifest(
    files: Mapping[str, FileRecord],
    *,
    step: int,
    world_size: int,
    zero_stage: int,
    config_digest: str | None,
    save_id: str = "",
    num_disks: int = 1,
    behind: float = 0.0,
) -> Manifest:
    """The manifest of files that are written now, by the libraries that are installed.

    Args:
        files: As the others, of :class:`Manifest`.
        step: See there.
        world_size: See there.
        zero_stage: See there.
        config_digest: See there.
        save_id: See there.
        num_disks: See there.
        behind: It is later than this, although a clock may be behind the one of an earlier save.
    """
    return Manifest(
        step=step,
        world_size=world_size,
        zero_stage=zero_stage,
        files=dict(sorted(files.items())),
        config_digest=config_digest,
        versions=_versions(),
        written_at=max(time.time(), behind + _TICK),
        save_id=save_id,
        num_disks=num_disks,
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into a folder whose other files are all on the disk already.

    Raises:
        OSError: It cannot be written.
    """
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(_render(asdict(manifest)))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, after its own checksum was compared.

    Raises:
        CheckpointError: The folder or the manifest is missing, damaged, or of a later version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder; check the path")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        version = content["format_version"]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: missing, so the checkpoint was never finished, or was written before "
            "checkpoints had a manifest; take another checkpoint, or start afresh from the "
            "converted model of this one (vembed_ds.convert)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version={version!r}; this release of vembed_ds reads "
            f"{FORMAT_VERSION}; use the release that wrote it"
        )
    stated = content.pop(_CHECKSUM, None)
    body = {key: value for key, value in content.items() if key != "format_version"}
    if _render(body) != text:  # rendered again, so that not even another blank is overlooked
        raise CheckpointError(
            f"{path}: damaged: its checksum is {_digest(body)}, and {stated} was written"
        )
    try:
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        return Manifest(**{**body, "files": files})
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not as this release writes it: {error}") from error


def find_damage(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """Read files of a checkpoint and compare them with the manifest. Local.

    Args:
        folder: The checkpoint.
        files: Those to read, of its manifest.

    Returns:
        One sentence per file that is not what it was.
    """
    found = (_damage(folder / name, record) for name, record in files.items())
    return [problem for problem in found if problem is not None]


def extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files that the manifest does not know; nobody reads them."""
    return sorted(set(list_files(folder)) - manifest.files.keys())


def list_files(folder: Path) -> list[str]:
    """Paths of all files below a folder but the manifest, with ``/``."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p.relative_to(folder).as_posix() for p in files if p != folder / MANIFEST)


def share(files: Mapping[str, FileRecord], *, index: int, of: int) -> dict[str, FileRecord]:
    """The files that one of several ranks reads; all ranks read about as many bytes.

    Args:
        files: The same on every rank.
        index: Of this rank.
        of: Number of ranks.
    """
    loads = [0] * of
    mine = {}
    for name, record in sorted(files.items(), key=lambda item: (-item[1].num_bytes, item[0])):
        rank = loads.index(min(loads))
        loads[rank] += record.num_bytes + 1
        if rank == index:
            mine[name] = record
    return mine


def describe_damage(damage: Sequence[str]) -> str:
    """The first finding, and how many more there are."""
    more = f" (and {len(damage) - 1} more files)" if len(damage) > 1 else ""
    return f"{damage[0]}{more}"


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep a running training from deleting a checkpoint while it is read. Local.

    Does nothing where the file system has no locks, or the folder no manifest.
    """
    try:
        descriptor = os.open(folder / MANIFEST, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):  # no locks there, or it is being deleted: then reading says so
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def deleting(folder: Path) -> Iterator[bool]:
    """Whether a checkpoint may be deleted now: nobody is :func:`reading` it. Local."""
    try:
        descriptor = os.open(folder / MANIFEST, os.O_RDWR)
    except OSError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # no locks on this file system
            free = True
        yield free
    finally:
        os.close(descriptor)


@functools.cache
def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"vembed_ds": vembed_ds.__version__, **found}


def _damage(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.num_bytes:
            return f"{path}: has {size:,} bytes, and {record.num_bytes:,} were written"
        found = hash_file(path)
    except FileNotFoundError:
        return f"{path}: missing; {record.num_bytes:,} bytes were written"
    except OSError as error:
        return f"{path}: cannot be read: {error}"
    if found != record:
        return f"{path}: its checksum is {found.xxh3_128}, and {record.xxh3_128} was written"
    return None


def _render(body: Mapping[str, Any]) -> str:
    content = {"format_version": FORMAT_VERSION, **body, _CHECKSUM: _digest(body)}
    return json.dumps(content, indent=2) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body).encode()).hexdigest()
