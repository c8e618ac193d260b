"""When the gradients of a step's chunks are reduced: once, or behind every chunk.

Both give the same sum, defined for every trained parameter. A plain repeated ``engine.backward()``
does not: ZeRO-1 and 2 forget all chunks but some, and ZeRO-3 applies the previous step's gradient
to what got none in this one.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from vembed_ds.distributed import comm
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.engine.gradients import LocalGradients
from vembed_ds.errors import DistributedError


class Reduction(Protocol):
    """How the gradients of one step become one reduced gradient."""

    def before_backward(self) -> None:
        """Called before the backward pass of every chunk."""

    def collect(self, at_end: Callable[[], None]) -> AbstractContextManager[None]:
        """Around all of a step's backward passes; ``at_end`` is called behind the last."""

    def discard(self) -> None:
        """Forget what was collected and is not reduced."""


class ReducedOnce:
    """Keeps whole gradients, summed over chunks, and reduces them behind the last.

    Args:
        engine: Of any stage.
        trained: The trained parameters.
    """

    def __init__(self, engine: DeepSpeedEngine, trained: Sequence[nn.Parameter]) -> None:
        self._engine, self._local = engine, LocalGradients(trained)
        self._stage = int(engine.zero_optimization_stage())

    def before_backward(self) -> None:
        """Make room for a chunk's gradient."""
        self._local.before_backward()

    @contextmanager
    def collect(self, at_end: Callable[[], None]) -> Iterator[None]:
        """When the body raises nothing is reduced, so that no rank is left in half a reduction."""
        with ExitStack() as held_back:
            held_back.enter_context(self._without_reduction())
            try:
                yield
                at_end()
                self._local.finish()
            except BaseException:
                self._local.discard()
                raise
            with phase(Kind.REDUCTION):
                held_back.close()
                if self._stage == 0:
                    self._engine.allreduce_gradients()

    def discard(self) -> None:
        """Forget the gradients on the parameters."""
        self._local.discard()

    def _without_reduction(self) -> AbstractContextManager[Any]:
        if self._stage == 0:
            # Coalescing does not exist at stage 0. `no_sync` with an explicit reduction (rather
            # than managed_gradient_accumulation=false, which reduces inside `step`) leaves the
            # reduced gradient readable before the step at every stage alike.
            return self._engine.no_sync()  # type: ignore[no-any-return]
        return self._engine.coalesce_grad_reduction()  # type: ignore[no-any-return]


class ReducedPerChunk:
    """ZeRO-2 and 3: reduces a parameter's gradient as soon as a chunk's backward pass has it.

    A rank keeps the sum of its part only. DeepSpeed reduces in the order in which the backward
    pass gives gradients, so every rank's chunks must use the same parameters in the same order;
    :meth:`collect` compares that behind the last chunk.

    Args:
        engine: At stage 2 or 3, which adds gradients up in float32 (``data_types.grad_accum_dtype``).
        trained: The trained parameters.
    """

    def __init__(self, engine: DeepSpeedEngine, trained: Sequence[nn.Parameter]) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        self._reduced = array("L")  # numbers of the parameters, in order
        if self._stage == 3:
            reduce_every_parameter_at_3(self._optimizer)
        for number, parameter in enumerate(trained):
            parameter.register_post_accumulate_grad_hook(self._remember(number))  # type: ignore[no-untyped-call]

    def before_backward(self) -> None:
        """Nothing: a chunk's gradients are gone when the next one begins."""

    @contextmanager
    def collect(self, at_end: Callable[[], None]) -> Iterator[None]:
        """When the body raises on one rank only, the others wait for it in a reduction.

        Raises:
            DistributedError: On every rank, when they did not reduce the same.
        """
        self._begin()
        try:
            yield
            at_end()
            with phase(Kind.REDUCTION):
                self._finish()
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def discard(self) -> None:
        """Nothing: the sums are begun anew with every step."""

    def _begin(self) -> None:
        self._reduced = array("L")
        # Not the last: where the optimizer is offloaded, sums are copied to it once, at the end.
        self._engine.set_gradient_accumulation_boundary(False)
        begin_sums_at_3(self._optimizer) if self._stage == 3 else begin_sums_at_2(self._optimizer)

    def _finish(self) -> None:
        self._agree()
        if not self._reduced:  # nothing was differentiated: the sums are zero
            if self._stage == 2:
                self._optimizer.setup_buckets()
            self._optimizer.overlapping_partition_gradients_reduce_epilogue()
        self._optimizer.finalize_gradient_accumulation_boundary()

    def _agree(self) -> None:
        seen = zlib.crc32(self._reduced.tobytes())
        highest, lowest = comm.all_max([seen, -seen])
        if highest != -lowest:
            raise DistributedError(
                "gradient_reduction=per_chunk: the ranks did not differentiate the same parameters "
                "in the same order, so their gradients were mixed up: the model uses other "
                "parameters for other items (experts, layers left out); set gradient_reduction: once"
            )

    def _remember(self, number: int) -> Callable[[nn.Parameter], None]:
        return lambda parameter: self._reduced.append(number)


def begin_sums_at_2(optimizer: Any) -> None:
    """Let ZeRO-2 begin its sums anew, whatever was left of an earlier step."""
    optimizer.micro_step_id = -1
    for sums in (optimizer.all_grad_tensors, optimizer.averaged_gradients):
        for group in sums:
            sums[group] = None
    if optimizer.cpu_offload:
        # Sums on the host are kept from step to step, and a parameter that only a later chunk
        # uses would be added to its last step's.
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids = set()
        for kept in optimizer.accumulated_grads_in_cpu.values():
            kept.zero_()
        for flat in optimizer.single_partition_of_fp32_groups:
            flat.grad.zero_()


def begin_sums_at_3(optimizer: Any) -> None:
    """Let ZeRO-3 begin its sums anew; they are zero where no chunk uses a parameter."""
    optimizer.grad_partitions_flat_buffer.zero_()
    # DeepSpeed would copy, and not add, what the first backward pass reduces. A parameter whose
    # gradient comes in two parts, as re-entrant recomputation gives it, would lose one.
    optimizer.micro_step_id = 1
    optimizer._offload_boundary_param_ids = set()
    if optimizer.offload_optimizer:
        optimizer.reset_cpu_buffers()
        for flat in optimizer.fp32_partitioned_groups_flat:
            flat.grad.zero_()


def reduce_every_parameter_at_3(optimizer: Any) -> None:
    """Let ZeRO-3 reduce parameters of layers in slices one by one, as it reduces all others.

    DeepSpeed waits until the backward pass has left such a layer, whatever its parameters have by then, and ends with
    an ``AssertionError`` where a graph has two calls of one: of texts, and of texts with images.
    """
    for hook in optimizer._leaf_module_hooks:
        hook.remove()
    optimizer._leaf_module_hooks.clear()
    for parameters in optimizer.leaf_parameters.values():
        for parameter in filter(lambda p: p.requires_grad, parameters):
            hook = parameter.register_post_accumulate_grad_hook(partial(_reduce, optimizer))
            optimizer._grad_acc_hooks.append(hook)


def _reduce(optimizer: Any, parameter: nn.Parameter) -> None:
    optimizer.reenter_backward_if_needed()
    optimizer.reduce_ready_partitions_and_remove_grads(parameter)
