"""A frozen model of any family, sharded over the ranks as ZeRO-3 shards it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.data.vision_language import VisionLanguageProcessor
from vembed_ds.distributed import comm
from vembed_ds.engine.teacher_engine import Partitioner, Residence, TeacherEngine, teacher_dtype
from vembed_ds.errors import ConfigError, one_line
from vembed_ds.inference import find_model, load_processor, text_backbone
from vembed_ds.models.backbones import BackboneSource, cached_revision, vocabulary_size
from vembed_ds.models.builder import ModelSpec, build_encoder
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.hollow import HollowModel, build_hollow
from vembed_ds.teachers.identity import (
    combined_digest,
    model_digest,
    processor_digest,
    tensor_digest,
)
from vembed_ds.teachers.items import read_instruction


@dataclass(frozen=True)
class Teacher:
    """A frozen model with its processor. Stands in for the engine in ``steps``' ``embed_plan``.

    Attributes:
        name: As configured.
        engine: Holds the shards.
        processor: What turns items into its inputs.
        instructions: What it reads before texts.
        identity: What its vectors depend on beside the items.
        width: Dimensions of an embedding.
    """

    name: str
    engine: TeacherEngine
    processor: ItemProcessor
    instructions: Instructions
    identity: Mapping[str, Any]
    width: int

    @property
    def model(self) -> EmbeddingModel:
        """The model; its parameters are empty but while they are gathered."""
        model = self.engine.module
        assert isinstance(model, EmbeddingModel)
        return model

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams it embeds, in the order in which every rank embeds them."""
        return self.model.streams

    @property
    def parts(self) -> tuple[str, ...]:
        """Kinds of items, text and image, that it embeds."""
        return self.model.parts

    @property
    def gives_tokens(self) -> bool:
        """Whether an item gets one embedding per token."""
        return "none" in self.model.pooling().values()

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.engine.device

    @property
    def forwards(self) -> int:
        """Chunks embedded so far."""
        return self.engine.forwards

    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Embed a chunk without gradient; see :meth:`EmbeddingModel.forward`. Collective."""
        return self.engine.embed(inputs)

    def residence(self) -> Residence:
        """How much of its parameters this rank holds now."""
        return self.engine.residence()

    def close(self) -> None:
        """Free the shards."""
        self.engine.close()


def load_teacher(
    reference: str | Mapping[str, Any],
    *,
    name: str,
    ds_config: dict[str, Any],
    query_instruction: str | None = None,
    document_instruction: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    processor: ItemProcessor | None = None,
) -> Teacher:
    """Load a teacher into shards. Collective.

    A named model is read tensor by tensor, so that a rank never holds more of it than its own
    shards, one whole tensor and its buffers.

    Args:
        reference: Hub name, folder or ``package:...`` of a model, of this project's exports too; or
            ``{"config": {...}}``: random weights, drawn whole by every rank (for tests).
        name: As configured, for messages and the identity.
        ds_config: From :func:`resolve_teacher_config`.
        query_instruction: Before queries; ``None``: what its folder states.
        document_instruction: Before documents, likewise.
        seed: Of random weights.
        trust_remote_code: Whether code that the model brings may run.
        processor: In the place of its own; needed with ``config``.

    Raises:
        ConfigError: On every rank, when the model, a weight or its processor cannot be loaded.
    """
    place = f"loading teacher {name}"
    prepared = comm.run_together(
        lambda: _prepare(
            reference, name, seed=seed, trust_remote_code=trust_remote_code, processor=processor
        ),
        doing=place,
    )
    settings = prepared.settings
    instructions = Instructions(
        read_instruction(query_instruction, settings, "query", key="teacher_query_instruction"),
        read_instruction(
            document_instruction, settings, "document", key="teacher_document_instruction"
        ),
    )
    _check_instructions(prepared, name, instructions)
    weights = shard_weights(prepared.hollow, ds_config, doing=place)
    identity = {
        "name": name,
        "revision": prepared.revision,
        "weights": weights,
        "model": model_digest(prepared.hollow.model),
        "processor": processor_digest(prepared.processor, prepared.hollow.model.parts),
        "query_instruction": instructions.query,
        "document_instruction": instructions.document,
        "precision": str(teacher_dtype(ds_config)).removeprefix("torch."),
    }
    comm.require_equal(identity, what=f"teacher {name}")
    engine = TeacherEngine(prepared.hollow.model, ds_config=ds_config)
    return Teacher(name, engine, prepared.processor, instructions, identity, prepared.width)


@dataclass(frozen=True)
class _Prepared:
    """A teacher before it has weights."""

    hollow: HollowModel
    processor: ItemProcessor
    settings: Mapping[str, Any]
    revision: str | None
    width: int


def _prepare(
    reference: str | Mapping[str, Any],
    name: str,
    *,
    seed: int,
    trust_remote_code: bool,
    processor: ItemProcessor | None,
) -> _Prepared:
    try:
        if isinstance(reference, str):
            saved = find_model(reference, trust_remote_code=trust_remote_code)
            hollow = build_hollow(saved.spec)
            processor = processor or load_processor(saved, hollow.model)
            settings = saved.settings
            revision = cached_revision(BackboneSource(name=saved.source))
        else:
            hollow, settings, revision = _random(reference["config"], seed), {}, None
        if processor is None:
            raise ConfigError("has a config and no files, so no processor; give it one")
        _check_vocabulary(hollow.model, processor)
        width = _width(hollow.model, processor)
    except ConfigError as error:
        raise ConfigError([f"teacher {name}: {problem}" for problem in error.problems]) from error
    return _Prepared(hollow, processor, settings, revision, width)


def _check_vocabulary(model: EmbeddingModel, processor: ItemProcessor) -> None:
    """A token without an embedding would fail at the item that has it, on one rank."""
    if "text" not in model.parts or processor.tokenizer is None:
        return
    size = vocabulary_size(text_backbone(model))
    highest = max(processor.tokenizer.get_vocab().values())
    if size is not None and highest >= size:
        raise ConfigError(
            f"its vocab_size is {size}, but its tokenizer has tokens up to number {highest}; give the "
            "tokenizer that belongs to it"
        )


def _check_instructions(prepared: _Prepared, name: str, instructions: Instructions) -> None:
    """What stands before every text must leave room for it, or all texts are the same."""
    processor = prepared.processor
    if "text" not in prepared.hollow.model.parts or processor.max_length is None:
        return
    if isinstance(processor, VisionLanguageProcessor):
        return  # an item without room is an error of its own there
    for key, instruction in vars(instructions).items():
        taken = len(processor.tokenizer(instruction, verbose=False)["input_ids"])
        if taken >= processor.max_length:
            raise ConfigError(
                f"teacher {name}: reads {processor.max_length} tokens, and special tokens and "
                f"teacher_{key}_instruction take {taken}, which leaves none for the text; shorten it"
            )


def _random(config: Mapping[str, Any], seed: int) -> HollowModel:
    """A model that lacks nothing: its weights are drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(ModelSpec({"": BackboneSource(config=config)}))
    return HollowModel(EmbeddingModel(encoder).eval().requires_grad_(False), frozenset(), ())


