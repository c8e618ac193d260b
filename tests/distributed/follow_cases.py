"""What a rank of a test world sees of a run beside what the run logs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch

from tests.distributed.train_cases import run_train
from vembed_ds.data.batches import StepPlan
from vembed_ds.similarity import Embeddings
from vembed_ds.training import log_line
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.nonfinite import StepGuard


def run_seen(**options: Any) -> dict[str, Any]:
    """:func:`run_train`; and of every step what this rank embedded, its plan, loss and rates.

    Seen outside of what computes the metrics; with a digest of the weights at the end.
    """
    seen: list[dict[str, Any]] = []
    see, count, save = TrainingLoop._see, TrainingLoop._count, TrainingLoop.save
    accept, gather = StepGuard.accept, log_line.comm.all_gather_floats
    digest = hashlib.sha256()
    gathers = trained = 0

    def saw(self: TrainingLoop, rows: Mapping[str, Embeddings]) -> Any:
        found = {role: e.values.detach().double().numpy().copy() for role, e in rows.items()}
        seen.append({"step": self.step + 1, "rows": found})
        return see(self, rows)

    def counted(self: TrainingLoop, plan: StepPlan) -> None:
        lengths = {
            stream: [len(item.inputs.get("input_ids", [])) for item in items]
            for stream, items in plan.streams.items()
        }
        seen[-1] |= {"lengths": lengths, "chunks": plan.chunks, "kept": self.memory.graphs.number}
        count(self, plan)

    def accepted(self: StepGuard, result: Any, *arguments: Any, **more: Any) -> bool:
        engine = self._engine
        groups = [group["lr"] for group in engine.engine.optimizer.param_groups]
        scale = result.learned["logit_scale"]
        seen[-1] |= {"loss": result.loss.clone(), "rates": groups, "scale": float(scale)}
        return accept(self, result, *arguments, **more)

    def gathered(values: Any) -> Any:
        nonlocal gathers
        gathers += 1
        return gather(values)

    def saved(self: TrainingLoop) -> None:
        save(self)
        nonlocal trained
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        for parameter in self.model.parameters():
            digest.update(parameter.detach().contiguous().numpy().tobytes())

    with (
        mock.patch.object(TrainingLoop, "_see", saw),
        mock.patch.object(TrainingLoop, "_count", counted),
        mock.patch.object(TrainingLoop, "save", saved),
        mock.patch.object(StepGuard, "accept", accepted),
        mock.patch.object(log_line.comm, "all_gather_floats", gathered),
    ):
        answer = run_train(**options)
    return answer | {
        "seen": seen,
        "weights": digest.hexdigest(),
        "gathers": gathers,
        "trained": trained,
        "random": torch.get_rng_state().sum().item(),
    }
