"""What the teachers of a run say of a batch: by a forward pass, from a table, or from the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vembed_ds.data.batches import StepPlan, plan_step
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.collators import Batch
from vembed_ds.data.processors import EncodedItem
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.data.vector_table import VectorTable
from vembed_ds.errors import VembedError
from vembed_ds.losses import TeacherScores, TeacherVectors
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import Embedder, PadFunction, embed_plan
from vembed_ds.teachers.ema import EmaTeacher
from vembed_ds.teachers.first_epoch import FirstEpoch
from vembed_ds.teachers.teacher import Teacher

Said = TeacherVectors | TeacherScores


class Source(ABC):
    """One teacher during training; most do nothing but to judge."""

    @abstractmethod
    def judge(self, batch: Batch, plan: StepPlan, pad: PadFunction) -> Said:
        """What the teacher says of the batch, constants. Collective.

        Args:
            batch: From :meth:`attach`.
            plan: The student's.
            pad: The student's.
        """

    def attach(self, batch: Batch) -> Batch:
        """The batch with what this rank can look up for it, or with an error. Local."""
        return batch

    def after_step(self, step: int, *, updated: bool) -> None:  # noqa: B027
        """Told after every optimizer step. Collective.

        Args:
            step: Optimizer steps done.
            updated: Whether the last one changed the weights (fp16 skips some).
        """

    def before_save(self) -> None:  # noqa: B027
        """Told before a checkpoint is written. Collective."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write this rank's part of what a resumed run needs into a checkpoint. Local."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Put back what :meth:`save` wrote. Collective."""


@dataclass
class StoredScores(Source):
    """Scores that stand in the data."""

    device: torch.device

    def judge(self, batch: Batch, plan: StepPlan, pad: PadFunction) -> TeacherScores:
        """The scores of the batch's pairs."""

        def numbers(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32).to(self.device, non_blocking=True)

        assert batch.teacher_scores is not None
        negative = batch.negative_scores
        return TeacherScores(
            numbers(batch.teacher_scores), None if negative is None else numbers(negative)
        )


@dataclass
class LiveTeacher(Source):
    """A frozen model that embeds every batch.

    Args:
        teacher: The model in its shards.
        batch_size: As of :func:`embed_roles`.
    """

    teacher: Teacher
    batch_size: int

    def judge(self, batch: Batch, plan: StepPlan, pad: PadFunction) -> TeacherVectors:
        """The embeddings of the batch's items."""
        return vectors(self.embed(batch.teacher_roles[self.teacher.name]))

    def embed(self, roles: Mapping[str, Sequence[EncodedItem]]) -> dict[str, Embeddings]:
        """Embed items by role, chunk by chunk, without gradient. Collective."""
        return embed_roles(self.teacher, roles, batch_size=self.batch_size)


@dataclass
class CachedTeacher(Source):
    """A teacher whose vectors of all items lie on the disk.

    Args:
        name: Of the teacher.
        table: Its vectors.
        instructions: What it read before texts; they are part of the table's keys.
        device: Where the vectors go.
    """

    name: str
    table: VectorTable
    instructions: Instructions
    device: torch.device

    def attach(self, batch: Batch) -> Batch:
        """The batch with the vectors of its items."""
        if batch.error is not None:
            return batch
        try:
            found = {
                role: self.table.embeddings(self.instructions.keys(role, numbers))
                for role, numbers in batch.keys.items()
            }
        except VembedError as error:
            return replace(batch, error=error)
        return replace(batch, vectors={**batch.vectors, self.name: found})

    def judge(self, batch: Batch, plan: StepPlan, pad: PadFunction) -> TeacherVectors:
        """The vectors of the batch's items."""
        found = batch.vectors[self.name]
        return vectors({role: rows.to(self.device) for role, rows in found.items()})


class FirstEpochTeacher(Source):
    """Embeds the batches of the first epoch and keeps the vectors; from then on looks them up.

    Args:
        live: The teacher of the first epoch.
        filling: Where its vectors go.
        steps_per_epoch: Steps of the first epoch.
        finish: Embeds what the epoch did not meet, and lets go of the teacher; collective.
    """

    def __init__(
        self,
        live: LiveTeacher,
        filling: FirstEpoch,
        *,
        steps_per_epoch: int,
        finish: Callable[[], CachedTeacher],
    ) -> None:
        self._source: LiveTeacher | CachedTeacher = live
        self._filling, self._finish = filling, finish
        self._steps_per_epoch = steps_per_epoch

    def attach(self, batch: Batch) -> Batch:
        """As the teacher of this epoch does."""
        return self._source.attach(batch)

    def judge(self, batch: Batch, plan: StepPlan, pad: PadFunction) -> Said:
        """As the teacher of this epoch does; keeps the vectors of the first."""
        if isinstance(self._source, CachedTeacher):
            return self._source.judge(batch, plan, pad)
        teacher = self._source.teacher
        rows = self._source.embed(batch.teacher_roles[teacher.name])
        for role, numbers in batch.keys.items():
            self._filling.add(teacher.instructions.keys(role, numbers), rows[role])
        return vectors(rows)

    def after_step(self, step: int, *, updated: bool) -> None:
        """At the end of the first epoch the table is finished."""
        if step == self._steps_per_epoch:
            self._filling.commit()
            self._source = self._finish()

    def before_save(self) -> None:
        """What was embedded up to here is kept for the run that resumes from here."""
        if isinstance(self._source, LiveTeacher):
            self._filling.commit()