@torch.no_grad()
def _width(model: EmbeddingModel, processor: ItemProcessor) -> int:
    """Dimensions of an embedding: of a filler's, whatever the weights are.

    Raises:
        ConfigError: The model does not take what the processor gives.
    """
    part = model.parts[0]
    try:
        return int(model({part: processor.pad(part, [processor.filler(part)])})[part].shape[-1])
    except Exception as error:  # whatever a model raises for inputs that it is not made for
        raise ConfigError(
            f"the model does not embed what its processor gives ({one_line(error)}); the model is "
            "not supported, or processor and model do not belong together"
        ) from error


def shard_weights(hollow: HollowModel, ds_config: dict[str, Any], *, doing: str) -> str:
    """Give every parameter its weights and keep this rank's shards. Collective.

    Args:
        hollow: Its stream is read to the end.
        ds_config: From :func:`resolve_teacher_config`.
        doing: Words for the message of a failing file operation.

    Returns:
        The :func:`weights_digest` of the model, float32, whatever the teacher's precision.

    Raises:
        ConfigError: On every rank, when a tensor cannot be read or does not fit.
    """
    names = sha256(repr(sorted(hollow.names)).encode()).hexdigest()
    comm.require_equal(names, what=f"{doing}, digest of the names of its weights")
    model, partitioner = hollow.model, Partitioner(ds_config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    digests: dict[str, str] = {}
    taken: dict[nn.Parameter, str] = {}
    stream = hollow.tensors()
    while found := comm.run_together(lambda: next(stream, None), doing=doing):
        name, value = found
        digests[name] = tensor_digest(value)
        if name in buffers:
            buffers[name].copy_(value)
        elif (first := taken.setdefault(parameters[name], name)) == name:
            partitioner.take(parameters[name], value)
        elif digests[name] != digests[first]:
            raise ConfigError(
                f"{doing}: its config.json ties {name} to {first}, and its files hold other values "
                "for either; set tie_word_embeddings: false there"
            )
    for name, parameter in parameters.items():
        if (first := taken.setdefault(parameter, name)) == name and name not in digests:
            digests[name] = tensor_digest(parameter)  # it was there already
            partitioner.take(parameter, parameter.data)
        digests[name] = digests[first]
    saved = model.state_dict().keys()
    digests |= {name: tensor_digest(b) for name, b in buffers.items() if name in saved}
    return combined_digest(digests)
