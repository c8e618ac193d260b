"""What a rank of a test world runs: steps whose loss or gradient is made to be no number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from tests.distributed.train_cases import run_train
from tests.parity import data
from tests.parity.cases import make_engine, make_model, rank_roles
from tests.worlds import set_fp16_support
from vembed_ds.data.batches import plan_step
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.collators import Batch
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import DivergedError
from vembed_ds.losses import build_loss
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import BatchLoss, StepResult, compute_gradient
from vembed_ds.training import spikes
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.loss_inputs import loss_inputs
from vembed_ds.training.nonfinite import StepGuard

KIND = "clip"
COSINE = (2, 6)
FAULTY_RANK = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


class Run:
    """A fresh model and engine on this rank, and what is looked at of every step."""

    def __init__(
        self,
        *,
        folder: str,
        ds_config: dict[str, Any],
        chunk_size: int | None,
        out: str,
        **guard: Any,
    ) -> None:
        if ds_config["fp16"]["enabled"]:
            set_fp16_support(True)
        self.model: EmbeddingModel = make_model(Path(folder), kind=KIND, temperature=0.1)
        self.engine: TrainEngine = make_engine(
            self.model, ds_config=ds_config, weight_decay=0.1, cosine=COSINE
        )
        self.guard = StepGuard(
            self.engine, folder=Path(out), locate=lambda index: ("pairs", 100 + index), **guard
        )
        self.chunk_size = chunk_size
        self.attempts = self.applied = 0
        self.model.train()

    def step(self, number: int, fault: str | None = None) -> Tensor | None:
        """One step on batch ``number``; its norm, or ``None`` when it was skipped."""
        roles = rank_roles(KIND, number)
        first = comm.rank() * len(roles["query"])
        batch = Batch(indices=list(range(first, first + len(roles["query"]))), roles=roles)
        own = fault if comm.rank() == FAULTY_RANK else None
        result = self._gradient(batch, own)
        self.attempts += 1
        rate = self.engine.learning_rate()
        if not self.guard.accept(result, batch, step=self.attempts, learning_rate=rate):
            return None
        squares = float(self.engine.partition_norm()) ** 2
        total = float(comm.mean_over_ranks(torch.tensor(squares)))
        parts = comm.world_size() if self.engine.zero_stage else 1
        norm = self.engine.step()
        self.applied += norm is not None
        if norm is not None:
            torch.testing.assert_close(total * parts, float(norm) ** 2, rtol=0.03, atol=0)
        return norm

    def _gradient(self, batch: Batch, fault: str | None) -> StepResult:
        loss_function = build_loss("infonce", temperature=0.1, loss_bidirectional=True)
        factor = {"nan loss": torch.nan, "inf loss": torch.inf}.get(fault or "", 1.0)

        def loss(rows: Mapping[str, Embeddings], learned: Mapping[str, Tensor]) -> Tensor:
            self.guard.watch(rows)
            return factor * loss_function(loss_inputs(batch, rows, learned))

        plan = plan_step(
            batch.roles,
            budget=ChunkBudget(self.chunk_size),
            streams=self.model.streams,
            filler=lambda stream: EncodedItem(*data.fillers()[stream]),
        )
        with _broken(self, fault):
            return compute_gradient(
                self.engine,
                plan,
                loss_function=loss,
                pad=lambda stream, items: data.pad(stream, [item.inputs for item in items]),
                trainable=self.model.trainable,
            )

    def state(self) -> list[Tensor]:
        """Copies of weights, float32 weights, moments and step counts. Collective."""
        inner = getattr(self.engine.engine.optimizer, "optimizer", self.engine.engine.optimizer)
        tensors = [_held(parameter) for parameter in self.model.parameters()]
        if self.engine.zero_stage < 3:
            masters = [p for group in inner.param_groups for p in group["params"]]
            tensors += masters
            states = [inner.state[p] for p in masters if p in inner.state]
            tensors += [torch.as_tensor(value) for state in states for value in state.values()]
        elif self.applied:
            # Whole and not as they lie: what fills up a partition is not initialised.
            for parameter in self.model.parameters():
                tensors.append(safe_get_full_fp32_param(parameter))
                tensors += [safe_get_full_optimizer_state(parameter, key) for key in MOMENTS]
            tensors += [torch.as_tensor(state["step"]) for state in inner.state.values()]
        return [tensor.detach().clone() for tensor in tensors]


def _held(parameter: torch.nn.Parameter) -> Tensor:
    """What this rank holds of a parameter, without padding."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    part = parameter.ds_tensor
    real = parameter.ds_numel - comm.rank() * part.numel()
    return part.flatten()[: max(0, real)]


