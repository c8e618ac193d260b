"""The most that a rank holds in a step: of the model's state, of chunks and of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vembed_ds.planning.activations import ChunkMemory
from vembed_ds.planning.loss import LossMemory
from vembed_ds.planning.states import States

ROWS = ("parameters", "gradients", "optimizer", "buffers", "activations", "embeddings", "loss")


@dataclass(frozen=True)
class Cut:
    """How a rank's batch is cut into chunks.

    Attributes:
        chunks: Number of them.
        kept: How many keep their graphs; at least 1.
        chunk: What one takes.
    """

    chunks: int
    kept: int
    chunk: ChunkMemory


@dataclass(frozen=True)
class Peak:
    """The most that a rank holds on its device.

    Attributes:
        phase: Of the step, in which that is.
        rows: Bytes by what they are; every key of :data:`ROWS`.
    """

    phase: str
    rows: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.rows.values())


def peak_of(states: States, cut: Cut, loss: LossMemory, *, precision: str, per_chunk: bool) -> Peak:
    """The fullest moment of a step.

    Args:
        states: Of the model.
        cut: Of the batch.
        loss: What embeddings and loss take.
        precision: Of the model. Float32 gradients are added up in place; in 16 bit every backward pass
            makes its own, which is then added to a float32 sum.
        per_chunk: Whether gradients go while a backward pass makes them.
    """
    chunk, kept = cut.chunk, cut.kept
    first, later = chunk.first_peak, chunk.first_peak if precision != "fp32" else chunk.peak
    if per_chunk:
        first = later = chunk.peak
    held = {"parameters": states.parameters, "optimizer": states.optimizer}
    buffers = {"buffers": states.buffers}
    embedding = {**held, **buffers, "parameters": states.parameters + states.gathered}
    replaying = {**held, **buffers, "parameters": states.parameters + states.gathered_again}
    # What was gathered for all chunks is put away before the first one that is computed again.
    later_parameters = replaying if kept == 1 else embedding
    summed = {"gradients": states.gradients}
    rows = {
        "loss": {
            **embedding,
            "activations": kept * chunk.saved,
            "embeddings": loss.kept,
            "loss": loss.peak - loss.kept,
        },
        "backward pass of the first chunk": {
            **embedding,
            **(summed if per_chunk else {}),
            "activations": (kept - 1) * chunk.saved + first,
            "embeddings": loss.kept,
        },
        "reduction": {
            **held,
            **buffers,
            "gradients": states.gradients + states.reducing,
            "embeddings": loss.kept,
        },
        "update": {**held, "buffers": states.buffers + states.updating},
    }
    if cut.chunks > 1:
        # Sums of 16-bit gradients begin with the second chunk, which nothing is added to yet.
        begun = cut.chunks > 2 or not states.pending
        rows["forward pass of a later chunk"] = {
            **replaying,
            "gradients": states.pending + (states.gradients if begun else 0),
            "activations": max(0, kept - 2) * chunk.saved
            + max(chunk.forward_peak, chunk.saved + (states.adding if begun else 0)),
            "embeddings": loss.kept,
        }
        rows["backward pass of a later chunk"] = {
            **later_parameters,
            **summed,
            "activations": max(0, kept - 2) * chunk.saved + later,
            "embeddings": loss.kept,
        }
    peaks = [
        Peak(phase, {name: found.get(name, 0) for name in ROWS}) for phase, found in rows.items()
    ]
    return max(peaks, key=lambda peak: peak.total)
