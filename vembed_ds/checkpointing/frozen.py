"""What is frozen is kept as it was: a 16-bit engine would hand it back rounded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError

FROZEN_FILE = "frozen_weights.safetensors"


def keep_frozen_weights(model: nn.Module, output_dir: Path) -> None:
    """Write the frozen parameters, once per run, before the engine casts them. Rank 0 writes.

    Args:
        model: On the host, in float32.
        output_dir: The run's folder; checkpoints link the file from there.
    """
    state = model.state_dict()  # has what a 4-bit weight stands for; the parameter has its code
    frozen = {n: state[n] for n, p in model.named_parameters() if not p.requires_grad}
    if not frozen or not comm.is_main():
        return
    # Under another name first: checkpoints of an earlier start may share the old file.
    partial = output_dir / f".{FROZEN_FILE}.partial"
    save_file({name: tensor.contiguous() for name, tensor in frozen.items()}, partial)
    partial.replace(output_dir / FROZEN_FILE)


def link_frozen_weights(output_dir: Path, folder: Path) -> None:
    """Give a checkpoint its share in the run's file, where there is one. Rank 0 calls it.

    Args:
        output_dir: The run's folder.
        folder: ``<checkpoint>/model``.
    """
    source, target = output_dir / FROZEN_FILE, folder / FROZEN_FILE
    if not source.is_file():
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


class FrozenWeights:
    """Frozen parameters by name in the trained module, float32, each read when it is asked for.

    Attributes:
        names: What there is; empty for a float32 run.

    Args:
        folder: ``<checkpoint>/model``.

    Raises:
        CheckpointError: The file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FROZEN_FILE
        self.names: frozenset[str] = frozenset()
        if self._path.is_file():
            with self._opened() as file:
                self.names = frozenset(file.keys())

    def read(self, name: str) -> Tensor:
        """One of :attr:`names`, whole."""
        # Opened each time: what was read of an open file stays in memory.
        with self._opened() as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._path}: damaged: {error}") from error
