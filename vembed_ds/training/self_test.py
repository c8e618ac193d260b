"""What is found out about the run's own model on its own data, before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain

from vembed_ds.config.schema import TrainingConfig
from vembed_ds.data.chunking import size_of
from vembed_ds.data.collators import collate
from vembed_ds.data.dataset import Sample
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm, phases
from vembed_ds.errors import VembedError
from vembed_ds.steps.self_test import TOLERANCES, check_gradient
from vembed_ds.training.data_setup import RunData
from vembed_ds.training.drawing import examine_draws
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.stream_setup import some_samples

logger = logging.getLogger(__name__)

CANDIDATES = 16  # samples per rank; the self-test compares three of them


def examine(loop: TrainingLoop, data: RunData, training: TrainingConfig, *, precision: str) -> None:
    """Look at the run's own model on its own data before the first step. Collective.

    Weights, optimizer and random states are afterwards as they were.

    Raises:
        GradientError: Chunks change the gradient.
        ConfigError: The model cannot compute a chunk twice alike.
        VembedError: On every rank, when a sample cannot be used.
    """
    if not (training.gradient_self_test or training.encode_duplicates_once):
        return
    found = some_samples(data, number=CANDIDATES)
    comm.raise_together(next((s for s in found if isinstance(s, VembedError)), None))
    samples = [sample for sample in found if isinstance(sample, Sample)]
    examine_draws(loop, _largest(samples), merge=training.encode_duplicates_once)
    if training.gradient_self_test:
        phases.set_place("gradient self-test")
        self_test(loop, samples, precision=precision)


def self_test(loop: TrainingLoop, samples: Sequence[Sample], *, precision: str) -> None:
    """Stop the run when chunking changes the gradient of some samples. Collective."""
    batch = loop.attach(collate(_unequal(samples)))
    comm.raise_together(batch.error)
    said = loop.teachers.judge(batch, loop.plan(batch), loop.pad)
    difference = check_gradient(
        loop.engine,
        batch.roles,
        loss_function=loop.batch_loss(batch, said),
        pad=loop.pad,
        streams=loop.model.streams,
        trainable=loop.model.trainable,
        filler=loop.processor.filler,
        tolerance=TOLERANCES[precision],
    )
    if comm.is_main():
        logger.info(
            "gradient self-test passed: chunking moves the gradient by %.1e of its norm (limit %.0e)",
            difference,
            TOLERANCES[precision],
        )


def _largest(samples: Sequence[Sample]) -> dict[str, EncodedItem]:
    """Of every stream the largest item: some models draw for long ones only."""
    found: dict[str, EncodedItem] = {}
    for item in chain.from_iterable(chain.from_iterable(s.roles.values()) for s in samples):
        largest = found.setdefault(item.stream, item)
        if size_of(item) > size_of(largest):
            found[item.stream] = item
    return found


def _unequal(samples: Sequence[Sample]) -> list[Sample]:
    """The shortest, the middle and the longest, so that chunks are padded differently."""

    def size(sample: Sample) -> int:
        items = chain.from_iterable(sample.roles.values())
        return sum(array.size for item in items for array in item.inputs.values())

    ordered = sorted(samples, key=size)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
