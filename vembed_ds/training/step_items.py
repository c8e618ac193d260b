"""What the items of a run look like, from a sample of its data or without any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from vembed_ds.config.schema import Config
from vembed_ds.data.dataset import Sample
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.errors import ConfigError, VembedError
from vembed_ds.models.builder import ModelSpec
from vembed_ds.streams import JOINT
from vembed_ds.training.data_setup import build_dataset, dataset_entries, open_source
from vembed_ds.training.model_setup import setup_processor
from vembed_ds.training.stream_setup import setup_stream, some_samples

SAMPLED = 64
"""Records of every data set that are looked at."""
EDGE = 1024
"""Pixels of a side of an image that stands for all where no data is read."""


@dataclass(frozen=True)
class StepItems:
    """The items of a step.

    Attributes:
        processor: Of the model.
        per_pair: For every role, how many items of each stream a pair has of it.
        longest: Of every stream, an item that takes as much as any.
        labels: Whether pairs have classes.
        scores: Whether they have graded similarities.
        origin: Where that is known from, for people.
        records: How many there are to fill a batch from; ``None``: not known.
    """

    processor: ItemProcessor
    per_pair: Mapping[str, Mapping[str, float]]
    longest: Mapping[str, EncodedItem]
    labels: bool
    scores: bool
    origin: str
    records: int | None = None

    @property
    def parts(self) -> set[str]:
        """Kinds of items, text or image."""
        return {part for s in self.longest for part in (("text", "image") if s == JOINT else (s,))}

    def count(self, batch_size: int) -> dict[str, int]:
        """Items of every stream of so many pairs."""
        return {
            stream: round(batch_size * sum(role.get(stream, 0) for role in self.per_pair.values()))
            for stream in self.longest
        }

    def pad(self, stream: str, number: int) -> dict[str, torch.Tensor]:
        """A chunk of so many items, of which one is a token shorter, so that there is padding."""
        longest = self.longest[stream]
        return self.processor.pad(stream, [*[longest] * (number - 1), _shorter(longest)])


def sample_items(config: Config, spec: ModelSpec) -> StepItems:
    """The items of some records of every data set.

    Raises:
        VembedError: The data cannot be read.
    """
    records = None
    if config.data.streaming:
        data = setup_stream(config, spec)
        processor, found = data.processor, some_samples(data, number=SAMPLED)
    else:
        processor, found, numbers = _of_tables(config, spec)
        records = sum(numbers) if config.data.batching == "mixed" else min(numbers)
    errors = [sample for sample in found if isinstance(sample, VembedError)]
    samples = [sample for sample in found if isinstance(sample, Sample)]
    if errors and (not samples or config.data.on_bad_record == "fail"):
        raise errors[0]
    items = items_of(samples, processor, mixed=config.data.batching == "mixed")
    return replace(items, records=records)


def items_of(samples: Sequence[Sample], processor: ItemProcessor, *, mixed: bool) -> StepItems:
    """A step of records like these.

    Args:
        samples: At least one; of all data sets.
        processor: Of the model.
        mixed: Whether a batch may hold records of several; otherwise it has as many items as one of
            the data set that gives most.
    """
    items = [item for sample in samples for role in sample.roles.values() for item in role]
    longest = {item.stream: item for item in sorted(items, key=_values)}
    members = {0 if mixed else sample.member for sample in samples}
    per_pair: dict[str, dict[str, float]] = {}
    for member in members:
        own = [sample for sample in samples if mixed or sample.member == member]
        for role, counts in _per_pair(own).items():
            most = per_pair.setdefault(role, {})
            most |= {stream: max(n, most.get(stream, 0)) for stream, n in counts.items()}
    return StepItems(
        processor,
        per_pair,
        longest,
        labels=any(sample.label is not None for sample in samples),
        scores=any(sample.score is not None for sample in samples),
        origin=f"the longest of {len(samples)} records",
    )


def _per_pair(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for sample in samples:
        for role, of_role in sample.roles.items():
            counts = found.setdefault(role, {})
            for item in of_role:
                counts[item.stream] = counts.get(item.stream, 0) + 1 / len(samples)
    return found


def imagined_items(config: Config, spec: ModelSpec, *, tokens: int) -> StepItems:
    """Items of one length, without any data.

    Args:
        config: Its ``retrieval_mode`` says what kinds there are, ``max_negatives`` how many negatives.
        spec: The model's shape.
        tokens: Of every text; images are squares of 1024 pixels.

    Raises:
        ConfigError: There are no texts of so many tokens, or the kinds are not known without data.
    """
    processor = setup_processor(config, spec, needed=[])
    if processor.max_length is not None and tokens > processor.max_length:
        raise ConfigError(
            f"--tokens {tokens}: texts are cut to {processor.max_length} tokens (max_seq_length, or the "
            "model's own limit); give at most that"
        )
    items = {}
    for name, entry in dataset_entries(config.data).items():
        query, _, positive = str(entry.retrieval_mode).partition("2")
        if "x" in (query, positive):
            raise ConfigError(
                f"retrieval_mode={entry.retrieval_mode}{f' ({name})' if name else ''}: what the records "
                "hold is not known without data; leave --tokens out"
            )
        roles = {"query": (query, 1), "positive": (positive, 1)}
        if entry.max_negatives is not None:
            roles["negative"] = (positive, entry.max_negatives)
        items[name] = roles
    roles = max(items.values(), key=lambda found: sum(number for _, number in found.values()))
    encoded = {letter: _imagined(letter, tokens, processor) for letter, _ in roles.values()}
    images = f", images of {EDGE} x {EDGE} pixels" if {*encoded} != {"t"} else ""
    return StepItems(
        processor,
        {role: {encoded[letter].stream: number} for role, (letter, number) in roles.items()},
        {item.stream: item for item in encoded.values()},
        labels=False,
        scores=config.loss.loss_type == "cosent",
        origin=f"texts of {tokens} tokens{images}",
    )


def _imagined(letter: str, tokens: int, processor: ItemProcessor) -> EncodedItem:
    image = None if letter == "t" else Image.new("RGB", (EDGE, EDGE), "white")
    text = None if letter == "i" else "a " * tokens
    item = processor.encode(Item(text=text, image=image), origin="--tokens", augment_seed=None)
    ids = item.inputs.get("input_ids")
    if ids is None or image is not None or processor.pad_to_max_length:
        return item
    if len(ids) < tokens:
        raise ConfigError(f"--tokens {tokens}: the tokenizer makes at most {len(ids)} tokens")
    return _cut(item, tokens)


def _of_tables(
    config: Config, spec: ModelSpec
) -> tuple[ItemProcessor, list[Sample | VembedError], list[int]]:
    """The processor, some samples, and how many records each data set has."""
    entries = dataset_entries(config.data)
    sources = [
        open_source(entry, key=f"datasets[{name}].data_path" if name else "data_path")
        for name, entry in entries.items()
    ]
    processor = setup_processor(config, spec, needed=[source.reader for source in sources])
    found: list[Sample | VembedError] = []
    numbers = []
    for member, source in enumerate(sources):
        dataset = build_dataset(source, processor=processor, config=config)
        numbers.append(len(dataset))
        samples = (dataset[row] for row in _spread(len(dataset)))
        found += [replace(s, member=member) if isinstance(s, Sample) else s for s in samples]
    return processor, found, numbers


def _spread(number: int) -> Iterator[int]:
    """Some rows from all over a table."""
    yield from (int(row) for row in np.unique(np.linspace(0, number - 1, SAMPLED).astype(int)))


def _values(item: EncodedItem) -> int:
    return sum(array.size for array in item.inputs.values())


def _shorter(item: EncodedItem) -> EncodedItem:
    ids = item.inputs.get("input_ids")
    return item if ids is None or len(ids) < 2 else _cut(item, len(ids) - 1)


def _cut(item: EncodedItem, tokens: int) -> EncodedItem:
    """The first tokens of an item."""
    length = item.inputs["input_ids"].shape
    return EncodedItem(
        item.stream,
        {name: a[:tokens] if a.shape == length else a for name, a in item.inputs.items()},
    )
