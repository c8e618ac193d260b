"""A file of ``torch.save``, read without running its code and without holding it in memory.

Structure and values are read apart. The structure is unpickled by PyTorch's restricted loader with
tensors that have no values; these are read by their place in the file, only when they are asked
for, so that a range of a tensor costs its own bytes and nothing else. (Memory mapping would do,
but mapped pages stay resident, and count, until the whole file is let go.)
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vembed_ds.errors import CheckpointError, one_line, refused_global


class _Plain:
    """Stands in for DeepSpeed's classes; holds their fields and none of their code."""

    def __getattr__(self, name: str) -> Any:  # only for mypy: fields are set by the unpickler
        raise AttributeError(name)


def _member(kind: Any, name: str) -> str:
    """Stands in for the ``getattr`` by which some releases (Python 3.11.2) pickle an enum's member.

    The name itself: nothing is looked up, so that no file can reach anything by it.
    """
    return name


_ALLOWED: list[Any] = [
    (_member, "builtins.getattr"),
    (_member, "__builtin__.getattr"),  # as protocol 2 spells it
    (_Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
# What a pickle with a wrong byte may raise.
_DAMAGE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError),
    *(AttributeError, TypeError, AssertionError, struct.error),
)
# Since this release `map_location="meta"` reads no values, and notes where they are.
_META_HAS_PLACES = hasattr(torch.serialization, "_is_meta_location")


class TorchFile:
    """A file of ``torch.save``: its structure at once, the values of its tensors by range.

    Attributes:
        path: The file.
        content: What was saved; its tensors have shapes and no values.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is missing, damaged, or holds what could run code; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: Any = _structure(path)

    def read(
        self,
        tensor: Tensor,
        start: int = 0,
        stop: int | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Values of one tensor, in its own precision.

        Args:
            tensor: Of :attr:`content`.
            start: Place of the first value in the flattened tensor.
            stop: Place behind the last; ``None``: to the end.
            out: ``[stop - start]``, contiguous, of the tensor's precision, to read into.

        Returns:
            ``[stop - start]`` on the host, in memory of its own, or ``out``.

        Raises:
            CheckpointError: The file ends before, or the tensor has fewer values.
        """
        stop = tensor.numel() if stop is None else stop
        if not 0 <= start <= stop <= tensor.numel():
            raise self.damaged(f"a tensor of {tensor.numel()} values has no [{start}, {stop})")
        if out is None:
            out = torch.empty(stop - start, dtype=tensor.dtype)
        if start == stop:
            return out
        if tensor.is_contiguous():
            self._fill(out, tensor, self.place(tensor)[1] + start)
            return out
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps)
        values = torch.empty(span, dtype=tensor.dtype)
        self._fill(values, tensor, self.place(tensor)[1])
        out.copy_(values.as_strided(tensor.shape, tensor.stride()).reshape(-1)[start:stop])
        return out

    def damaged(self, finding: str) -> CheckpointError:
        """An error about this file."""
        return CheckpointError(f"{self.path}: damaged: {finding}")

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Looking into :attr:`content`: what is not as expected there is an error about this file."""
        try:
            yield
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            finding = f"{type(error).__name__}: {one_line(error)}"
            raise self.damaged(f"not as DeepSpeed 0.19.8 writes it ({finding})") from error

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """Where a tensor of :attr:`content` begins; tensors that share their memory share it."""
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if offset is None:
            raise self.damaged("it is in the format of PyTorch before 1.6, which cannot be read")
        return int(offset), int(tensor.storage_offset())

    def _fill(self, values: Tensor, tensor: Tensor, start: int) -> None:
        """Read into ``values`` from a tensor's storage, from the value with the index ``start``."""
        if values.dtype != tensor.dtype:
            raise self.damaged(f"it holds {tensor.dtype} where other files hold {values.dtype}")
        size = tensor.element_size()
        if (start + values.numel()) * size > tensor.untyped_storage().nbytes():
            raise self.damaged("a tensor is larger than its memory")
        rest = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
        offset = self.place(tensor)[0] + start * size
        with self.path.open("rb", buffering=0) as file:
            if offset + len(rest) > file.seek(0, 2):
                raise self.damaged("it ends too early")
            file.seek(offset)
            while rest:  # one read gives 2 GiB at most
                rest = rest[file.readinto(rest) or self._ends() :]

    def _ends(self) -> int:
        raise self.damaged("it ends too early")


class Range(NamedTuple):
    """A range of a flattened tensor in a file.

    Attributes:
        file: The file.
        tensor: Of its content.
        start: Place of the first value.
        stop: Place behind the last.
    """

    file: TorchFile
    tensor: Tensor
    start: int
    stop: int


def read_joined(ranges: Sequence[Range]) -> Tensor:
    """One behind the other, each read to where it belongs, so that no value is in memory twice.

    Raises:
        CheckpointError: As :meth:`TorchFile.read`, or they are not of one precision.
    """
    if not ranges:
        return torch.empty(0)
    sizes = [one.stop - one.start for one in ranges]
    with ranges[0].file.as_written():
        joined = torch.empty(sum(sizes), dtype=ranges[0].tensor.dtype)
    for one, out in zip(ranges, torch.split(joined, sizes), strict=True):
        with one.file.as_written():
            one.file.read(one.tensor, one.start, one.stop, out=out)
    return joined


def read_plain(path: Path) -> Any:
    """The content of a small file of ``torch.save``, by the loader that runs no code.

    Raises:
        CheckpointError: As of :class:`TorchFile`.
    """
    with _naming(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def _structure(path: Path) -> Any:
    with _naming(path), torch.serialization.safe_globals(_ALLOWED):
        if _META_HAS_PLACES:
            return torch.load(path, map_location="meta", weights_only=True)
        from torch._subclasses.fake_tensor import FakeTensorMode  # 0.9 s and 74 MB

        with FakeTensorMode():
            return torch.load(path, weights_only=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file cannot be read, and which global it would have called."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete") from error
    except pickle.UnpicklingError as error:
        name = refused_global(error)
        if name is None:
            raise CheckpointError(f"{path}: damaged: {_first_line(error)}") from error
        raise CheckpointError(
            f"{path}: holds {name}, which is not loaded, because it could run code; this is no "
            "checkpoint of a training run. Do not trust where it came from"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: damaged: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else one_line(error)
