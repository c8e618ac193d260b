"""A checkpoint of DeepSpeed, read by the names of its parameters, whatever ZeRO stage wrote it.

Files are opened when something in them is asked for, and nothing is kept: a tensor, or a range of
one, is read from the disk each time. Neither DeepSpeed nor a process group is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vembed_ds.checkpointing.files import (
    MODEL_FOLDER,
    MODEL_STATES,
    check_files,
    existing,
    resolve_checkpoint,
    shard_file,
)
from vembed_ds.checkpointing.frozen import FROZEN_FILE, FrozenWeights
from vembed_ds.checkpointing.layouts import (
    WEIGHT,
    EqualLayout,
    FlatLayout,
    Layout,
    Optimizer,
    WholeLayout,
)
from vembed_ds.checkpointing.torch_file import Range, TorchFile, read_joined
from vembed_ds.errors import CheckpointError


def open_checkpoint(path: Path, *, near: int = 0) -> CheckpointReader:
    """A reader of a checkpoint; only the file that describes the parameters is opened.

    Args:
        path: ``<output_dir>/checkpoint-step-<N>``, or ``<output_dir>`` for its ``latest``.
        near: The rank whose files are read where those of any rank would do.

    Raises:
        CheckpointError: Missing, incomplete or damaged files; names the file.
    """
    folder = resolve_checkpoint(path)
    if (folder / MODEL_STATES).is_file():
        return CheckpointReader(folder, TorchFile(folder / MODEL_STATES), near=near)
    # Any rank's file tells how many there are; on disks of its own a node may have no first.
    own = folder / f"zero_pp_rank_{near}_{MODEL_STATES}"
    file = own if own.is_file() else existing(folder / f"zero_pp_rank_0_{MODEL_STATES}")
    return CheckpointReader(folder, TorchFile(file), near=near)


class CheckpointReader:
    """Values of a checkpoint by name in the trained module.

    Names are those of the module's state dict: parameters and persistent buffers. Of a parameter
    that several names share, the others are in :attr:`aliases`; they may be used like the first.

    Attributes:
        folder: The checkpoint.
        world_size: Number of ranks that wrote it.
        aliases: Further names of shared parameters, each with the first. (Of ZeRO-3 known only to
            who reads near rank 0.)
        buffers: Names of the persistent buffers.

    Args:
        folder: The checkpoint.
        file: Model states: of all ranks at ZeRO-0 to 2, of any rank at ZeRO-3.
        near: As of :func:`open_checkpoint`.
    """

    def __init__(self, folder: Path, file: TorchFile, *, near: int) -> None:
        self.folder, self._file = folder, file
        self._whole = file.path.name == MODEL_STATES
        self._files: dict[int, TorchFile] = {}
        self._frozen = FrozenWeights(folder / MODEL_FOLDER)
        with file.as_written():
            self._saved: Mapping[str, Any] = file.content
            self._module: Mapping[str, Tensor] = self._saved["module"]
            self.world_size = int(self._saved["dp_world_size"])
            self.buffers = frozenset(self._saved["buffer_names"])
            self._layout = self._find_layout(near)
            self.aliases: Mapping[str, str] = (
                self._saved["shared_params"] or _shared(file, self._module)
                if self._whole
                else self._saved["shared_params"]
            )
            self._shapes = self._find_shapes()
        if missing := sorted(self._frozen.names - self._shapes.keys()):
            raise CheckpointError(
                f"{folder}: {missing[0]} of {FROZEN_FILE} is not in the shards; the files do not "
                "belong together"
            )

    def check_whole(self) -> None:
        """See that every file is there that the ranks wrote.

        Raises:
            CheckpointError: One is missing; names it.
        """
        stages = {WholeLayout: 0, FlatLayout: 1, EqualLayout: 3}
        stage = stages[type(self._layout)]
        check_files(self.folder, zero_stage=stage, world_size=self.world_size)

    def names(self) -> list[str]:
        """Every parameter and persistent buffer, the further names of shared ones included."""
        return list(self._shapes)

    @property
    def trained(self) -> Mapping[str, torch.Size]:
        """Shapes of the parameters that were trained, by their first names.

        Raises:
            CheckpointError: ZeRO-0 saves the optimizer's state without names, and the description
                that has them is missing or another model's.
        """
        with self._file.as_written():
            return self._layout.shapes

    def shape(self, name: str) -> torch.Size:
        """Of the parameter or buffer, as it was in training."""
        return self._shapes[name]

    def weight(self, name: str) -> Tensor:
        """The whole parameter or buffer, in memory of its own.

        Trained parameters are the optimizer's float32 masters, frozen ones what they were before
        the run cast them. Buffers exist only in the precision of the run, and are widened.

        Returns:
            In its shape, on the host, float32 where floating.
        """
        size = math.prod(self.shape(name))
        return self.read(name, WEIGHT, 0, size).reshape(tuple(self.shape(name)))

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """A range of a flattened parameter or buffer.

        Args:
            name: Of it.
            kind: :data:`WEIGHT`, or one of the optimizer's ``kinds`` for a trained parameter.
            start: Place of the first value.
            stop: Place behind the last.

        Returns:
            ``[stop - start]`` on the host, float32 where floating, in memory of its own.

        Raises:
            CheckpointError: A file is missing, damaged or does not belong to the others.
        """
        name = self.aliases.get(name, name)
        with self._file.as_written():
            values = self._find(name, kind, start, stop)
        return values.float() if values.is_floating_point() else values

    @property
    def optimizer(self) -> Optimizer:
        """Kinds of state and number of steps of the optimizer."""
        return self._layout.optimizer

    @property
    def counters(self) -> Mapping[str, int]:
        """The engine's ``global_steps``, ``global_samples`` and ``skipped_steps``."""
        with self._file.as_written():
            names = ("global_steps", "global_samples", "skipped_steps")
            return {name: int(self._saved[name]) for name in names}

    @property
    def schedule(self) -> Mapping[str, int] | None:
        """``last_epoch`` and ``step_count`` of the learning rate's schedule, if there was one."""
        with self._file.as_written():
            saved = self._saved["lr_scheduler"]
            if saved is None:
                return None
            return {"last_epoch": int(saved["last_epoch"]), "step_count": int(saved["_step_count"])}

    @property
    def loss_scaler(self) -> Mapping[str, Any]:
        """Fields of what scales the loss in fp16; empty at ZeRO-0."""
        return self._layout.loss_scaler

    def _find_layout(self, near: int) -> Layout:
        saved, folder, ranks = self._saved, self.folder, self.world_size
        if saved["optimizer"] is not None:
            return WholeLayout(folder, self._file)
        layout = FlatLayout if self._whole else EqualLayout
        return layout(folder, saved["param_shapes"], world_size=ranks, near=near % ranks)

    def _find_shapes(self) -> dict[str, torch.Size]:
        if self._whole:
            return {name: tensor.shape for name, tensor in self._module.items()}
        shapes = {name: self._module[name].shape for name in self.buffers}
        shapes |= {**self._saved["frozen_param_shapes"], **self._layout.shapes}
        return shapes | {name: shapes[first] for name, first in self.aliases.items()}

    def _find(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """A range, in the precision in which it was saved."""
        if kind == WEIGHT and name in self._frozen.names:
            whole = self._frozen.read(name).reshape(-1)
            return whole if stop - start == whole.numel() else whole[start:stop].clone()
        if self._layout.has(name, kind):
            return self._layout.read(name, kind, start, stop)
        if kind != WEIGHT:
            raise CheckpointError(f"{self.folder}: {name} was not trained, so it has no {kind}")
        if self._whole or name in self.buffers:
            return self._file.read(self._module[name], start, stop)
        return self._read_frozen_pieces(name, start, stop)

    def _read_frozen_pieces(self, name: str, start: int, stop: int) -> Tensor:
        """ZeRO-3 cuts frozen parameters as it cuts the others."""
        length = math.ceil(math.prod(self.shape(name)) / self.world_size)
        found = []
        for rank in range(start // length, math.ceil(stop / length)):
            file = self._model_states(rank)
            left, right = max(start - rank * length, 0), min(stop - rank * length, length)
            with file.as_written():
                piece = file.content["frozen_param_fragments"][name]
                found.append(Range(file, piece, left, right))
        return read_joined(found)

    def _model_states(self, rank: int) -> TorchFile:
        if rank not in self._files:
            path = shard_file(self.folder, MODEL_STATES, rank, self.world_size)
            self._files[rank] = self._file if path == self._file.path else TorchFile(path)
        return self._files[rank]


def _shared(file: TorchFile, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Second names of shared parameters, each with the first."""
    first: dict[tuple[Any, ...], str] = {}
    whole = {name: tensor for name, tensor in weights.items() if tensor.numel()}
    named = {
        name: first.setdefault((file.place(tensor), tensor.shape), name)
        for name, tensor in whole.items()
    }
    return {name: source for name, source in named.items() if name != source}
