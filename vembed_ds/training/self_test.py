"""Chunks must not change the gradient of the run's own model on its own data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain

from vembed_ds.data.collators import collate
from vembed_ds.data.dataset import Sample
from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError
from vembed_ds.steps.self_test import TOLERANCES, check_gradient
from vembed_ds.training.data_setup import RunData
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.stream_setup import some_samples

logger = logging.getLogger(__name__)

SELF_TEST_CANDIDATES = 16  # per rank; three of them are compared


def self_test(loop: TrainingLoop, data: RunData, *, precision: str) -> None:
    """Stop the run when chunking changes the gradient of its own model on its own data."""
    samples = some_samples(data, number=SELF_TEST_CANDIDATES)
    comm.raise_together(next((s for s in samples if isinstance(s, VembedError)), None))
    chosen = _unequal([sample for sample in samples if isinstance(sample, Sample)])
    batch = loop.attach(collate(chosen))
    comm.raise_together(batch.error)
    said = loop.teachers.judge(batch, loop.plan(batch), loop.pad)
    difference = check_gradient(
        loop.engine,
        batch.roles,
        loss_function=loop.batch_loss(batch, said),
        pad=loop.pad,
        streams=loop.model.streams,
        trainable=loop.model.trainable,
        fillers=loop.fillers(loop.agree_on_counts(batch)),
        tolerance=TOLERANCES[precision],
    )
    if comm.is_main():
        logger.info(
            "gradient self-test passed: chunking moves the gradient by %.1e of its norm (limit %.0e)",
            difference,
            TOLERANCES[precision],
        )


def _unequal(samples: Sequence[Sample]) -> list[Sample]:
    """The shortest, the middle and the longest, so that chunks are padded differently."""

    def size(sample: Sample) -> int:
        items = chain.from_iterable(sample.roles.values())
        return sum(array.size for item in items for array in item.inputs.values())

    ordered = sorted(samples, key=size)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
