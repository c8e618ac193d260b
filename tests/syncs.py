"""Finds on a CPU what would make the host wait for an accelerator."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vembed_ds

ROOT = Path(vembed_ds.__file__).parent

# Each reads from the device to go on: a number, or the size of its own result.
READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::_unique2",
    "aten::unique_dim",
}
FETCHES = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}
SENDS = {torch.tensor: "torch.tensor", torch.as_tensor: "torch.as_tensor"}


class SyncWatch:
    """Counts what waits, by who does it; a context manager.

    Seen are operations that need a value of the device on the host, copies to the host, and copies
    to the device that wait until they are made (``non_blocking`` ones do not). On a CPU a tensor of
    the host looks like one of the device; so its uses are counted too.

    Attributes:
        found: ``(what, the package's or file's function that does it, the nearest of ours)``.
    """

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str, str]] = Counter()

    def __enter__(self) -> SyncWatch:
        self._modes = ExitStack()
        self._modes.enter_context(_Dispatched(self.found))
        self._modes.enter_context(_Called(self.found))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()


class _Dispatched(TorchDispatchMode):
    def __init__(self, found: Counter[tuple[str, str, str]]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        overload = f"{name}.{func._schema.overload_name}"
        masked = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        if masked or name in READS or overload in READS:
            self._found[name.removeprefix("aten::"), *_who()] += 1
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, found: Counter[tuple[str, str, str]]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FETCHES:
            self._found[FETCHES[func], *_who()] += 1
        elif func in SENDS and kwargs.get("device") is not None:
            self._found[SENDS[func], *_who()] += 1
        elif func is Tensor.to and _moves(args, kwargs):
            self._found["to", *_who()] += 1
        return func(*args, **kwargs)


def _moves(args: Any, kwargs: Any) -> bool:
    """Whether ``to`` names a device, and waits for the copy."""
    named = [*args[1:], kwargs.get("device"), kwargs.get("other")]
    to_device = any(isinstance(value, torch.device | str | Tensor) for value in named)
    positions = [value for value in args[1:] if isinstance(value, bool)]
    return to_device and not (kwargs.get("non_blocking") or positions[:1] == [True])


def _who() -> tuple[str, str]:
    """The innermost function outside torch, and the innermost of ours."""
    frame: FrameType | None = sys._getframe(2)
    first = ours = ""
    while frame is not None and not ours:
        path = Path(frame.f_code.co_filename)
        if frame.f_code.co_qualname in _PASSED_ON:
            pass
        elif path.is_relative_to(ROOT):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            ours = f"{module}.{frame.f_code.co_qualname}"
        elif not first and path != _HERE and not path.is_relative_to(_TORCH):
            first = _package(path)
        frame = frame.f_back
    return first or ours, ours


# Operations of the model pass through it in a step whose graphs are weighed.
_PASSED_ON = {"_NewStorages.__torch_dispatch__"}
_TORCH, _HERE = Path(torch.__file__).parent, Path(__file__)


def _package(path: Path) -> str:
    parts = path.parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    return path.stem
