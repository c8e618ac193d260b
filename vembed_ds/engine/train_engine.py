"""The DeepSpeed engine as the step sees it: embed, backward, reduce once, step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.engine.choices import Gather, Reduce
from vembed_ds.engine.loss_scale import LossScaleUpdates
from vembed_ds.engine.module_order import forget_releases_with_the_order
from vembed_ds.engine.reduced import Piece, norm_of, reduced_pieces
from vembed_ds.engine.reduction import ReducedOnce, ReducedPerChunk, Reduction
from vembed_ds.engine.step_traffic import StepTraffic
from vembed_ds.engine.whole_parameters import WholeParameters


class TrainEngine:
    """Keeps the promise "one step, one gradient" on top of a DeepSpeed engine.

    A plain repeated ``engine.backward()`` loses gradients at ZeRO-1/2. Here every backward of
    a step runs inside :meth:`reduce_once`, which leaves the reduced sum behind.

    Args:
        engine: What :func:`deepspeed.initialize` returned.
        gather: When ZeRO-3 gathers parameters; without meaning below.
        reduce: When gradients are reduced.
        idle: Parameters that no pass of a step needs.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        *,
        gather: Gather = Gather.PER_MODULE,
        reduce: Reduce = Reduce.ONCE,
        idle: Collection[nn.Parameter] = (),
    ) -> None:
        self.engine = engine
        self.zero_stage = int(engine.zero_optimization_stage())
        self._names = {p: name for name, p in engine.module.named_parameters() if p.requires_grad}
        self._trained = list(self._names)
        reduction = ReducedPerChunk if reduce is Reduce.PER_CHUNK else ReducedOnce
        self._reduction: Reduction = reduction(engine, self._trained)
        if self.zero_stage == 3:
            forget_releases_with_the_order(engine)
        self._gather = gather if self.zero_stage == 3 else Gather.PER_MODULE
        self.gather, self.reduce = self._gather, reduce
        self.traffic = StepTraffic(engine, gather=self._gather, reduce=reduce, idle=idle)
        held = self._gather is not Gather.PER_MODULE
        self._whole = WholeParameters(engine, without=idle) if held else None
        self._replaying = False
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

    @property
    def chunks_are_local(self) -> bool:
        """Whether the forward and backward passes of a chunk need no other rank."""
        gathers = self.zero_stage == 3 and self._gather is not Gather.ONCE
        return not gathers and not isinstance(self._reduction, ReducedPerChunk)

    @property
    def kept_graphs_are_free(self) -> bool:
        """Whether the number of kept graphs moves no bit of the gradient."""
        return self._gather is not Gather.CACHE_PASS

    @property
    def bytes_beside_graphs(self) -> int:
        """What keeping several graphs takes beside them, and does not show in a first step that keeps one.

        In the backward pass of a graph behind which another was made, ZeRO-3 puts no parameter away
        before its end: DeepSpeed counts the tensors of a module's newest graph only. Where they are
        held anyway, nothing is added. And the optimizer makes its moments in its first update.
        """
        found = self._moments_to_come()
        if self.zero_stage == 3 and self._whole is None:
            found += sum(_elements(p) * p.element_size() for p in self.module.parameters())
        return found

    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Forward pass of a chunk. Collective under ZeRO-3, unless parameters are held."""
        if self._replaying and self._gather is Gather.CACHE_PASS:
            self._put_away()
        outputs: dict[str, Tensor] = self.engine(inputs)
        return outputs

    def backward(self, surrogate: Tensor) -> None:
        """Backward pass of one chunk's scalar, scaled for fp16. Only in :meth:`reduce_once`.

        Collective under ZeRO-3.
        """
        self._reduction.before_backward()
        self.engine.backward(surrogate)

    @contextmanager
    def parameters_held(self) -> Iterator[None]:
        """Around a whole step: ZeRO-3 may gather its parameters once instead of for every module.

        Collective there. They are put away at the end, or when the body raises; with
        ``cache_pass`` already when the first chunk is replayed.
        """
        if self._whole is None:
            yield
            return
        with self._whole.held():
            yield

    @contextmanager
    def reduce_once(self) -> Iterator[None]:
        """Around every backward of a step: leaves their sum, averaged over ranks.

        Collective: every rank enters and leaves it. It is reduced once, at the end, or with
        ``per_chunk`` behind every backward. When the body raises, nothing is left.
        """
        self._replaying = True
        try:
            with self._reduction.collect(self._put_away):
                yield
        except BaseException:
            self.discard_gradients()  # DeepSpeed would add the next step's to what it has
            raise
        finally:
            self._replaying = False

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

    def skip_step(self) -> None:
        """Drop the gradient instead of stepping, and count as DeepSpeed does after an overflow.

        Weights, optimizer, loss scale and schedule stay as they are; the step is counted.
        """
        self.discard_gradients()
        engine = self.engine
        engine.skipped_steps += 1
        engine.global_steps += 1
        engine.micro_steps += 1
        engine.global_samples += engine.train_batch_size()

    def partition_norm(self) -> Tensor:
        """Norm of what this rank holds of the reduced gradient, float32, 0-dim. Local.

        At stage 0 every rank holds the whole, above it a part of its own. NaN or infinite when a
        number in it is. Only between :meth:`reduce_once` and :meth:`step`.
        """
        return norm_of(self._reduced_pieces()) / self.loss_scale

    def nonfinite_parameters(self) -> list[str]:
        """Names of the parameters of whose reduced gradient this rank holds a NaN or an infinity.

        Local; it waits for the device once per parameter. When as for :meth:`partition_norm`.
        """
        pieces = self._reduced_pieces()
        return [self._names[p] for p, piece in pieces if not bool(piece.isfinite().all())]

    @property
    def overflow_is_normal(self) -> bool:
        """fp16: whether an infinite gradient only says that the loss scale is too high still."""
        scaler: Any = getattr(self.engine.optimizer, "loss_scaler", None)
        return bool(getattr(scaler, "dynamic", False) and scaler.cur_scale > scaler.min_scale)

    def learning_rate(self) -> float:
        """Rate of the next update (of the first parameter group)."""
        return float(self.engine.get_lr()[0])

    def learning_rate_of(self, highest: float) -> float:
        """Rate of the next update of the parameters whose highest rate is the closest to ``highest``."""
        schedule: Any = self.engine.lr_scheduler
        now = [float(rate) for rate in self.engine.get_lr()]
        bases = now if schedule is None else [float(rate) for rate in schedule.base_lrs]
        return min(zip(bases, now, strict=True), key=lambda pair: abs(pair[0] - highest))[1]

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
        """Forget gradients instead of stepping, as if they had never been computed.

        Reduced ones, or those of a step that broke off, in the middle of a backward pass too.
        """
        optimizer = self.engine.optimizer
        self._reduction.discard()
        optimizer.zero_grad()
        if self.zero_stage > 0:
            optimizer._backward_active_depth = 0  # one that broke off has not counted back
        if self.zero_stage in (1, 2):
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
            optimizer.micro_step_id = -1
            # With an offloaded optimizer it remembers an overflow, and would skip the next step.
            optimizer.reset_cpu_buffers()

    def _reduced_pieces(self) -> list[Piece]:
        return reduced_pieces(
            self.engine.optimizer, zero_stage=self.zero_stage, trained=self._trained
        )

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

    def _moments_to_come(self) -> int:
        """Bytes of Adam's two moments, float32, where there has been no update yet."""
        if self.engine.basic_optimizer.state or self.engine.zero_use_cpu_optimizer():
            return 0
        ranks = self.engine.dp_world_size if self.zero_stage > 0 else 1
        return 2 * 4 * sum(map(_elements, self._trained)) // ranks

    def _put_away(self) -> None:
        if self._whole is not None:
            self._whole.release()


def _elements(parameter: Any) -> int:
    """Of the whole parameter, also while ZeRO-3 keeps a part of it only."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
