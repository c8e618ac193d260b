"""Bytes that a pass holds, found by running it on tensors without contents.

Parameters are torch's fake tensors, so nothing is computed or stored; integer inputs (token ids, masks,
grids of images) are real, so that code which looks at them takes the way it takes in training. Every
storage that an operation makes is counted until it is freed, so that the sum after each operation is what a
real pass holds at that moment: on a CPU, to the byte (tests/unit/planning/test_tracing.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = dict[str, dict[str, Tensor]]

_INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, inside ``with``, what is alive of what was made there.

    Args:
        known: Tensors that are not counted, such as parameters.

    Attributes:
        now: Bytes alive.
        history: What was alive after each operation.
        watch: Called whenever that is noted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.history: list[int] = []
        self.watch: Callable[[], None] = lambda: None
        self._seen: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]  # alive, so no number returns
        self._seen.update(storage._cdata for storage in self._known)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that was made before."""
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number not in self._seen:
            self._seen.add(number)
            self.now += size
            weakref.finalize(storage, self._freed, number, size).atexit = False

    def _freed(self, number: int, size: int) -> None:
        self._seen.discard(number)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a fake tensor is asked for its device
            return func(*args, **(kwargs or {}))
        if func in _INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        if any(map(_is_fake, tree_leaves(args))):
            if _writes_nothing(func, args):
                return args[0]
            # Of a real tensor in the middle of a graph a fake one cannot be made without a warning.
            args = tree_map_only(Tensor, _leaf, args)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        self.look()
        return made

    def look(self) -> None:
        """Note what is alive now."""
        self.history.append(self.now)
        self.watch()


def _writes_nothing(func: Any, args: Any) -> bool:
    """Whether an operation with fake tensors would write into a real one, whose contents nobody needs."""
    in_place = func._schema.is_mutable and isinstance(args[0], Tensor)
    return in_place and not _is_fake(args[0])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor if _is_fake(tensor) or tensor.is_leaf else tensor.detach()


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _places(indices: Any) -> list[Tensor | None]:
    """Indices without masks: how many places a real mask marks can be counted, a fake one's not."""
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        found += index.nonzero(as_tuple=True) if is_mask else [index]
    return found


@contextmanager
def fused_kernels() -> Iterator[None]:
    """What accelerators compute in one kernel and a CPU in several keeps as much as there, inside.

    Dropout keeps one byte per value instead of four, and attention with dropout keeps no matrix. Whatever
    is computed in the block takes these functions, also in other threads.
    """
    functional: Any = nn.functional
    dropout, attention = functional.dropout, functional.scaled_dot_product_attention
    functional.dropout = _dropout
    functional.scaled_dot_product_attention = partial(_attention, attention)
    try:
        yield
    finally:
        functional.dropout, functional.scaled_dot_product_attention = dropout, attention


def _dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if not training or p == 0.0:
        return input
    dropped: Tensor = torch.native_dropout(input, p, train=True)[0]
    return dropped


def _attention(
    plain: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Tensor:
    return plain(query, key, value, attn_mask=attn_mask, dropout_p=0.0, **options)


def without_contents(model: nn.Module, *, dtype: torch.dtype) -> None:
    """Give a model parameters that take no memory, and its floating buffers the same dtype.

    Args:
        model: Its parameters are replaced; marks on them are kept.
        dtype: Of all floating parameters.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = _fake(parameter, dtype, mode)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def _fake(parameter: nn.Parameter, dtype: torch.dtype, mode: FakeTensorMode) -> nn.Parameter:
    floating = parameter.is_floating_point()
    with mode:
        empty = torch.empty(parameter.shape, dtype=dtype if floating else parameter.dtype)
        fake = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    fake.__dict__.update(vars(parameter))
    return fake


def inputs_without_contents(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a stream for a model of :func:`without_contents`.

    Whole numbers and masks stay: models read them.
    """
    with next(model.parameters()).fake_mode:  # type: ignore[attr-defined]
        made = {
            name: torch.empty(value.shape, dtype=value.dtype)
            for name, value in inputs.items()
            if value.is_floating_point()
        }
    return {**inputs, **made}


class Trace(NamedTuple):
    """What was alive in a forward and a backward pass.

    Attributes:
        alive: Bytes after every operation.
        summed: The same without gradients that are complete, as if they were added to others.
        forward_operations: How many of them belong to the forward pass.
    """

    alive: list[int]
    summed: list[int]
    forward_operations: int


def trace(model: nn.Module, make_inputs: Callable[[], Inputs], *, fused: bool) -> Trace:
    """Count what a forward and a backward pass take beside parameters and buffers.

    The backward pass is that of ``sum(output * cached gradient)``, as the gradient cache makes it.

    Args:
        model: From inputs to named outputs; its parameters have no gradient.
        make_inputs: Of the pass; counted until the forward pass is over.
        fused: Whether to count as on an accelerator.
    """
    live = LiveBytes([*model.parameters(), *model.buffers()])
    summed: list[int] = []
    complete = [0]
    live.watch = lambda: summed.append(live.now - complete[0])

    def count(parameter: Tensor) -> None:
        assert parameter.grad is not None
        complete[0] += parameter.grad.nbytes

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks: list[Any] = [p.register_post_accumulate_grad_hook(count) for p in trained]  # type: ignore[no-untyped-call]
    inputs = [make_inputs()]
    try:
        with live, fused_kernels() if fused else nullcontext():
            outputs = _forward(model, inputs, live)
            live.look()
            number = len(live.history)
            _backward(outputs)
            live.look()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    return Trace(live.history, summed, number)


def _forward(model: nn.Module, inputs: list[Inputs], live: LiveBytes) -> dict[str, Tensor]:
    """The outputs for the only element of ``inputs``, which nobody else has: it is freed behind it."""
    for tensor in tree_leaves(inputs):
        live.add(tensor)
    del tensor
    outputs: dict[str, Tensor] = model(inputs.pop())
    return outputs


def _backward(outputs: Mapping[str, Tensor]) -> None:
    terms = [
        (output.float() * torch.empty_like(output, dtype=torch.float32)).sum()
        for output in outputs.values()
        if output.requires_grad
    ]
    if terms:
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
