"""Which checkpoint to go on from: the latest that is whole, read before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vembed_ds.checkpointing.disks import Disk, this_disk
from vembed_ds.checkpointing.manifest import (
    MANIFEST,
    Manifest,
    describe_damage,
    extra_files,
    find_damage,
    read_manifest,
    reading,
    share,
)
from vembed_ds.checkpointing.names import LATEST, checkpoints, leftovers, read_pointer, step_of
from vembed_ds.checkpointing.rotation import by_age, put_back
from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
_SHOWN = 3


@dataclass(frozen=True)
class _Choice:
    """Checkpoints to try, in turn.

    Attributes:
        candidates: Names in the folder that was given; the first that is whole is taken. ``""``:
            that folder itself.
        explicit: The user named this very checkpoint, so no other takes its place.
        problem: What is wrong with ``latest``, if anything.
        unfinished: Names of folders that crashed runs left.
        error: Why there is nothing to try.
    """

    candidates: list[str]
    explicit: bool = False
    problem: str = ""
    unfinished: Sequence[str] = ()
    error: str = ""


def find_checkpoint(
    resume: str, output_dir: Path, *, node_local: bool = False, held: ExitStack | None = None
) -> Path | None:
    """The checkpoint to resume from, every file of it compared with its manifest. Collective.

    Of a run's folder that is the one ``latest`` names or, with a warning, the newest that is
    whole. The ranks share the reading.

    Args:
        resume: A checkpoint's folder, a run's folder, or ``"auto"`` (this run's folder).
        output_dir: Folder of this run, which no other run is in: a checkpoint that a crash left
            without its name gets it back.
        node_local: Every machine has a part of it on a disk of its own.
        held: While it is open no run deletes the checkpoint.

    Returns:
        The folder; ``None`` only for ``"auto"`` when the run has no checkpoint at all.

    Raises:
        CheckpointError: On every rank: there is nothing to resume from, the checkpoint that was
            named is damaged, or every checkpoint is.
    """
    doing = f"--resume {resume}"
    disk = this_disk(node_local=node_local)
    place = output_dir if resume == "auto" else Path(resume)
    # Not in the folder of another run, which may be replacing a checkpoint at this moment.
    comm.run_together(lambda: put_back(output_dir) if disk.leads else None, doing=doing)
    choice = comm.run_on_main(lambda: _choose(resume, place), doing=doing)
    if choice.error:
        raise CheckpointError(choice.error)
    if not choice.candidates:
        if choice.unfinished:
            logger.warning(
                "%s: %s: no checkpoint was finished; %s is left of a run that ended before",
                doing,
                output_dir,
                ", ".join(choice.unfinished),
            )
        return None
    damaged: list[str] = []
    for name in choice.candidates:
        folder = place / name
        if held is not None:
            held.enter_context(reading(folder))
        damage = find_damage_together(folder, disk)
        if not damage:
            _report(doing, choice, damaged, taken=folder)
            return folder
        damaged.append(describe_damage(damage))
    if choice.explicit:
        raise CheckpointError(
            f"{doing}: {damaged[0]}; this checkpoint is damaged: name another checkpoint-step-N, "
            "or the run's folder, which takes the newest that is whole"
        )
    raise CheckpointError(
        f"{doing}: no checkpoint is whole: {'; '.join(damaged[:_SHOWN])}; put the damaged files "
        "back from a copy, or start afresh (without --resume)"
    )


def find_damage_together(folder: Path, disk: Disk) -> list[str]:
    """What is wrong with a checkpoint; every rank reads a share of it. Collective.

    Args:
        folder: The checkpoint.
        disk: Where it lies.

    Returns:
        One sentence per finding, the same on every rank; empty: it is whole.
    """
    manifest: Manifest | None = None
    damage: list[str] = []
    try:
        manifest = read_manifest(folder)
        part = share(manifest.files, index=disk.index, of=disk.size)
        damage = find_damage(folder, part)
    except CheckpointError as error:
        damage = [str(error)]
    found = comm.all_gather_objects((manifest, damage, disk.name))
    problem = _disagreement(folder, [(name, m) for m, _, name in found if m is not None])
    if comm.is_main() and manifest is not None and (extra := extra_files(folder, manifest)):
        logger.warning(
            "%s: holds files that are no part of it and are not read: %s", folder, ", ".join(extra)
        )
    problems = [problem, *(text for _, texts, _ in found for text in texts)]
    return [text for text in dict.fromkeys(problems) if text is not None]


def _disagreement(folder: Path, read: Sequence[tuple[int, Manifest]]) -> str | None:
    """Why what the ranks read on their disks is no whole checkpoint.

    Args:
        folder: The checkpoint.
        read: Name of the disk and the manifest, of every rank that has one.
    """
    manifests = dict(read)
    for manifest in manifests.values():
        if manifest.num_disks != len(manifests):
            return (
                f"{folder / MANIFEST}: {manifest.num_disks} disks had a part of this checkpoint each, "
                f"and {len(manifests)} have one now; resume on the same machines with the same "
                "node_local_output"
            )
        if manifest.num_disks > 1 and manifest.world_size != comm.world_size():
            return (
                f"{folder / MANIFEST}: {manifest.world_size} ranks wrote this checkpoint to disks of "
                f"their machines, and there are {comm.world_size()}; resume with as many"
            )
    if any(manifest != manifests[disk] for disk, manifest in read):
        return f"{folder / MANIFEST}: ranks read different files in what should be one folder"
    if len({manifest.save_id for manifest in manifests.values()}) > 1:
        return f"{folder / MANIFEST}: the machines have parts of different runs or saves"
    return None


def _choose(resume: str, place: Path) -> _Choice:
    if (place / MANIFEST).is_file() or (place / STATE).is_file() or step_of(place.name) is not None:
        return _Choice([""], explicit=True)
    latest, problem = read_pointer(place, LATEST)
    found = checkpoints(place)
    if not found:
        unfinished = [path.name for path, *_ in leftovers(place)]
        if resume == "auto" and not (place / LATEST).exists():
            return _Choice([], unfinished=unfinished)
        what = problem if (place / LATEST).exists() else "no checkpoint there"
        return _Choice(
            [],
            error=f"--resume {resume}: {what} (no folder checkpoint-step-N in {place}); name a "
            "folder checkpoint-step-N or a run's output folder",
        )
    return _Choice([folder.name for folder in _ordered(found, latest)], problem=problem)


def _ordered(found: Sequence[Path], latest: Path | None) -> list[Path]:
    """``latest``, then the newest, and at the end those that nobody can date.

    Later steps than ``latest`` come behind the earlier ones: they are of a run that was given up
    when another went on from an earlier checkpoint.
    """
    dated = by_age(found)
    undated = sorted(set(found) - set(dated), key=lambda folder: -(step_of(folder.name) or 0))
    ordered = [*dated, *undated]
    if latest is None:
        return ordered
    limit = step_of(latest.name)
    before = [f for f in ordered if limit is None or (step_of(f.name) or 0) <= limit]
    rest = [f for f in ordered if f not in before]
    return [latest, *(folder for folder in [*before, *rest] if folder != latest)]


def _report(doing: str, choice: _Choice, damaged: Sequence[str], *, taken: Path) -> None:
    problems = [problem for problem in (choice.problem, *damaged) if problem]
    if problems:
        logger.warning(
            "%s: %s; going on from %s, the newest checkpoint that is whole",
            doing,
            "; ".join(problems),
            taken,
        )
