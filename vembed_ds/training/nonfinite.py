"""Steps with a loss or a gradient that is no number: found on all ranks before they do harm."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vembed_ds.config.schema import Config
from vembed_ds.data.collators import Batch
from vembed_ds.distributed import comm
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import DivergedError, one_line
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import StepResult
from vembed_ds.training.spikes import SpikeWatch

logger = logging.getLogger(__name__)

Locate = Callable[[int], tuple[str, int]]  # number in a batch to data set and record


def in_batch(index: int) -> tuple[str, int]:
    """For batches of tensors, of which nobody knows where they are from."""
    return "the batch", index


SHOWN = 3  # of each kind, in a message; the report has more
MOST_PARAMETERS = 50  # in a report
# Above this the squares of a gradient do not fit float32, in which DeepSpeed sums them.
LARGEST_SQUARE = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Verdict:
    """What the ranks found of a step; the same on every rank.

    Attributes:
        loss: Mean over the ranks whose loss is finite.
        norm: Of the whole gradient, before clipping; ``None``: it is not finite.
        bad_loss: Whether any rank's loss is NaN or infinite.
    """

    loss: float
    norm: float | None
    bad_loss: bool


class StepGuard:
    """Stands between the gradient and the optimizer: no NaN gets into weights or moments.

    Args:
        engine: Holds the reduced gradient.
        folder: Where reports are written.
        skip: Leave such a step out instead of ending the run.
        max_in_a_row: Most steps that are left out one behind the other.
        spike_factor: As of :class:`SpikeWatch`.
        locate: Data set and number of a record, from its number in a batch.
    """

    def __init__(
        self,
        engine: TrainEngine,
        *,
        folder: Path,
        skip: bool = False,
        max_in_a_row: int = 1,
        spike_factor: float | None = None,
        locate: Locate = in_batch,
    ) -> None:
        self._engine, self._folder, self._locate = engine, folder, locate
        self._skip, self._max_in_a_row = skip, max_in_a_row
        self._spikes = SpikeWatch(spike_factor)
        self._in_a_row = 0
        self._finite: dict[str, Tensor] = {}

    def watch(self, rows: Mapping[str, Embeddings]) -> None:
        """Keep which items have finite embeddings; not synchronised. Local.

        Args:
            rows: Of this rank's batch, by role.
        """
        self._finite = {role: _finite_items(found) for role, found in rows.items()}

    def accept(self, result: StepResult, batch: Batch, *, step: int, learning_rate: float) -> bool:
        """Whether the optimizer may step; if not, the gradient is dropped and the step counted.

        Collective, between the reduction and the step.

        Costs a pass over the rank's part of the gradient, one wait for the device and one small
        reduction between the hosts.

        Args:
            result: Of this rank.
            batch: Of this rank.
            step: Number of the step, from 1.
            learning_rate: Of the step.

        Returns:
            The same on every rank.

        Raises:
            DivergedError: On every rank: a loss or the gradient is not finite, and such steps are
                not skipped, or too many were already.
        """
        try:
            return self._judge(result, batch, step=step, learning_rate=learning_rate)
        finally:
            self._finite = {}  # of this step

    def _judge(self, result: StepResult, batch: Batch, *, step: int, learning_rate: float) -> bool:
        with phase(Kind.REDUCTION, "checking the gradient"):
            verdict = self._agree(result)
        facts = {
            "step": step,
            "learning_rate": learning_rate,
            "loss_scale": self._engine.loss_scale,
        }
        if verdict.bad_loss or (verdict.norm is None and not self._engine.overflow_is_normal):
            self._refuse(result, batch, verdict, facts)
            self._engine.skip_step()
            return False
        self._in_a_row = 0
        if verdict.norm is not None:  # else fp16 looks for its loss scale
            spikes = self._spikes.see({"loss": verdict.loss, "gradient norm": verdict.norm})
            if spikes:
                self._warn(spikes, result, batch, verdict, facts)
        return True

    def _agree(self, result: StepResult) -> Verdict:
        device = result.loss.device
        own = [result.loss.detach(), self._engine.partition_norm().to(device)]
        loss, norm = torch.stack([value.double() for value in own]).tolist()
        bad_loss, bad_norm = not math.isfinite(loss), not math.isfinite(norm)
        square = 0.0 if bad_norm else norm**2
        found = torch.tensor(
            [0.0 if bad_loss else loss, bad_loss, bad_norm, square], dtype=torch.float64
        )
        loss, bad_losses, bad_norms, square = comm.mean_over_ranks(found).tolist()
        if self._engine.zero_stage > 0:
            square *= comm.world_size()  # every rank has another part
        finite = not bad_norms and square < LARGEST_SQUARE
        return Verdict(
            loss=loss / (1 - bad_losses) if bad_losses < 1 else math.nan,
            norm=math.sqrt(square) if finite else None,
            bad_loss=bad_losses > 0,
        )

    def _refuse(
        self, result: StepResult, batch: Batch, verdict: Verdict, facts: Mapping[str, Any]
    ) -> None:
        """Report the step; skip it, or raise."""
        ranks = self._gather(result, batch, parameters=True)
        problem = _problem(verdict, ranks)
        if verdict.norm is None and self._engine.loss_scale != 1.0 and not verdict.bad_loss:
            problem += f" at loss scale {self._engine.loss_scale:g}, which cannot be lowered"
        step = facts["step"]
        report = self._folder / f"nonfinite-step-{step}.json"
        told = _write(report, problem, verdict, facts, result, ranks)
        self._in_a_row += 1
        if self._skip and self._in_a_row <= self._max_in_a_row:
            logger.warning(
                "step %d: %s; skipped, %d in a row of at most %d; %s",
                *(step, problem, self._in_a_row, self._max_in_a_row, told),
            )
            return
        if self._skip:
            raise DivergedError(
                f"step {step}: {problem}; {self._max_in_a_row} steps before it were skipped "
                f"already (max_nonfinite_steps), so the model has diverged; {told}. Go back to an "
                "earlier checkpoint and lower lr or set max_grad_norm, or begin anew in another precision"
            )
        raise DivergedError(
            f"step {step}: {problem}; {told}. No weight has changed in this step. A resumed run "
            "meets the same batch again: set on_nonfinite: skip to leave it out, lower lr, or begin "
            "anew in another precision"
        )

    def _warn(
        self,
        spikes: Sequence[str],
        result: StepResult,
        batch: Batch,
        verdict: Verdict,
        facts: Mapping[str, Any],
    ) -> None:
        ranks = self._gather(result, batch, parameters=False)
        problem, step = " and ".join(spikes), facts["step"]
        told = _write(
            self._folder / f"spike-step-{step}.json", problem, verdict, facts, result, ranks
        )
        logger.warning("step %d: %s; %s", step, problem, told)

    def _gather(
        self, result: StepResult, batch: Batch, *, parameters: bool
    ) -> list[dict[str, Any]]:
        """What every rank knows of its part of the step. Collective."""
        places = [self._locate(index) for index in batch.indices]
        records: dict[str, list[int]] = {}
        for name, number in places:
            records.setdefault(name, []).append(number)
        own = {
            "loss": _json_number(float(result.loss)),
            "records": records,
            "nonfinite_embeddings": self._bad_items(batch, places),
            "parameters": self._engine.nonfinite_parameters() if parameters else [],
        }
        return [{"rank": r, **found} for r, found in enumerate(comm.all_gather_objects(own))]

    def _bad_items(self, batch: Batch, places: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        found = []
        for role, finite in self._finite.items():
            owners = list(range(len(places)))
            if role == "negative":
                counts = batch.negative_counts or []
                owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
            for item in (~finite).nonzero().flatten().tolist():
                name, record = places[owners[item]]
                found.append({"role": role, "data": name, "record": record})
        return found


def step_guard(
    config: Config, engine: TrainEngine, folder: Path, *, locate: Locate = in_batch
) -> StepGuard:
    """The guard that the configuration asks for."""
    training = config.training
    return StepGuard(
        engine,
        folder=folder,
        skip=training.on_nonfinite == "skip",
        max_in_a_row=training.max_nonfinite_steps,
        spike_factor=training.spike_factor,
        locate=locate,
    )


def _finite_items(rows: Embeddings) -> Tensor:
    """``[n]`` bool."""
    values = rows.values.detach()
    if rows.mask is not None:
        values = values.masked_fill(~rows.mask.unsqueeze(-1), 0.0)
    return values.isfinite().flatten(start_dim=1).all(dim=1)


def _problem(verdict: Verdict, ranks: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: what is not finite, and where."""
    losses = [f"{r['loss']} on rank {r['rank']}" for r in ranks if isinstance(r["loss"], str)]
    items = [
        f"{item['role']} of {item['data']}, record {item['record']} (rank {r['rank']})"
        for r in ranks
        for item in r["nonfinite_embeddings"]
    ]
    names = _parameters(ranks)
    if verdict.bad_loss:
        problem = f"the loss is {_some(losses)}"
    else:
        problem = "the gradient is not finite" + (f", of {_some(names)}" if names else "")
    return problem + (f"; not finite are the embeddings of {_some(items)}" if items else "")


