"""safetensors files written one tensor at a time, where the library takes all of a file at once.

The format: 8 bytes with the length of a header, the header (JSON: number format, shape and place of
every tensor), the values. Places are known before the first value is, so the tensors may come in
any order. The bytes are those that the library writes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vembed_ds.errors import CheckpointError

# The library puts the widest formats first, so that every value is aligned; this is its order.
_FORMATS: dict[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ROUNDED = 1 << 20  # values at a time, so that there is no second tensor
_RANK = {dtype: rank for rank, dtype in enumerate(_FORMATS)}


class TensorFile:
    """A safetensors file of known content that is being written.

    Args:
        path: In an existing folder.
        tensors: Every tensor of the file; only shape and number format matter, so they may be on
            the meta device.

    Attributes:
        size: Of the whole file, in bytes.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self._waiting = dict(tensors)
        self._header, self._starts, self.size = _layout(tensors)

    def create(self) -> None:
        """Write the header and claim the space, so that a full disk shows before the work is done."""
        with self.path.open("xb") as file:
            file.write(self._header)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, self.size)

    def write(self, name: str, tensor: Tensor) -> int:
        """Write one tensor, once.

        Args:
            name: As announced.
            tensor: On the host, of the announced shape, and of its number format or to be rounded
                to it.

        Returns:
            Bytes.
        """
        announced = self._waiting.pop(name)
        assert tensor.shape == announced.shape, name
        both_floating = tensor.is_floating_point() and announced.is_floating_point()
        assert tensor.dtype == announced.dtype or both_floating, name
        values = tensor.detach().contiguous().reshape(-1)
        with self.path.open("r+b") as file:
            file.seek(self._starts[name])
            for some in torch.split(values, _ROUNDED) if values.numel() else ():
                file.write(some.to(announced.dtype).view(torch.uint8).numpy().data)
        return announced.nbytes

    def finish(self) -> None:
        """Force the file onto the disk.

        Raises:
            CheckpointError: A tensor was never given.
        """
        if self._waiting:
            raise CheckpointError(
                f"{self.path.name}: {len(self._waiting)} tensors were not written, first: "
                f"{min(self._waiting)}"
            )
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file whose tensors are all at hand."""
    file = TensorFile(path, tensors)
    file.create()
    for name, tensor in tensors.items():
        file.write(name, tensor)
    file.finish()


def _layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """Length and header as bytes, where every tensor begins, and the size of the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for name in sorted(tensors, key=lambda name: (_RANK[tensors[name].dtype], name)):
        tensor = tensors[name]
        end = position + math.prod(tensor.shape) * tensor.element_size()
        entries[name] = {
            "dtype": _FORMATS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        starts[name], position = position, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {n: s + len(header) for n, s in starts.items()}, len(header) + position
