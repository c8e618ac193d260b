"""What a conversion writes: files of known size, and how each of their tensors is made.

Everything here is known before a weight is read, from the description of the checkpoint and from
the model on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from vembed_ds.checkpointing.adapters import (
    adapter_names,
    check_adapters,
    is_adapted,
    merge_adapter,
    plain_names,
)
from vembed_ds.checkpointing.tensor_files import TensorFile
from vembed_ds.errors import CheckpointError
from vembed_ds.models.disk_layout import DiskLayout, Group

_UNSPLIT = 1 << 62


@dataclass(frozen=True)
class Piece:
    """Tensors of the files that are made at one time.

    Attributes:
        targets: On the meta device, by name in the files.
        make: Gives them, float32 where they count nothing.
    """

    targets: Mapping[str, Tensor]
    make: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """The weights of one component.

    Attributes:
        stem: Of its files' paths in the folder: ``text_encoder/model`` for
            ``text_encoder/model.safetensors``.
        pieces: How its tensors are made.
        targets: All of them in the order of the files, on the meta device, in the format that is
            written.
        max_shard_size: Of a file, in bytes; a larger tensor gets a file of its own.
        num_parameters: For the index of several files.
    """

    stem: str
    pieces: Sequence[Piece]
    targets: Mapping[str, Tensor]
    max_shard_size: int = _UNSPLIT
    num_parameters: int = 0

    def files(self, folder: Path) -> dict[str, TensorFile]:
        """Its files, not yet written, by the names of their tensors."""
        found: dict[str, TensorFile] = {}
        for path, names in self._split().filename_to_tensors.items():
            file = TensorFile(folder / path, {name: self.targets[name] for name in names})
            found |= dict.fromkeys(names, file)
        return found

    def index(self) -> dict[str, Any] | None:
        """Which tensor is in which file, as transformers writes it; ``None``: there is one file."""
        split = self._split()
        if not split.is_sharded:
            return None
        names = {tensor: Path(file).name for tensor, file in split.tensor_to_filename.items()}
        metadata = {"total_parameters": self.num_parameters, **split.metadata}
        return {"metadata": metadata, "weight_map": names}

    def _split(self) -> Any:
        return split_torch_state_dict_into_shards(
            dict(self.targets),
            filename_pattern=f"{self.stem}{{suffix}}.safetensors",
            max_shard_size=self.max_shard_size,
        )


class TrainedValues:
    """The values of a checkpoint as its description names and shapes them.

    Args:
        read: Gives a value by its name in the trained module, float32 where floating.
        names: All that there are.
        parameters: The description; see :func:`read_parameters`.
        origin: The checkpoint, for messages.

    Attributes:
        components: Of each, the names of its values there and in the trained module.

    Raises:
        CheckpointError: A value is not described, or there is none for a description.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        names: Collection[str],
        parameters: Mapping[str, Mapping[str, Any]],
        *,
        origin: str,
        described_in: str,
    ) -> None:
        check_names(set(names), set(parameters), origin=f"{origin}: {described_in}")
        self._read, self._parameters, self._origin = read, parameters, origin
        self.components: dict[str, dict[str, str]] = {}
        for name, entry in parameters.items():
            self.components.setdefault(entry["component"], {})[entry["name"]] = name

    def read(self, name: str) -> Tensor:
        """One value, in its shape outside of the trained module.

        Raises:
            CheckpointError: It has another shape than described, or is not a number.
        """
        value, shape = self._read(name), self.shape(name)
        if tuple(value.shape) != shape and not (shape == () and value.numel() == 1):
            raise CheckpointError(
                f"{self._origin}: {name} has shape {tuple(value.shape)}, described as {shape}"
            )
        if value.is_floating_point() and value.numel() and bool(value.amax().isnan()):
            raise CheckpointError(
                f"{self._origin}: {name} has NaN: the training had diverged when this was saved; "
                "convert an earlier checkpoint"
            )
        return value.reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """As described."""
        return tuple(self._parameters[name]["shape"])


def check_names(found: set[str], expected: set[str], *, origin: str) -> None:
    """See that two sets of weights are one.

    Raises:
        CheckpointError: They differ; names what is on one side only.
    """
    problems = {"missing": expected - found, "unexpected": found - expected}
    text = "; ".join(
        f"{len(names)} {problem}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
        for problem, names in problems.items()
        if names
    )
    if text:
        raise CheckpointError(f"{origin}: the weights do not fit the model: {text}")


