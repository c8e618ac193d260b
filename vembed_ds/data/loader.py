"""The DataLoader, set up so that its results never depend on the number of workers."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch.utils.data import DataLoader, Sampler

from vembed_ds.data.collators import Batch, collate
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.sampler import SampleKey


def build_loader(
    dataset: PairDataset,
    sampler: Sampler[list[SampleKey]] | Iterable[list[int]],
    *,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
    persistent_workers: bool,
) -> DataLoader[Batch]:
    """Builds the loader of one rank.

    Args:
        dataset: The pairs.
        sampler: Yields the keys of one batch at a time: ``SampleKey`` for training, row
            numbers for evaluation (never augmented).
        num_workers: Worker processes; 0 encodes in this process.
        prefetch_factor: Batches that each worker prepares ahead.
        pin_memory: Passed on where an accelerator is present. Items are numpy arrays, which
            stay unpinned; pin the padded chunk.
        persistent_workers: Keep workers between iterations.

    Returns:
        A loader of batches in sampler order. Iterating does not touch torch's default
        random state.
    """
    # Before the fork: tokenizers else print a warning in each worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # collate turns samples into a Batch
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=persistent_workers and num_workers > 0,
        pin_memory=pin_memory and torch.accelerator.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),
    )


def _start_worker(_worker_id: int) -> None:
    """Keeps a worker to one core; the default would start one thread per core in each."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
