"""Writing a checkpoint so that a crash at any moment leaves the earlier ones, and this one or none.

Every rank writes, hashes and flushes its files in ``.checkpoint-step-N.partial``; the ranks agree;
rank 0 writes the manifest, gives the folder its name, and moves ``latest``. Collectives lie between
these steps, so an error of one rank's files is kept until all ranks can raise it together.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError

from vembed_ds.checkpointing.disks import Disk, this_disk
from vembed_ds.checkpointing.manifest import (
    list_files,
    new_manifest,
    write_manifest,
)
from vembed_ds.checkpointing.names import (
    BEST,
    LATEST,
    checkpoint_name,
    move_pointer,
    partial_name,
)
from vembed_ds.checkpointing.random_state import save_random_state
from vembed_ds.checkpointing.rotation import (
    confirm,
    latest_time,
    put_in_place,
    remove_leftovers,
)
from vembed_ds.checkpointing.store import STATE
from vembed_ds.distributed import comm
from vembed_ds.durable import (
    FileRecord,
    WriteFailure,
    hash_file,
    sync_file,
    sync_folder,
    write_failure,
)
from vembed_ds.engine.checkpoint_files import CheckpointFiles, save_engine
from vembed_ds.errors import SaveError, StorageError, VembedError, one_line

T = TypeVar("T")

# Universal checkpoints of ZeRO-1/2 cannot be made later without it.
_UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


@dataclass
class Snapshot:
    """A checkpoint whose content is settled, and not yet committed.

    Attributes:
        folder: What it will be called.
        partial: Where it lies until then.
        step: Optimizer steps done.
        zero_stage: Of the engine.
        config_digest: Of the run's configuration.
        disk: Where it lies.
        files: DeepSpeed's, of this rank.
        error: What went wrong with this rank's other files.
    """

    folder: Path
    partial: Path
    step: int
    zero_stage: int
    config_digest: str | None
    disk: Disk
    files: CheckpointFiles
    error: WriteFailure | None


def save_checkpoint(
    engine: DeepSpeedEngine,
    *,
    output_dir: Path,
    step: int,
    state: Mapping[str, Any],
    describe: Callable[[Path], None],
    write: Callable[[Path], None] = lambda folder: None,
    config_digest: str | None = None,
) -> Path:
    """Write weights, optimizer, schedule, random states and ``state``; then move ``latest``.

    Collective: every rank calls it.

    Args:
        engine: The engine to save.
        output_dir: Folder of the run.
        step: Optimizer steps done.
        state: Plain values, kept as JSON.
        describe: Called on rank 0 with the folder ``model/``, to write what rebuilds the model.
        write: Called on every rank with the checkpoint's folder, to write more of the rank's state,
            in files named ``*_rank_<R>.*``; not collective.
        config_digest: Of the run's configuration, for the manifest.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveError: On every rank: a file of any rank could not be written. Earlier checkpoints
            are as they were.
    """
    snapshot = take_snapshot(
        engine,
        output_dir=output_dir,
        step=step,
        state=state,
        describe=describe,
        write=write,
        config_digest=config_digest,
        deferred=False,
        disk=this_disk(node_local=False),
    )
    return commit(snapshot)


def take_snapshot(
    engine: DeepSpeedEngine,
    *,
    output_dir: Path,
    step: int,
    state: Mapping[str, Any],
    describe: Callable[[Path], None],
    write: Callable[[Path], None],
    config_digest: str | None,
    deferred: bool,
    disk: Disk,
) -> Snapshot:
    """Settle the content of a checkpoint; :func:`commit` must follow. Collective.

    Args:
        engine: As the others, of :func:`save_checkpoint`.
        output_dir: See there.
        step: See there.
        state: See there.
        describe: See there.
        write: See there.
        config_digest: See there.
        deferred: Copy the engine's tensors and leave the writing to :func:`commit`, which may then
            run in another thread; the small files are written at once.
        disk: Where it lies; on every disk one rank writes what all ranks would write alike.

    Returns:
        What this rank has of it. File errors are in it and not raised.
    """
    folder = output_dir / checkpoint_name(step)
    partial = output_dir / partial_name(folder.name)
    error = _attempt(lambda: _make_folder(partial), partial) if disk.leads else None
    comm.barrier()  # or another rank's first file would be removed with what a crash left
    files = save_engine(
        engine, partial, client_state=dict(_UNIVERSAL), deferred=deferred, leads=disk.leads
    )
    facts = {
        "step": step,
        "world_size": comm.world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        **state,
    }

    def write_own_files() -> None:
        save_random_state(partial)
        write(partial)
        if disk.leads:
            describe(partial / "model")
            (partial / STATE).write_text(json.dumps(facts, indent=2))

    error = error or _attempt(write_own_files, partial)
    return Snapshot(
        folder=folder,
        partial=partial,
        step=step,
        zero_stage=facts["zero_stage"],
        config_digest=config_digest,
        disk=disk,
        files=files,
        error=error,
    )


def commit(snapshot: Snapshot, *, best: bool = False) -> Path:
    """Bring a checkpoint to the disk and give it its name. Collective.

    May run in another thread than the training, inside :func:`comm.on_group`.

    Args:
        snapshot: From :func:`take_snapshot` on every rank.
        best: Whether ``best`` moves too.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveError: On every rank. The partial folder is gone then; or the checkpoint is whole and
            ``latest`` does not name it, so that nobody would take it by himself.
    """
    folder, partial = snapshot.folder, snapshot.partial
    snapshot.files.write_deferred()
    error = snapshot.files.error or snapshot.error
    own: dict[str, FileRecord] = {}

    def flush_own_files() -> None:
        for path, record in snapshot.files.records.items():
            own[path.relative_to(partial).as_posix()] = record
        own.update(_flush(partial, [name for name in list_files(partial) if _is_own(name)]))

    error = error or _attempt(flush_own_files, partial)
    parts = _agree(_Part(snapshot.disk.name, own, uuid.uuid4().hex), error, snapshot)

    def seal() -> None:
        if snapshot.disk.leads:
            _seal(snapshot, parts)

    def publish() -> None:
        if snapshot.disk.leads:
            put_in_place(partial, folder)

    def point() -> None:
        if snapshot.disk.leads:
            confirm(folder)
            move_pointer(folder.parent, LATEST, folder)
            if best:
                move_pointer(folder.parent, BEST, folder)

    # No machine goes ahead of the others.
    _agree(None, _attempt(seal, partial), snapshot)
    _agree(None, _attempt(publish, partial), snapshot)
    _agree(None, _attempt(point, folder), snapshot, named=True)
    return folder


class _Part(NamedTuple):
    """What a rank has written: the disk's name, the files, and a name for this save."""

    disk: int
    files: dict[str, FileRecord]
    save_id: str


