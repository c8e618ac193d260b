"""Every record of a data set, read as training reads it: what is wrong, and what is there."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.file_checks import data_suffix, open_plain
from vembed_ds.data.image_paths import file_problem
from vembed_ds.data.images import open_image
from vembed_ds.data.processors import ItemProcessor, content_key
from vembed_ds.data.records import Item, Record, content_number
from vembed_ds.errors import DataError, VembedError

CHUNK = 64  # records that a thread looks at at a time
KEPT = 1000  # problems of a kind whose text is kept

Images = Literal["decode", "exists"]


@dataclass(frozen=True)
class Problem:
    """One thing that training would refuse.

    Args:
        kind: ``file``, ``value`` (of a column), ``image`` or ``text``.
        message: As training would say it.
        record: Row number; None for a whole file.
    """

    kind: str
    message: str
    record: int | None = None


@dataclass
class Findings:
    """What was found in some or all of the records.

    Args:
        records: Number of records looked at.
        counts: Problems of every kind.
        problems: The first of every kind, in order.
        queries: Content of every readable query, as a 64-bit number; likewise the next two.
        positives: Of the positives.
        negatives: Number of negatives of every record.
        tokens: Tokens of every text, before it is cut.
        pixels: Width and height of every decoded image.
        labels: Records of every label.
    """

    records: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    positives: list[int] = field(default_factory=list)
    negatives: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pixels: list[tuple[int, int]] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)

    def add(self, other: Findings) -> None:
        """Takes in the findings of the records that follow."""
        self.records += other.records
        for problem in other.problems:
            self.report(problem)
        for name in ("queries", "positives", "negatives", "tokens", "pixels"):
            getattr(self, name).extend(getattr(other, name))
        self.labels.update(other.labels)

    def report(self, problem: Problem) -> None:
        """Counts a problem, and keeps it while there are few of its kind."""
        self.counts[problem.kind] += 1
        if self.counts[problem.kind] <= KEPT:
            self.problems.append(problem)


def inspect(
    dataset: PairDataset, *, rows: Sequence[int], images: Images, num_threads: int
) -> Findings:
    """Reads records, and encodes all their items.

    Args:
        dataset: The records.
        rows: Which of them, in order.
        images: Decode images, or only look whether their files are there.
        num_threads: Chunks of records read at a time; decoding and tokenizing free Python's lock.

    Returns:
        What was found; the same whatever the number of threads.
    """
    inspector = _Inspector(dataset, images=images)
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    found = Findings()
    with (
        ThreadPoolExecutor(max(1, num_threads)) as pool,
        tqdm(total=len(rows), desc=dataset.reader.origin, disable=None) as progress,
    ):
        for part in pool.map(inspector.look, chunks):
            found.add(part)
            progress.update(part.records)
    return found


class _Inspector:
    def __init__(self, dataset: PairDataset, *, images: Images) -> None:
        self.dataset, self.images = dataset, images
        # A copy: to ask for uncut texts changes a setting that the threads share.
        self.tokenizer: Any = copy.deepcopy(dataset.processor.tokenizer)

    def look(self, rows: Sequence[int]) -> Findings:
        found = Findings(records=len(rows))
        for row in rows:
            try:
                record = self.dataset.record(row)
            except VembedError as error:
                found.report(Problem("value", str(error), row))
                continue
            self._count(record, found)
            for role, item in _items(record):
                origin = f"{self.dataset.reader.origin}, record {record.index}, {role}"
                if problem := self._try(item, found, origin=origin):
                    found.report(replace(problem, record=row))
        return found

    def _count(self, record: Record, found: Findings) -> None:
        found.queries.append(_number(record.query))
        found.positives.append(_number(record.positive))
        found.negatives.append(len(record.negatives))
        if record.label is not None:
            found.labels[record.label] += 1

    def _try(self, item: Item, found: Findings, *, origin: str) -> Problem | None:
        """Encodes an item as training would; what is wrong, or None."""
        kind = "text" if item.image is None else "image"
        if item.text is not None and self.tokenizer is not None:
            tokens = self.tokenizer(item.instruction + item.text, truncation=False, verbose=False)
            found.tokens.append(len(tokens["input_ids"]))
        try:
            if item.image is not None:
                if self.images == "exists":
                    return _missing(item, origin=origin)
                image = open_image(item.image, origin=origin)
                found.pixels.append(image.size)
                item = replace(item, image=image)
            self.dataset.processor.encode(item, origin=origin, augment_seed=None)
        except VembedError as error:
            return Problem(kind, str(error))
        return None


def _items(record: Record) -> Iterator[tuple[str, Item]]:
    yield "query", record.query
    yield "positive", record.positive
    for place, item in enumerate(record.negatives):
        yield f"negative {place}", item


def _missing(item: Item, *, origin: str) -> Problem | None:
    if isinstance(item.image, str) and (problem := file_problem(item.image)):
        return Problem("image", f"{origin}: image {item.image} {problem}")
    return None


def _number(item: Item) -> int:
    return content_number(content_key(item).encode())


def summary(found: Findings, *, processor: ItemProcessor) -> dict[str, Any]:
    """Figures of the readable records, for people and JSON.

    Returns:
        ``records``; ``distinct`` queries, positives and pairs; ``negatives``, ``tokens`` and
        ``images`` (width, height) as percentiles; how many texts are ``cut`` at ``max_length``;
        ``labels``: their number, and the records of the commonest. What there is none of is left
        out.
    """
    pairs = set(zip(found.queries, found.positives, strict=True))
    result: dict[str, Any] = {
        "records": found.records,
        "distinct": {
            "queries": len(set(found.queries)),
            "positives": len(set(found.positives)),
            "pairs": len(pairs),
        },
    }
    if any(found.negatives):
        result["negatives"] = _percentiles(found.negatives)
    if found.tokens:
        limit = processor.max_length
        cut = 0 if limit is None else sum(number > limit for number in found.tokens)
        result["tokens"] = _percentiles(found.tokens) | {"max_length": limit, "cut": cut}
    if found.pixels:
        widths, heights = zip(*found.pixels, strict=True)
        result["images"] = {"width": _percentiles(widths), "height": _percentiles(heights)}
    if found.labels:
        result["labels"] = {"number": len(found.labels), "most": max(found.labels.values())}
    return result


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    wanted = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    found = np.percentile(values, list(wanted.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(wanted, found, strict=True)}


def shared_pairs(one: Findings, other: Findings) -> int:
    """Pairs that two data sets share, such as validation pairs that are trained on."""
    first, second = (set(zip(f.queries, f.positives, strict=True)) for f in (one, other))
    return len(first & second)


class Lines:
    """Finds the line of a record in text files that have a record a line.

    Args:
        files: The files that a table was read from, in order.
        num_records: Of the table. With other numbers of lines (a text of several lines, one
            JSON value over many) no line is ever named.
    """

    def __init__(self, files: Sequence[Path], *, num_records: int) -> None:
        readable = all(data_suffix(file) in (".jsonl", ".csv", ".tsv") for file in files)
        self._places = list(chain(*map(_record_lines, files))) if readable else []
        if len(self._places) != num_records:
            self._places = []

    def find(self, record: int | None) -> str:
        """``file:line``; ``record N`` where lines are not known."""
        if record is None:
            return ""
        if not self._places:
            return f"record {record}"
        file, line = self._places[record]
        return f"{file}:{line}"


def _record_lines(file: Path) -> Iterator[tuple[Path, int]]:
    with open_plain(file) as stream:
        filled = [number for number, line in enumerate(stream, start=1) if line.strip()]
    for number in filled if data_suffix(file) == ".jsonl" else filled[1:]:  # without the header
        yield file, number


def as_problem(error: DataError) -> Problem:
    """An error that concerns a whole file or table."""
    return Problem("file", str(error))