@dataclass
class SameInputs(Source):
    """A frozen model that is given the very inputs of the student.

    Args:
        embedder: The model in its shards.
    """

    embedder: Embedder

    def judge(self, batch: Batch, plan: StepPlan, pad: PadFunction) -> TeacherVectors:
        """The embeddings of the student's items."""
        return vectors(embed_plan(self.embedder, plan, pad=pad))


@dataclass
class EmaSource(Source):
    """The student's moving average; it sees what the student sees.

    Args:
        teacher: The average, in shards.
        num_layers: Layers that the student's embeddings hold side by side; the last one teaches.
    """

    teacher: EmaTeacher
    num_layers: int

    def judge(self, batch: Batch, plan: StepPlan, pad: PadFunction) -> TeacherVectors:
        """The embeddings of the student's items."""
        rows = embed_plan(self.teacher, plan, pad=pad)
        width = rows["query"].width
        own = width // self.num_layers
        return vectors({role: found.dims(width - own, width) for role, found in rows.items()})

    def after_step(self, step: int, *, updated: bool) -> None:
        """The average moves."""
        if updated:
            self.teacher.update()

    def save(self, folder: Path) -> None:
        """This rank's shards of the average."""
        self.teacher.save(folder)

    def load(self, folder: Path) -> None:
        """This rank's shards of the average."""
        self.teacher.load(folder)


class Teachers:
    """Every teacher of a run; without any, nothing happens.

    Args:
        sources: What each of them is during training, by its place in the configuration.
        widths: G of those that are models of their own, likewise.
    """

    def __init__(self, sources: Mapping[int, Source], *, widths: Mapping[int, int]) -> None:
        self.sources = dict(sources)
        self.widths = dict(widths)

    def attach(self, batch: Batch) -> Batch:
        """The batch with what this rank looks up for it, or with an error. Local."""
        for source in self.sources.values():
            batch = source.attach(batch)
        return batch

    def judge(self, batch: Batch, plan: StepPlan, pad: PadFunction) -> tuple[Said, ...]:
        """What each of them says of the batch, without gradient. Collective."""
        return tuple(
            self.sources[number].judge(batch, plan, pad) for number in sorted(self.sources)
        )

    def after_step(self, step: int, *, updated: bool) -> None:
        """Told after every optimizer step, see :class:`Source`. Collective."""
        for source in self.sources.values():
            source.after_step(step, updated=updated)

    def before_save(self) -> None:
        """Told before a checkpoint is written. Collective."""
        for source in self.sources.values():
            source.before_save()

    def save(self, folder: Path) -> None:
        """Write what belongs to this rank into a checkpoint. Local."""
        for source in self.sources.values():
            source.save(folder)

    def load(self, folder: Path) -> None:
        """Put back what :meth:`save` wrote. Collective.

        Raises:
            CheckpointError: On every rank, when it is not there or does not fit.
        """
        for source in self.sources.values():
            source.load(folder)


NO_TEACHERS = Teachers({}, widths={})


def embed_roles(
    teacher: Teacher, roles: Mapping[str, Sequence[EncodedItem]], *, batch_size: int
) -> dict[str, Embeddings]:
    """Embed a teacher's items by role, equal ones once. Collective.

    Args:
        teacher: The model in its shards.
        roles: Items that its processor encoded.
        batch_size: Items per rank in a forward pass, or more where they are shorter than the longest.
    """
    streams, processor = teacher.streams, teacher.processor
    plan = plan_step(
        roles,
        budget=ChunkBudget(batch_size),
        streams=streams,
        filler=processor.filler,
        merged=streams,  # a teacher draws no random numbers
    )
    return embed_plan(teacher, plan, pad=processor.pad)


def vectors(rows: Mapping[str, Embeddings]) -> TeacherVectors:
    """A teacher's embeddings by role, as a loss takes them."""
    return TeacherVectors(rows["query"], rows["positive"], rows.get("negative"))
