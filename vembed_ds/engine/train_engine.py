"""The DeepSpeed engine as the step sees it: embed, backward, reduce once, step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.engine.gradients import LocalGradients
from vembed_ds.engine.loss_scale import LossScaleUpdates


class TrainEngine:
    """Keeps the promise "one step, one gradient" on top of a DeepSpeed engine.

    A plain repeated ``engine.backward()`` loses gradients at ZeRO-1/2. Here every backward of
    a step runs inside :meth:`reduce_once`, which sums locally and reduces at its end.

    Args:
        engine: What :func:`deepspeed.initialize` returned.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.zero_stage = int(engine.zero_optimization_stage())
        self._trained = [p for p in engine.module.parameters() if p.requires_grad]
        self._local = LocalGradients(self._trained)
        # At stage 0 fp16 is refused.
        scaled = engine.fp16_enabled() and self.zero_stage > 0
        self._loss_scale_updates = LossScaleUpdates(engine.optimizer) if scaled else None

    @property
    def module(self) -> nn.Module:
        """The model; under ZeRO-3 its parameters are partitioned."""
        module: nn.Module = self.engine.module
        return module

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device(self.engine.device)

    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Forward pass of a chunk. Collective under ZeRO-3."""
        outputs: dict[str, Tensor] = self.engine(inputs)
        return outputs

    def backward(self, surrogate: Tensor) -> None:
        """Backward pass of one chunk's scalar, scaled for fp16. Only in :meth:`reduce_once`.

        Collective under ZeRO-3.
        """
        self._local.before_backward()
        self.engine.backward(surrogate)

    @contextmanager
    def reduce_once(self) -> Iterator[None]:
        """Sum the gradients of every backward inside; average over ranks once, at the end.

        Collective: every rank enters and leaves it. When the body raises, nothing is reduced,
        so that the other ranks are not left in half a reduction.
        """
        with ExitStack() as held_back:
            held_back.enter_context(self._without_reduction())
            try:
                yield
                self._local.finish()
            except BaseException:
                self._local.discard()
                raise
            with phase(Kind.REDUCTION):
                held_back.close()
                if self.zero_stage == 0:
                    self.engine.allreduce_gradients()

    def step(self) -> Tensor | None:
        """Clip, update the parameters and advance the schedule. Collective.

        Returns:
            Norm of the whole gradient before clipping; ``None`` when the update was skipped
            because a 16-bit gradient overflowed.
        """
        norm = self._plain_gradient_norm() if self._plain_optimizer else None
        with phase(Kind.OPTIMIZER):
            self.engine.step()
        if self._loss_scale_updates is not None:
            self._loss_scale_updates.after_step()
        if not self.engine.was_step_applied():
            return None
        if norm is None:
            norm = torch.as_tensor(self.engine.get_global_grad_norm())
        return norm

    def learning_rate(self) -> float:
        """Rate of the next update (of the first parameter group)."""
        return float(self.engine.get_lr()[0])

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass; 1 unless in fp16."""
        # A wrapper of bf16 weights has one that is None.
        return float(getattr(self.engine.optimizer, "loss_scale", None) or 1.0)

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self.engine.optimizer.loss_scale = value

    def full_gradients(self) -> Iterator[Tensor]:
        """The reduced gradient of every trained parameter, whole, float32. Collective.

        Only between :meth:`reduce_once` and :meth:`step`.
        """
        for parameter in self._trained:
            grad = safe_get_full_grad(parameter)
            yield grad.detach().float()

    def discard_gradients(self) -> None:
        """Forget reduced gradients instead of stepping, as if they had never been computed."""
        optimizer = self.engine.optimizer
        self._local.discard()
        optimizer.zero_grad()
        if self.zero_stage in (1, 2):
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
            optimizer.micro_step_id = -1

    @property
    def _plain_optimizer(self) -> bool:
        """ZeRO-0 in float32: DeepSpeed uses the torch optimizer itself and keeps no norm."""
        return self.zero_stage == 0 and not (
            self.engine.fp16_enabled() or self.engine.bfloat16_enabled()
        )

    def _plain_gradient_norm(self) -> Tensor:
        grads = [p.grad for p in self._trained if p.grad is not None]
        norm: Tensor = nn.utils.get_total_norm(grads)
        return norm

    def _without_reduction(self) -> AbstractContextManager[Any]:
        if self.zero_stage == 0:
            # Coalescing does not exist at stage 0. `no_sync` with an explicit reduction (rather
            # than managed_gradient_accumulation=false, which reduces inside `step`) leaves the
            # reduced gradient readable before the step at every stage alike.
            return self.engine.no_sync()  # type: ignore[no-any-return]
        return self.engine.coalesce_grad_reduction()  # type: ignore[no-any-return]