def plain_part(
    stem: str, names: Mapping[str, str], values: TrainedValues, *, dtype: torch.dtype
) -> Part:
    """Floating values of one file, under the names of ``names``.

    Args:
        stem: As in :class:`Part`.
        names: Of every tensor in the file, with its name in the trained module.
        values: Of the checkpoint.
        dtype: To write.
    """
    targets = {
        name: torch.empty(values.shape(own), dtype=dtype, device="meta")
        for name, own in names.items()
    }
    pieces = [
        Piece({name: targets[name]}, partial(_one, name, values.read, own))
        for name, own in names.items()
    ]
    return Part(stem, pieces, targets)


def adapter_part(
    place: str,
    names: Mapping[str, str],
    values: TrainedValues,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
) -> Part:
    """The adapters of a backbone as peft's file.

    Args:
        place: The component.
        names: Of its values there, with their names in the trained module.
        values: Of the checkpoint.
        config: Its adapter configuration.
        dtype: To write.
    """
    theirs = adapter_names(names, config, place=place or "model")
    own = {name: names[beside] for name, beside in theirs.items()}
    return plain_part(_stem(place, "adapter_model"), own, values, dtype=dtype)


class BackboneSource:
    """Gives a backbone's weights by their plain names, adapters merged.

    Args:
        names: Of the component's values there, with their names in the trained module.
        values: Of the checkpoint.
        config: The adapter configuration; ``None``: it has none.
        layout: Of the files.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        values: TrainedValues,
        config: Mapping[str, Any] | None,
        layout: DiskLayout,
    ) -> None:
        self._names, self._values, self._config = names, values, config
        self._plain, self._layout = plain_names(names), layout

    def make(self, group: Group) -> dict[str, Tensor]:
        """Tensors of the files."""
        return self._layout.convert(group, {name: self._weight(name) for name in group.sources})

    def _weight(self, name: str) -> Tensor:
        weight = self._one_weight(name)
        for other in (n for n, written in self._layout.tied.items() if written == name):
            if not torch.equal(self._one_weight(other), weight):
                raise CheckpointError(
                    f"{name} and {other} are one weight of the model that is written, and differ "
                    "after training; train without adapters on them (lora_target_modules), or "
                    "convert with --adapter"
                )
        return weight

    def _one_weight(self, name: str) -> Tensor:
        beside = self._plain[name]
        if self._config is not None and is_adapted(beside):
            return merge_adapter(beside, self._named, self._config)
        return self._named(beside)

    def _named(self, name: str) -> Tensor:
        return self._values.read(self._names[name])


def backbone_part(
    place: str,
    names: Mapping[str, str],
    values: TrainedValues,
    model: Any,
    config: Mapping[str, Any] | None,
    *,
    dtype: torch.dtype,
    max_shard_size: int,
    origin: str,
) -> Part:
    """The weights of a Hugging Face model, adapters merged.

    Args:
        place: The component.
        names: Of its values there, with their names in the trained module.
        values: Of the checkpoint.
        model: On the meta device.
        config: Its adapter configuration; ``None``: it has none.
        dtype: To write; what counts keeps its own.
        max_shard_size: Of a file, in bytes.
        origin: The description, for messages.

    Raises:
        CheckpointError: The values are not those of the model, or an adapter is not whole.
    """
    plain, expected = plain_names(names), model.state_dict()
    check_names(set(plain), set(expected), origin=f"{origin}: {type(model).__name__}")
    if config is not None:
        check_adapters(names, config)
    for name, tensor in expected.items():
        if (shape := values.shape(names[plain[name]])) != tuple(tensor.shape):
            raise CheckpointError(
                f"{origin}: the weights do not fit the model: {name} has shape {shape}, and by "
                f"config.json {tuple(tensor.shape)}"
            )
    layout = DiskLayout(model)
    source = BackboneSource(names, values, config, layout)
    pieces = [Piece(group.targets, partial(source.make, group)) for group in layout.groups]
    targets = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in layout.targets.items()
    }
    return Part(_stem(place, "model"), pieces, targets, max_shard_size, model.num_parameters())


def _stem(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


def _one(name: str, read: Callable[[str], Tensor], own: str) -> dict[str, Tensor]:
    return {name: read(own)}
