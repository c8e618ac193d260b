"""What a rank of a test world runs to see whether a run goes on from a checkpoint, and how."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

from tests.distributed.train_cases import run_train
from vembed_ds.training import run as run_module


def run_and_listen(**options: Any) -> dict[str, Any]:
    """As :func:`run_train`; with what was logged, and whether a model was built."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vembed_ds")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    built = mock.Mock(wraps=run_module.prepare_model)
    try:
        with mock.patch.object(run_module, "prepare_model", built):
            answer = run_train(**options)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return {**answer, "log": "\n".join(lines), "built": built.called}