class _broken:  # noqa: N801 (a context manager)
    """Breaks the backward pass of a chunk, or the first embedding of every chunk."""

    def __init__(self, run: Run, fault: str | None) -> None:
        self.run, self.fault = run, fault
        self.backwards = 0

    def __enter__(self) -> None:
        engine, scale = self.run.engine, {"nan embedding": torch.nan, "zero embedding": 0.0}
        if self.fault == "inf gradient":
            plain = engine.backward

            def backward(surrogate: Tensor) -> None:
                self.backwards += 1
                plain(surrogate * torch.inf if self.backwards == 2 else surrogate)

            engine.backward = backward  # type: ignore[method-assign]
        self.hook = None
        if self.fault in scale:
            self.hook = self.run.model.register_forward_hook(
                lambda module, inputs, outputs: _first_scaled(outputs, scale[self.fault or ""])
            )

    def __exit__(self, *_: object) -> None:
        vars(self.run.engine).pop("backward", None)
        if self.hook is not None:
            self.hook.remove()


def _first_scaled(outputs: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    if "text" not in outputs:
        return outputs
    factors = torch.ones(len(outputs["text"]), 1, dtype=outputs["text"].dtype)
    factors[0] = factor
    return outputs | {"text": outputs["text"] * factors}


def skip_one(
    *, folder: str, ds_config: dict[str, Any], chunk_size: int | None, fault: str, out: str
) -> dict[str, Any]:
    """Steps on batches 0, 1 and 2, of which 1 is broken and skipped, and on 0 and 2 alone."""
    settings = {"folder": folder, "ds_config": ds_config, "chunk_size": chunk_size, "out": out}
    run = Run(**settings, skip=True, max_in_a_row=1)
    norms = [run.step(0), run.step(1, fault), run.step(2)]
    found, rate, scale = run.state(), run.engine.learning_rate(), run.engine.loss_scale
    counters = {
        name: int(getattr(run.engine.engine, name))
        for name in ("global_steps", "skipped_steps", "micro_steps", "global_samples")
    }
    run.engine.engine.destroy()
    alone = Run(**settings)
    alone.step(0)
    alone.step(2)
    expected = alone.state()
    result = {
        "skipped": [norm is None for norm in norms],
        "equal": len(found) == len(expected) and all(map(torch.equal, found, expected)),
        "tensors": len(found),
        "finite": all(bool(tensor.isfinite().all()) for tensor in found),
        "same_rate": rate == alone.engine.learning_rate(),
        "same_scale": scale == alone.engine.loss_scale,
        "counters": counters,
    }
    alone.engine.engine.destroy()
    return result


def end(
    *,
    folder: str,
    ds_config: dict[str, Any],
    faults: Sequence[str | None],
    out: str,
    chunk_size: int | None = 3,
    **guard: Any,
) -> dict[str, Any]:
    """One step per fault (``None``: a good one), until one ends the run.

    Returns:
        ``error``, ``attempts``, and whether the last attempt ``changed`` anything.
    """
    run = Run(folder=folder, ds_config=ds_config, chunk_size=chunk_size, out=out, **guard)
    error, changed, norms = None, False, []
    for number, fault in enumerate(faults):
        before = run.state()
        try:
            norm = run.step(number % 3, fault)
        except DivergedError as found:
            error = str(found)
            run.engine.discard_gradients()
            changed = not all(map(torch.equal, before, run.state()))
            break
        norms.append(None if norm is None else float(norm))
    result = {"error": error, "attempts": run.attempts, "changed": changed, "norms": norms}
    result["scale"] = run.engine.loss_scale
    run.engine.engine.destroy()
    return result


def train_with_factors(*, factors: Mapping[int, float], quiet: int, **run: Any) -> dict[str, Any]:
    """A whole run in which the faulty rank's loss of some steps, from 1, is multiplied."""
    plain_loss, plain_quiet = TrainingLoop.batch_loss, spikes.QUIET

    def batch_loss(self: TrainingLoop, *arguments: Any) -> BatchLoss:
        found = plain_loss(self, *arguments)
        factor = factors.get(self.step + 1, 1.0) if comm.rank() == FAULTY_RANK else 1.0
        return lambda rows, learned: factor * found(rows, learned)

    TrainingLoop.batch_loss, spikes.QUIET = batch_loss, quiet  # type: ignore[method-assign]
    try:
        return run_train(**run)
    finally:
        TrainingLoop.batch_loss, spikes.QUIET = plain_loss, plain_quiet  # type: ignore[method-assign]
