"""What the traffic model predicts for the steps of an engine that is running."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from vembed_ds.engine.choices import Gather, Reduce
from vembed_ds.engine.traffic_model import (
    predict_embedding_bytes,
    predict_step_bytes,
    reused_share,
)


class StepTraffic:
    """Bytes that a rank sends, by :mod:`vembed_ds.engine.traffic_model`; nothing is counted.

    Args:
        engine: What :func:`deepspeed.initialize` returned.
        gather: When ZeRO-3 gathers parameters.
        reduce: When gradients are reduced.
        idle: Parameters that no pass of a step needs.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        *,
        gather: Gather,
        reduce: Reduce,
        idle: Collection[nn.Parameter],
    ) -> None:
        parameters, left_out = list(engine.module.parameters()), set(idle)
        trained = [p for p in parameters if p.requires_grad]
        used = _elements(p for p in parameters if p not in left_out)
        self._world_size = int(engine.dp_world_size)
        # gloo scatters a reduced tensor by reducing it for all.
        self._scatter_units = 2 if engine.device.type == "cpu" else 1
        self._model: dict[str, Any] = {
            "zero_stage": int(engine.zero_optimization_stage()),
            "parameters": used,
            "trained": _elements(trained),
            "element_size": trained[0].element_size(),
            "zero3_gather": gather.value,
            "gradient_reduction": reduce.value,
            "persistent": _elements(p for p in parameters if getattr(p, "ds_persist", False)),
            "reused": reused_share(used, int(engine.zero_max_reuse_distance())),
            "machine_ranks": max(1, int(engine.zero_hpz_partition_size())),
        }

    def predict(self, *, num_chunks: int, kept_chunks: int, gathered_values: int) -> float:
        """Of one step and rank. Local.

        Args:
            num_chunks: Of the step.
            kept_chunks: Those of them that keep their graph.
            gathered_values: Numbers of the embeddings of all ranks that are columns of the loss.
        """
        shared: dict[str, Any] = {
            "world_size": self._world_size,
            "scatter_units": self._scatter_units,
        }
        step = predict_step_bytes(
            num_chunks=num_chunks, kept_chunks=kept_chunks, **shared, **self._model
        )
        return step.total + predict_embedding_bytes(rows=gathered_values, width=1, **shared)


def _elements(parameters: Iterable[Any]) -> int:
    """Of whole parameters, also where ZeRO-3 keeps a part of them."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)
