"""The guide models of a run: their vectors of all items, for the losses that ask for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.accelerator import get_accelerator

from vembed_ds.config.schema import Config, LossConfig
from vembed_ds.data.collators import Batch
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.data.vector_table import VectorTable, remove_table
from vembed_ds.distributed import comm
from vembed_ds.errors import ConfigError, VembedError
from vembed_ds.inference import Encoder, embed_items
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.similarity import Embeddings
from vembed_ds.teachers.cache import open_cache, open_table
from vembed_ds.teachers.identity import (
    identity_digest,
    model_digest,
    processor_digest,
    weights_digest,
)
from vembed_ds.teachers.items import read_instruction
from vembed_ds.teachers.precompute import precompute
from vembed_ds.training.data_setup import RunData, loader_timeout
from vembed_ds.training.engine_setup import inference_batch_size
from vembed_ds.training.loss_inputs import GUIDE

logger = logging.getLogger(__name__)


class GuideSpec(NamedTuple):
    """A guide as configured; two losses with equal ones share its vectors."""

    model_name: str
    query_instruction: str | None
    document_instruction: str | None


@dataclass(frozen=True)
class LoadedGuide:
    """A guide, before it has embedded anything.

    Attributes:
        model_name: As configured.
        encoder: The model with its processor.
        instructions: What it reads before texts.
        members: Numbers of the data sets whose losses ask for it.
        identity: What its vectors of these data sets depend on.
    """

    model_name: str
    encoder: Encoder
    instructions: Instructions
    members: Sequence[int]
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class GuideVectors:
    """A guide's vectors of the items of some data sets."""

    table: VectorTable
    instructions: Instructions

    def of(self, keys: Mapping[str, Sequence[int]]) -> dict[str, Embeddings]:
        """``[n, G]`` of every role, by the contents of its items.

        Raises:
            DataError: The table has no vector for an item.
        """
        return {
            role: self.table.embeddings(self.instructions.keys(role, numbers))
            for role, numbers in keys.items()
        }


@dataclass(frozen=True)
class Guides:
    """The vectors for every data set of a run; empty when no loss asks for a guide."""

    of_member: Mapping[int, GuideVectors] = field(default_factory=dict)

    def attach(self, batch: Batch) -> Batch:
        """The batch with its guide's vectors, or with an error, on which the ranks agree."""
        guide = self.of_member.get(batch.member)
        if guide is None or batch.error is not None:
            return batch
        try:
            return replace(batch, vectors={**batch.vectors, GUIDE: guide.of(batch.keys)})
        except VembedError as error:
            return replace(batch, error=error)


def load_guides(losses: Sequence[LossConfig], data: RunData) -> list[LoadedGuide]:
    """Load every guide that a loss asks for. Collective.

    Args:
        losses: Of every data set; one for all when batches are mixed.
        data: The run's.

    Raises:
        ConfigError: On every rank, when a guide cannot be loaded, or does not embed what the data
            holds to one vector per item.
    """
    specs = [_spec_of(loss) for loss in losses]
    wanted = sorted({spec for spec in specs if spec is not None}, key=str)
    return [
        _loaded(spec, [number for number, own in enumerate(specs) if own == spec], data)
        for spec in wanted
    ]


def guides_identity(guides: Sequence[LoadedGuide]) -> dict[str, str]:
    """What a resumed run must have the same, by the words of a message; empty without guides."""
    return {f"guide.{guide.model_name}": identity_digest(guide.identity) for guide in guides}


def embed_guides(
    guides: Sequence[LoadedGuide], config: Config, data: RunData, *, folder: Path
) -> Guides:
    """Embed all items with every guide, before the model is built. Collective.

    Args:
        guides: From :func:`load_guides`.
        config: The run's configuration.
        data: The run's; from then on its training data names image files by their content.
        folder: The run's.

    Raises:
        DataError: On every rank, when an item cannot be read.
    """
    found: dict[int, GuideVectors] = {}
    for guide in guides:
        members = [data.tables[number] for number in guide.members]
        for member in members:
            member.read_files = True
        vectors = _embed(guide, members, config=config, folder=folder)
        found |= dict.fromkeys(guide.members, vectors)
    return Guides(found)


def _spec_of(loss: LossConfig) -> GuideSpec | None:
    if loss.guide_model_name is None:
        return None
    return GuideSpec(
        loss.guide_model_name, loss.guide_query_instruction, loss.guide_document_instruction
    )


def _loaded(spec: GuideSpec, members: Sequence[int], data: RunData) -> LoadedGuide:
    tables = [data.tables[number] for number in members]
    encoder = comm.run_together(lambda: _load(spec, tables), doing=f"loading {spec.model_name}")
    instructions = Instructions(
        query=read_instruction(
            spec.query_instruction, encoder.settings, "query", key="guide_query_instruction"
        ),
        document=read_instruction(
            spec.document_instruction,
            encoder.settings,
            "document",
            key="guide_document_instruction",
        ),
    )
    logger.info(
        "guide %s: instructions %r and %r",
        spec.model_name,
        instructions.query,
        instructions.document,
    )
    identity = {
        "weights": weights_digest(encoder.model.state_dict().items()),
        "model": model_digest(encoder.model),
        "processor": processor_digest(encoder.processor, encoder.model.parts),
        "query_instruction": instructions.query,
        "document_instruction": instructions.document,
        "data": data.fingerprint,
        "data_sets": list(members),
    }
    comm.require_equal(identity, what=f"guide_model_name={spec.model_name}")
    return LoadedGuide(spec.model_name, encoder, instructions, members, identity)


def _embed(
    guide: LoadedGuide, members: Sequence[PairDataset], *, config: Config, folder: Path
) -> GuideVectors:
    """Once per run: what is complete is not looked at again, so that changed data is noticed."""
    complete = folder / f"guide-{identity_digest(guide.identity)}"
    table = open_cache(complete, identity=guide.identity)
    if table is None:
        unfinished = complete.with_name(f"{complete.name}.unfinished")
        comm.run_on_main(lambda: remove_table(unfinished), doing=f"deleting {unfinished}")
        encoder = guide.encoder
        precompute(
            members,
            folder=unfinished,
            identity=guide.identity,
            processor=encoder.processor,
            instructions=guide.instructions,
            embed=lambda items: embed_items(encoder.model, encoder.processor, items),
            batch_size=inference_batch_size(config),
            num_workers=config.data.num_workers,
            timeout_seconds=loader_timeout(config),
        )
        comm.run_on_main(lambda: unfinished.rename(complete), doing=f"writing {complete}")
        table = open_table(complete)
    return GuideVectors(table, guide.instructions)


def _load(spec: GuideSpec, members: Sequence[PairDataset]) -> Encoder:
    key = f"guide_model_name={spec.model_name!r}"
    try:
        guide = Encoder(spec.model_name, device=get_accelerator().current_device_name())
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    if _gives_tokens(guide.model):
        raise ConfigError(
            f"{key}: embeds an item to one vector per token; a guide gives one in all"
        )
    needed = {part for member in members for part in member.reader.parts}
    if missing := sorted(needed - set(guide.model.parts)):
        raise ConfigError(
            f"{key}: embeds {' and '.join(guide.model.parts)} only, and the data holds "
            f"{' and '.join(missing)} too; choose a guide that embeds both"
        )
    return guide


def _gives_tokens(model: EmbeddingModel) -> bool:
    return "none" in model.pooling().values()
