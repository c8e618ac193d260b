"""What all peers of a workload train: a model and pairs, written once and read by everyone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from benchmarks.models import (
    FIRST_WORD,
    INPUTS,
    MODELS,
    Shape,
    image_processor,
    set_dropout,
    tokenizer,
)

EXACT, TIMED = "exact", "timed"  # folders of the same weights, without and with dropout
MEDIAN_SHARE = 0.35  # of the longest: the median of log-normal lengths


@dataclass(frozen=True)
class Task:
    """A model of random weights and one global batch, trained on again in every step.

    Attributes:
        kind: ``text``: queries and positives share a BERT; ``clip`` and ``vlm`` (a Qwen2-VL):
            texts search pictures.
        layers: Of each tower.
        width: Of each tower.
        inner: Width inside of the feed-forward blocks; 0: four times the width.
        heads: Of attention; 0: 64 dimensions each.
        vocabulary: Tokens.
        pairs: Of the global batch.
        ranks: That share it.
        chunk: Items in a forward pass with gradient cache.
        length: Tokens of a text, or of the longest.
        sigma: Of log-normal lengths; 0: all are equal.
        repeated: Share of the items of each role that repeat another one.
        pixels: Edge of a picture.
        symmetric: Whether pictures are searched with texts and texts with pictures.
        dropout: Where time is measured.
        temperature: Of InfoNCE.
        lr: Of AdamW without decay.
    """

    kind: Literal["text", "clip", "vlm"] = "text"
    layers: int = 6
    width: int = 384
    inner: int = 0
    heads: int = 0
    vocabulary: int = 8192
    pairs: int = 256
    ranks: int = 1
    chunk: int = 32
    length: int = 16
    sigma: float = 0.0
    repeated: float = 0.0
    pixels: int = 64
    symmetric: bool = False
    dropout: float = 0.1
    temperature: float = 0.05
    lr: float = 1e-4

    @property
    def pairs_per_rank(self) -> int:
        """Of one step."""
        return self.pairs // self.ranks

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return Shape(
            layers=self.layers,
            width=self.width,
            heads=self.heads or max(self.width // 64, 2),
            inner=self.inner or 4 * self.width,
            vocabulary=self.vocabulary,
            positions=self.length,
            pixels=self.pixels,
        )

    def small(self) -> Task:
        """The same in seconds, to see that everything runs."""
        return replace(
            self, layers=2, width=32, inner=0, heads=0, vocabulary=128, pairs=16, chunk=4, pixels=56
        )


def write_task(task: Task, folder: Path) -> None:
    """Write models, pairs as files, and the same pairs as tensors. Seeds torch."""
    torch.manual_seed(0)
    model = MODELS[task.kind](task.shape)
    words, pictures = tokenizer(task.kind, task.shape), image_processor(task.kind, task.shape)
    for name, dropout in ((EXACT, 0.0), (TIMED, task.dropout)):
        set_dropout(model, dropout)
        if name == EXACT:
            model.save_pretrained(folder / name)
        else:
            model.config.save_pretrained(folder / name)
            for file in (folder / EXACT).glob("*.safetensors*"):
                os.link(file, folder / name / file.name)
        for part in (words, pictures):
            if part is not None:
                part.save_pretrained(folder / name)
    queries = _texts(task)
    positives = _texts(task) if task.kind == "text" else _write_pictures(task, folder)
    tensors = {
        role: _tensors(task, folder, words, pictures, items)
        for role, items in (("query", queries), ("positive", positives))
    }
    torch.save(tensors, folder / "tensors.pt")
    pairs = [{"query": q, "positive": p} for q, p in zip(queries, positives, strict=True)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By role and argument of the model, ``[B, ...]``, texts padded to the longest of all."""
    return dict(torch.load(folder / "tensors.pt", weights_only=True))


def _tensors(
    task: Task, folder: Path, words: Any, pictures: Any, items: list[str]
) -> dict[str, Tensor]:
    """A role's items as the model takes them."""
    if task.kind == "vlm":
        return _vision_language_tensors(folder, items)
    if items[0].endswith(".png"):
        opened = [Image.open(folder / name) for name in items]
        return {"pixel_values": pictures(opened, return_tensors="pt")["pixel_values"]}
    found = words(items, padding=True, return_tensors="pt")
    return {name: found[name] for name in INPUTS}


def _vision_language_tensors(folder: Path, items: list[str]) -> dict[str, Tensor]:
    """Written as the project writes them, so that everybody embeds the same tokens.

    ``pixel_values`` are ``[B, P, C]``, P patches of every picture.
    """
    from transformers import AutoConfig

    from vembed_ds.data.processor_loading import build_item_processor
    from vembed_ds.data.records import Item

    place = str(folder / EXACT)
    config = AutoConfig.from_pretrained(place)
    processor = build_item_processor(place, place, max_length=None, model_config=config)
    pictures = items[0].endswith(".png")
    encoded = [
        processor.encode(
            Item(image=str(folder / item)) if pictures else Item(text=item),
            origin=item,
            augment_seed=None,
        )
        for item in items
    ]
    inputs = processor.pad("image" if pictures else "text", encoded)
    if pictures:
        inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (len(items), -1))
    return inputs


def _texts(task: Task) -> list[str]:
    distinct = _distinct(task)
    texts = []
    for length in _lengths(task, distinct):
        numbers = torch.randint(FIRST_WORD, task.vocabulary, (length - 1,)).tolist()
        texts.append(" ".join([*(f"w{number}" for number in numbers), "[END]"]))
    return [texts[number] for number in _places(task, distinct)]


def _lengths(task: Task, number: int) -> list[int]:
    if not task.sigma:
        return [task.length] * number
    drawn = MEDIAN_SHARE * task.length * torch.exp(task.sigma * torch.randn(number))
    lengths: list[int] = drawn.round().int().clamp(2, task.length).tolist()
    return lengths


def _distinct(task: Task) -> int:
    return round((1 - task.repeated) * task.pairs)


def _places(task: Task, distinct: int) -> list[int]:
    """Which of the distinct items stands in each pair; each does at least once."""
    again = torch.randint(distinct, (task.pairs - distinct,))
    places = torch.cat([torch.arange(distinct), again])
    shuffled: list[int] = places[torch.randperm(task.pairs)].tolist()
    return shuffled


def _write_pictures(task: Task, folder: Path) -> list[str]:
    """Noise of a colour of its own; names relative to ``folder``."""
    (folder / "pictures").mkdir()
    distinct = _distinct(task)
    for number in range(distinct):
        noise = torch.randint(0, 128, (task.pixels, task.pixels, 3))
        pixels = (noise + torch.randint(0, 128, (3,))).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    return [f"pictures/{number}.png" for number in _places(task, distinct)]
