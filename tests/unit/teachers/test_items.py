"""Every content once, and what the digests of a frozen model see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vembed_ds.data.dataset import PairDataset, Sample
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import ItemProcessor, content_key
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import Item, RecordReader
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.errors import DataError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_encoder
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.teachers.identity import model_digest, processor_digest, weights_digest
from vembed_ds.teachers.items import ITEMS, ItemDataset, distinct_items


@pytest.fixture
def processor(minilm: str, image_settings: dict[str, Any]) -> ItemProcessor:
    return build_item_processor(minilm, image_settings, max_length=12)


def dataset(path: str, processor: ItemProcessor, mode: str, root: str = "") -> PairDataset:
    table = load_table([path], key="data_path")
    reader = RecordReader(
        table.column_names,
        retrieval_mode=mode,
        column_mapping={},
        image_root=root,
        origin=path,
        instructions={"query": "student's: ", "positive": "student's: "},
    )
    return PairDataset(table, reader=reader, processor=processor, seed=0)


ROWS = [
    {"query": "one", "positive": "two", "negatives": ["three", "one"]},
    {"query": "two", "positive": "two", "negatives": []},
    {"query": "one", "positive": "four", "negatives": ["three"]},
]


@pytest.mark.parametrize(("document", "expected"), [("q ", 4), ("d ", 6)])
def test_a_text_is_embedded_once_per_instruction(
    processor: ItemProcessor, write_jsonl: Callable[..., str], document: str, expected: int
) -> None:
    members = [dataset(write_jsonl(ROWS, "a.jsonl"), processor, "t2t")]
    instructions = Instructions(query="q ", document=document)
    distinct = distinct_items(members, instructions)
    assert len(distinct) == expected
    items = ItemDataset(members, distinct.addresses, processor=processor, instructions=instructions)
    sample = items[0]
    assert isinstance(sample, Sample)
    found = {}
    for index, key in enumerate(distinct.keys):
        sample = items[index]
        assert isinstance(sample, Sample)
        found[int(key)] = processor.tokenizer.decode(
            sample.roles[ITEMS][0].inputs["input_ids"], skip_special_tokens=True
        )
    # What a training batch knows of its items finds the right rows, behind the right words.
    for index in range(3):
        record, trained = members[0].record(index), members[0][index]
        assert isinstance(trained, Sample)
        for role, texts in {
            "query": [record.query.text],
            "positive": [record.positive.text],
            "negative": [item.text for item in record.negatives],
        }.items():
            keys = instructions.keys(role, trained.keys[role])
            told = instructions.of(role)
            assert [found[int(key)] for key in keys] == [f"{told}{text}" for text in texts]


def test_an_image_file_counts_as_its_bytes(
    processor: ItemProcessor, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    rows = [{"query": f"find {n}", "positive": f"{n}.png"} for n in "abc"]
    members = [dataset(write_jsonl(rows, "a.jsonl"), processor, "t2i", str(tmp_path))]
    assert len(distinct_items(members, Instructions())) == 3 + 2
    path = str(tmp_path / "a.png")
    stored = content_key(Item(image=Path(path).read_bytes()))
    assert content_key(Item(image=path), read_files=True) == stored
    assert content_key(Item(image=path)) != stored
    members[0].read_files = True
    red, also_red = members[0][0], members[0][1]
    assert isinstance(red, Sample)
    assert isinstance(also_red, Sample)
    assert red.keys["positive"] == also_red.keys["positive"]
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png does not exist"):
        distinct_items(members, Instructions())


def test_the_weights_digest_sees_every_bit_and_no_order() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2, 2), "scale": torch.tensor(1.0)}
    digest = weights_digest(weights.items())
    assert weights_digest(reversed(list(weights.items()))) == digest
    for changed in (
        {**weights, "a": torch.tensor([0.0, 0.0, 1e-45])},
        {**weights, "a": torch.zeros(3, dtype=torch.float64)},
        {**weights, "b": torch.ones(4)},
        {"a": weights["b"], "b": weights["a"], "scale": weights["scale"]},
        {name: value.bfloat16() for name, value in weights.items()},
    ):
        assert weights_digest(changed.items()) != digest


def test_the_model_digest_sees_what_is_done_with_the_weights() -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    bert = {"model_type": "bert", "num_attention_heads": 2, **sizes}

    def digest(pooling: str = "cls", dim: int | None = None, **changes: Any) -> str:
        spec = ModelSpec(
            {"": BackboneSource(config={**bert, **changes})},
            pooling={"": pooling},
            projection_dim=dim,
        )
        return model_digest(EmbeddingModel(build_encoder(spec)))

    changed = [
        digest(num_attention_heads=4),
        digest(hidden_act="relu"),
        digest("mean"),
        digest(dim=4),
    ]
    assert len({digest(), *changed}) == 5
    assert digest() == digest(architectures=["BertForMaskedLM"], hidden_act="gelu")


def test_the_processor_digest_sees_what_has_an_effect(
    minilm: str, image_settings: dict[str, Any]
) -> None:
    def digest(length: int = 12, **changes: Any) -> str:
        settings = {**image_settings, **changes}
        return processor_digest(
            build_item_processor(minilm, settings, max_length=length), ("text", "image")
        )

    assert digest() == digest()
    assert len({digest(), digest(13), digest(do_normalize=False), digest(resample=0)}) == 4


def test_keys_keep_their_number() -> None:
    keys = Instructions("a", "b").keys("negative", [5, 5, -7])
    assert keys.dtype == np.int64
    assert keys[0] == keys[1] != keys[2]
    assert Instructions("a", "b").keys("query", []).shape == (0,)
