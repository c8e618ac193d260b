"""How DeepSpeed's checkpoint files get to the disk: hashed, flushed, and without a lone error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from vembed_ds.durable import FileRecord, HashedFile, WriteFailure, write_failure, write_hashed
from vembed_ds.errors import CheckpointError, one_line


class CheckpointFiles(CheckpointEngine):  # type: ignore[misc]
    """Takes the place of DeepSpeed's own checkpoint engine; it writes the same files.

    Between DeepSpeed's calls of it are collectives, so an error of one rank must wait: it is kept
    in :attr:`error` until all ranks can raise it together.

    Args:
        deferred: Only copy what is to be written; :meth:`write_deferred` writes it, perhaps in
            another thread, while training goes on.
    """

    def __init__(self, *, deferred: bool) -> None:
        super().__init__(None)
        self.name = type(self).__name__
        self.deferred = deferred
        self.records: dict[Path, FileRecord] = {}
        self.error: WriteFailure | None = None
        self._waiting: list[tuple[Path, Any]] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing: a save begins by :meth:`reset`."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; an error is kept."""
        self._keep_error(Path(path), lambda: Path(path).mkdir(parents=True, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, or copy what is to be in it; an error is kept."""
        if self.deferred:
            self._waiting.append((Path(path), copy_to_host(state_dict)))
        else:
            self._write(Path(path), state_dict)

    def load(self, path: str, map_location: Any = None) -> NoReturn:
        """Refused: DeepSpeed would run whatever code the file holds.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            f"{path}: DeepSpeed's own loading runs code from files; load it by "
            "vembed_ds.checkpointing.restore"
        )

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing: a checkpoint is committed when all ranks have agreed on it."""
        return True

    def write_deferred(self) -> None:
        """Write what :meth:`save` copied. Local; an error is kept."""
        while self._waiting:
            path, state = self._waiting.pop(0)  # its memory is free as soon as it is written
            self._write(path, state)

    def _write(self, path: Path, state: Any) -> None:
        def write() -> None:
            self.records[path] = write_hashed(path, lambda file: _save(state, file))

        self._keep_error(path, write, needed=lambda: count_bytes(state))

    def _keep_error(
        self, path: Path, action: Callable[[], None], *, needed: Callable[[], int] | None = None
    ) -> None:
        if self.error is not None:
            return
        try:
            action()
        except OSError as error:
            wanted = None if needed is None else needed()
            self.error = write_failure(error, path, needed=wanted)
        except RuntimeError as error:
            self.error = WriteFailure(f"{path}: cannot be written: {one_line(error)}")


def _save(state: Any, file: HashedFile) -> None:
    """As :func:`torch.save`, without its CRC-32, which takes a third of the time.

    Nothing of torch reads it, and the manifest has a better checksum of the whole file.
    """
    usual = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, cast(IO[bytes], file))
    finally:
        torch.serialization.set_crc32_options(usual)


def save_engine(
    engine: DeepSpeedEngine,
    folder: Path,
    *,
    client_state: dict[str, Any],
    deferred: bool,
    leads: bool,
) -> CheckpointFiles:
    """Let DeepSpeed save into a folder. Collective; file errors are kept, not raised.

    Args:
        engine: The engine to save.
        folder: Exists.
        client_state: Plain values that DeepSpeed keeps in its model file.
        deferred: As of :class:`CheckpointFiles`.
        leads: Whether this rank writes what one rank of a disk must write.

    Returns:
        The files that this rank wrote, or is to write.
    """
    files = CheckpointFiles(deferred=deferred)
    usual, engine.checkpoint_engine = engine.checkpoint_engine, files
    # Would copy DeepSpeed's converter, which unpickles anything, beside the checkpoint: rank 0
    # alone, and a full disk would end that rank alone.
    engine._copy_recovery_script = lambda save_path: None
    writes = engine.save_non_zero_checkpoint
    engine.save_non_zero_checkpoint = writes or leads
    try:
        engine.save_checkpoint(
            str(folder.parent), tag=folder.name, client_state=client_state, save_latest=False
        )
    finally:
        engine.checkpoint_engine = usual
        engine.save_non_zero_checkpoint = writes
        del engine._copy_recovery_script
    return files


def copy_to_host(value: Any) -> Any:
    """A copy of nested lists, tuples and dictionaries, their tensors in host memory.

    Tensors that are one and the same before are one afterwards: tied weights are known by that.
    """
    return _copied(value, {})


def _copied(value: Any, done: dict[tuple[Any, ...], Tensor]) -> Any:
    if isinstance(value, Tensor):
        if not value.numel():
            return value.detach().to("cpu", copy=True)
        layout = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if layout not in done:
            done[layout] = value.detach().to("cpu", copy=True)
        return done[layout]
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps the kind, and what torch hangs on a state dict
        for key, item in value.items():
            result[key] = _copied(item, done)
        return result
    if type(value) in (list, tuple):
        return type(value)(_copied(item, done) for item in value)
    return copy.deepcopy(value)  # the loss scaler counts on while it waits to be written


def count_bytes(value: Any) -> int:
    """Bytes of the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(count_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(count_bytes(item) for item in value)
    return 0