def _seal(snapshot: Snapshot, parts: Sequence[_Part]) -> None:
    """The last file of a disk's part: the manifest of all others."""
    partial = snapshot.partial
    here = [part for part in parts if part.disk == snapshot.disk.name]
    files = {name: record for part in here for name, record in part.files.items()}
    files |= _flush(partial, [name for name in list_files(partial) if name not in files])
    for place in [path for path in partial.rglob("*") if path.is_dir()]:
        sync_folder(place)
    manifest = new_manifest(
        files,
        step=snapshot.step,
        world_size=comm.world_size(),
        zero_stage=snapshot.zero_stage,
        config_digest=snapshot.config_digest,
        save_id=parts[0].save_id,
        num_disks=len({part.disk for part in parts}),
        behind=latest_time(snapshot.folder.parent),
    )
    write_manifest(partial, manifest)


def _agree(
    own: T, failure: WriteFailure | None, snapshot: Snapshot, *, named: bool = False
) -> list[T]:
    """What every rank has; or the same error on every rank when any has one. Collective.

    Args:
        own: What this rank has.
        failure: What went wrong on this rank.
        snapshot: What is being saved.
        named: Whether it has its name already.
    """
    answers = comm.all_gather_objects((own, failure))
    failed = {rank: found for rank, (_, found) in enumerate(answers) if found is not None}
    if not failed:
        return [answer for answer, _ in answers]
    if snapshot.disk.leads and not named:
        shutil.rmtree(snapshot.partial, ignore_errors=True)
    rank, found = next(iter(failed.items()))
    name, outcome = snapshot.folder.name, "was not saved"
    left = "earlier checkpoints are untouched"
    if named:
        outcome = "is whole, but could not be made the latest"
        left = f"--resume auto goes on from what `latest` names; name {name} to go on from it"
    # Only a failure that passes on every rank is over at the next start.
    passing = all(one.passing for one in failed.values())
    remedy = "It may pass: start again with --resume auto" if passing else "Make room"
    kind = StorageError if passing else SaveError
    raise kind(f"{name} {outcome}: rank {rank}: {found}; {left}. {remedy}, or mend the folder")


def _attempt(action: Callable[[], None], folder: Path) -> WriteFailure | None:
    """Run what touches files; what went wrong, for the other ranks to hear of it."""
    try:
        action()
    except OSError as error:
        return write_failure(error, folder)
    except (VembedError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        return WriteFailure(f"{type(error).__name__}: {one_line(error)}")
    return None


def _make_folder(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(partial.parent, needed=partial.name)
    partial.mkdir()


def _is_own(name: str) -> bool:
    return f"_rank_{comm.rank()}." in name


def _flush(partial: Path, names: list[str]) -> dict[str, FileRecord]:
    """Bring files that somebody else wrote to the disk; what they must be."""
    for name in names:
        sync_file(partial / name)
    return {name: _hash_once(partial / name) for name in names}


def _hash_once(path: Path) -> FileRecord:
    """A frozen weights' file is linked into every checkpoint, and may be large."""
    status = path.stat()
    if status.st_nlink == 1:
        return hash_file(path)
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if identity not in _hashed:
        _hashed[identity] = hash_file(path)
    return _hashed[identity]


_hashed: dict[tuple[int, ...], FileRecord] = {}
