"""The run's folder: what is written into it, and what happens to an earlier run in it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vembed_ds.checkpointing.disks import Disk
from vembed_ds.checkpointing.frozen import FROZEN_FILE
from vembed_ds.checkpointing.names import BEST, LATEST
from vembed_ds.config.loading import dump_config
from vembed_ds.config.schema import Config
from vembed_ds.distributed import comm
from vembed_ds.errors import ConfigError
from vembed_ds.models.saved_folder import SETTINGS_FILE

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
DS_CONFIG_FILE = "ds_config.json"
SKIPPED_FILE = "skipped_records.txt"
_SHOWN = 10
_PREVIOUS = "previous-"
_PROBE = ".seen-by-every-rank"
_PROBE_SECONDS = 20
_WRITE_PROBE = ".written-by-rank-"
_WRITE_PROBE_BYTES = 65536
_OWN_SECONDS = 3
# What stays: run.lock, which this run holds; teacher_cache and frozen_features, which know their
# models.
_WRITTEN = (
    DS_CONFIG_FILE,
    "metrics.jsonl",
    "metrics.csv",
    "tensorboard",
    "wandb",
    "wandb_run_id.txt",
    "swanlab",
    "swanlab_run_id.txt",
    "mlflow.db",
    "mlflow_run_id.txt",
    "checkpoint-step-*",
    ".checkpoint-step-*",
    LATEST,
    BEST,
    "guide-*",
    FROZEN_FILE,
    SKIPPED_FILE,
    "nonfinite-step-*.json",
    "spike-step-*.json",
    CONFIG_FILE,  # last: without it nobody would set aside what a crash left of the others
)


def open_output(path: str) -> Path:
    """The run's folder, made if need be. One rank of a disk.

    Raises:
        ConfigError: It cannot be one, or nothing can be written there.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        in_the_way = next(place for place in (folder, *folder.parents) if place.exists())
        raise ConfigError(
            f"output_dir={path!r}: {in_the_way} is a file; give a folder, or a name that is free"
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from error
    _try_writing(folder)
    return folder


def prepare_output(config: Config, ds_config: Mapping[str, Any], *, resuming: bool) -> Path:
    """Write the resolved configuration into the folder of :func:`open_output`. One rank of a disk.

    A fresh run in the folder of an earlier one moves what that wrote, and what was converted
    into the folder, to ``previous-<n>/``; nothing is overwritten.

    Returns:
        The folder.
    """
    folder = Path(config.run.output_dir)
    if not resuming:
        _set_aside(folder, needed=list(_paths(config.model_dump(mode="json"))))
    (folder / CONFIG_FILE).write_text(dump_config(config))
    (folder / DS_CONFIG_FILE).write_text(json.dumps(ds_config, indent=2))
    return folder


def list_skipped(folder: Path, messages: Sequence[str]) -> None:
    """Say which records are left out: all in a file, the first few in the log. Rank 0 only."""
    if not messages:
        return
    path = folder / SKIPPED_FILE
    path.write_text("".join(f"{' '.join(message.split())}\n" for message in messages))
    for message in messages[:_SHOWN]:
        logger.warning("skipped: %s", message)
    logger.warning(
        "%d records cannot be used and are left out; all are listed in %s", len(messages), path
    )


def check_shared(folder: Path) -> None:
    """Refuse a folder that each machine has of its own: checkpoints would lie in pieces.

    Collective, after rank 0 has called :func:`open_output`.

    Raises:
        ConfigError: On every rank, when one does not see what rank 0 wrote, or cannot write there.
    """
    doing = f"output_dir={str(folder)!r}"
    token = comm.all_gather_objects(uuid.uuid4().hex)[0]
    probe = folder / _PROBE

    def write() -> None:
        if comm.is_main():
            probe.write_text(token)

    comm.run_together(write, doing=doing)
    comm.run_together(lambda: _find(probe, token), doing=doing)
    if comm.is_main():
        probe.unlink()
    comm.run_together(lambda: _try_writing(folder), doing=doing)


def warn_of_little_space(folder: Path, parameters: Iterable[nn.Parameter]) -> None:
    """Say so when not even one checkpoint fits on the disk. Rank 0 only.

    Args:
        folder: Of the run.
        parameters: All of the model, whole. What is trained takes up to 16 bytes, with the float32
            copy and the optimizer's two states.
    """
    needed = sum((16 if p.requires_grad else 4) * p.numel() for p in parameters)
    free = shutil.disk_usage(folder).free
    if free < needed:
        logger.warning(
            "output_dir=%r has %.1f GB free, and a checkpoint takes up to %.1f GB: make room before "
            "the first one is due",
            str(folder),
            free / 1e9,
            needed / 1e9,
        )


def _try_writing(folder: Path) -> None:
    """Every rank writes files of its own."""
    probe = folder / f"{_WRITE_PROBE}{comm.rank()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_WRITE_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"output_dir={str(folder)!r}: rank {comm.rank()} on {platform.node()} cannot write there "
        f"({error.strerror or error}); give a folder that every rank can write to, on a disk with room"
    )


