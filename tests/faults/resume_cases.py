"""What a rank of a test world runs to see whether a run goes on from a checkpoint, and how."""

from __future__ import annotations

import hashlib
import logging
import random
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.distributed.train_cases import run_train
from vembed_ds.data.collators import Batch
from vembed_ds.steps.gradient_cache import StepResult
from vembed_ds.training import run as run_module
from vembed_ds.training.loop import TrainingLoop


def run_and_listen(**options: Any) -> dict[str, Any]:
    """As :func:`run_train`; with what was logged, and whether a model was built."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vembed_ds")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    built = mock.Mock(wraps=run_module.read_model)
    try:
        with mock.patch.object(run_module, "read_model", built):
            answer = run_train(**options)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return {**answer, "log": "\n".join(lines), "built": built.called}


def run_and_record(**options: Any) -> dict[str, Any]:
    """As :func:`run_train`; with what every step began from, by the steps done before it.

    Of each step: the records of this rank's batch, and a digest of its random generators.
    """
    steps: dict[int, Any] = {}
    inner = TrainingLoop.compute_gradient

    def compute_gradient(loop: TrainingLoop, batch: Batch) -> StepResult:
        steps[loop.step] = (list(batch.indices), batch.member, _digest_of_generators())
        return inner(loop, batch)

    with mock.patch.object(TrainingLoop, "compute_gradient", compute_gradient):
        answer = run_train(**options)
    return {**answer, "steps": steps}


def _digest_of_generators() -> str:
    states = (torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state())
    return hashlib.sha256(repr(states).encode()).hexdigest()