def _parameters(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Without repetition; at stage 0 every rank names the same."""
    return list(dict.fromkeys(name for r in ranks for name in r["parameters"]))


def _some(things: Sequence[str]) -> str:
    more = len(things) - SHOWN
    return ", ".join(things[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _write(
    path: Path,
    problem: str,
    verdict: Verdict,
    facts: Mapping[str, Any],
    result: StepResult,
    ranks: Sequence[Mapping[str, Any]],
) -> str:
    """Write a report on rank 0; what a message says of it. Collective.

    A full disk must not hide what the report is about.
    """
    told = f"the records of all ranks are in {path}"
    if comm.is_main():
        learned = {name: value.tolist() for name, value in result.learned.items()}
        report = {
            **facts,
            "problem": problem,
            "gradient_norm": verdict.norm,
            "learned": {
                name: [_json_number(number) for number in values]
                for name, values in learned.items()
                if values and isinstance(values[0], float)  # no matrices
            },
            "parameters": _parameters(ranks)[:MOST_PARAMETERS],
            "ranks": [{k: v for k, v in r.items() if k != "parameters"} for r in ranks],
        }
        try:
            path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            told = f"{path} could not be written ({one_line(error)})"
    words: str = comm.all_gather_objects(told)[0]
    return words


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: as words then."""
    return value if math.isfinite(value) else str(value)