def check_own(folder: Path, disk: Disk) -> None:
    """Refuse a folder that machines share: each would take the other's files for its own.

    Collective, before anything else is written there.

    Raises:
        ConfigError: On every rank, when one sees what a rank with another disk wrote, or cannot
            write there.
    """
    doing = f"output_dir={str(folder)!r}"
    probe = folder / f"{_PROBE}-{disk.name}"

    def write() -> None:
        if disk.leads:
            open_output(str(folder))
            probe.write_text("")

    def look() -> None:
        others = [path for path in folder.glob(f"{_PROBE}-*") if path != probe]
        if disk.leads and others:
            raise ConfigError(
                f"output_dir={str(folder)!r}: node_local_output=true, and this folder is shared by "
                "several machines; set node_local_output: false, or give a folder on each "
                "machine's own disk"
            )

    comm.run_together(write, doing=doing)
    if len(set(comm.all_gather_objects(disk.name))) > 1:
        time.sleep(_OWN_SECONDS)  # network file systems show a new file late
    try:
        comm.run_together(look, doing=doing)
    finally:
        if disk.leads:
            probe.unlink()
    comm.run_together(lambda: _try_writing(folder), doing=doing)


def _find(probe: Path, token: str) -> None:
    """Network file systems show a new file late."""
    for _ in range(_PROBE_SECONDS):
        os.listdir(probe.parent.parent)  # noqa: PTH208 (asks the server again)
        if probe.is_file() and probe.read_text() == token:
            return
        time.sleep(1)
    raise ConfigError(
        f"output_dir={str(probe.parent)!r}: what rank 0 wrote there was not seen for "
        f"{_PROBE_SECONDS} s by rank {comm.rank()} on {platform.node()}; give a folder that all "
        "machines share"
    )


def _set_aside(folder: Path, *, needed: Sequence[Path] = ()) -> None:
    if not (folder / CONFIG_FILE).exists():
        return
    # Only what a run writes: data, or the model to train, may lie in the folder too.
    written = [entry for pattern in _WRITTEN for entry in folder.glob(pattern)]
    # Converted from the old checkpoints, it would pass for a model of the new ones.
    converted = [
        path.parent
        for path in sorted(folder.glob(f"*/{SETTINGS_FILE}"))
        if not (path.parent.name.startswith(".") or path.parent in written)
        and not _holds_one_of(path.parent, needed)
    ]
    number = 1
    while (folder / f"{_PREVIOUS}{number}").exists():
        number += 1
    target = folder / f"{_PREVIOUS}{number}"
    target.mkdir()
    for entry in [*converted, *written]:
        entry.rename(target / entry.name)
    names = ", ".join(path.name for path in converted)
    models = f", with what was converted into the folder ({names})" if converted else ""
    logger.warning("%s held an earlier run; it was moved to %s%s", folder, target, models)


def _holds_one_of(folder: Path, paths: Iterable[Path]) -> bool:
    place = folder.resolve()
    return any(path.is_relative_to(place) for path in paths)


def _paths(value: Any) -> Iterator[Path]:
    """All that a configuration's texts could name: models to start from, teachers, data."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _paths(one)
    elif isinstance(value, str) and "\n" not in value:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            yield Path(value).expanduser().resolve()
