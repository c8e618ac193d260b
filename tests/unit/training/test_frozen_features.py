"""Features of frozen towers: those of the tower, computed once, kept, and never another tower's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.parity.data import CLIP, IMAGE, TEXT
from tests.tiny import save_picture
from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import Config
from vembed_ds.data.augment import ImageAugmentation
from vembed_ds.data.dataset import PairDataset, Sample
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import RecordReader
from vembed_ds.data.vector_table import VectorTable, list_segments
from vembed_ds.errors import DataError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.teachers import precompute
from vembed_ds.training.frozen_features import features_folder, store_features, stored_parts

VOCABULARY = 30522  # MiniLM's
WORDS = {"vocab_size": VOCABULARY, "eos_token_id": 102, "bos_token_id": 101, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "composed": {"text": {**TEXT, "vocab_size": VOCABULARY}, "image": IMAGE},
    "clip": {"": {**CLIP, "text_config": {**CLIP["text_config"], **WORDS}}},
}
SIZE = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 8},
    "crop_size": {"height": 8, "width": 8},
}


def build(kind: str, *, seed: int = 0, frozen: str = "both", **changes: Any) -> EmbeddingModel:
    torch.manual_seed(seed)
    sources = {key: BackboneSource(config=config) for key, config in MODELS[kind].items()}
    freeze = {"text": frozen in ("text", "both"), "image": frozen in ("image", "both")}
    return build_model(ModelSpec(sources, projection_dim=6, **changes), freeze=freeze)


def picture(path: Path, seed: int) -> None:
    save_picture(path, index=seed, generator=np.random.default_rng(seed))


def make_processor(minilm: str, **changes: Any) -> ItemProcessor:
    options = {"max_length": 12, **changes}
    return build_item_processor(minilm, options.pop("image_settings", SIZE), **options)


@pytest.fixture
def make_data(tmp_path: Path, write_jsonl: Callable[..., str]) -> Callable[..., PairDataset]:
    """Texts, images, and items that are both: four of either, of which one text and one image repeat."""
    for index in range(3):
        picture(tmp_path / f"{index}.png", index)
    picture(tmp_path / "copy of 2.png", 2)

    def make(processor: ItemProcessor, *, more: bool = False) -> PairDataset:
        rows = [
            {"query": "a red cat", "positive_image": "0.png"},
            {"query": "dog", "positive": "a", "positive_image": "1.png"},
            {"query_image": "2.png", "positive": "a red cat " * 9},
            {"query_image": "copy of 2.png", "query": "dog", "positive": "a red cat"},
        ]
        if more:
            picture(tmp_path / "7.png", 7)
            rows.append({"query": "one more", "positive_image": "7.png"})
        columns = ("query", "query_image", "positive", "positive_image")
        path = write_jsonl([{column: row.get(column) for column in columns} for row in rows])
        table = load_table([path], key="data_path")
        reader = RecordReader(
            table.column_names,
            retrieval_mode="x2x",
            column_mapping={},
            image_root=str(tmp_path),
            origin="data",
            instructions={"query": "find: "},
        )
        return PairDataset(table, reader=reader, processor=processor, seed=0)

    return make


def store(model: EmbeddingModel, data: PairDataset, part: Any, root: Path, **changes: Any) -> int:
    options = {"processor": data.processor, "batch_size": 2, "num_workers": 0, **changes}
    return store_features(
        model, [data], part, root=root, device=torch.device("cpu"), timeout_seconds=60, **options
    )


def items_of(data: PairDataset) -> Iterator[EncodedItem]:
    for row in range(len(data)):
        sample = data[row]
        assert isinstance(sample, Sample), sample
        for items in sample.roles.values():
            yield from items


def embed(model: EmbeddingModel, item: EncodedItem, processor: ItemProcessor) -> Tensor:
    with torch.no_grad():
        return model.eval()({item.stream: processor.pad(item.stream, [item])})[item.stream]


@pytest.mark.parametrize("kind", ["composed", "clip"])
@pytest.mark.parametrize("frozen", ["text", "image", "both"])
def test_items_embed_from_stored_features_as_from_themselves(
    minilm: str, make_data: Callable[..., PairDataset], tmp_path: Path, kind: str, frozen: str
) -> None:
    model, processor = build(kind, frozen=frozen), make_processor(minilm)
    data = make_data(processor)
    expected = [embed(model, item, processor) for item in items_of(data)]
    parts = ("text", "image") if frozen == "both" else (frozen,)
    found = {part: store(model, data, part, tmp_path / "features") for part in parts}
    # Of seven texts five differ, by their instruction too; of four images three.
    assert found == {part: {"text": 5, "image": 3}[part] for part in parts}
    items = list(items_of(data))
    for item, embedding in zip(items, expected, strict=True):
        streams = {"text", "image"} if item.stream == "joint" else {item.stream}
        assert ("input_ids" in item.inputs) == ("text" in streams - set(parts))
        assert ("pixel_values" in item.inputs) == ("image" in streams - set(parts))
        torch.testing.assert_close(embed(model, item, processor), embedding, rtol=0, atol=1e-6)
    assert {item.stream for item in items} == {"text", "image", "joint"}
    filler = processor.filler("joint")
    assert processor.pad("joint", [items[3], filler]).keys() == filler.inputs.keys()


@pytest.mark.parametrize(("part", "forwards", "more"), [("text", 3, 1), ("image", 2, 1)])
def test_the_next_run_runs_the_tower_for_what_is_new_only(
    minilm: str,
    make_data: Callable[..., PairDataset],
    tmp_path: Path,
    part: str,
    forwards: int,
    more: int,
) -> None:
    root = tmp_path / "features"
    for number, (bigger, expected) in enumerate([(False, forwards), (False, 0), (True, more)]):
        model = build("composed")
        features = model.encoder.features
        with mock.patch.object(model.encoder, "features", side_effect=features) as calls:
            store(model, make_data(make_processor(minilm), more=bigger), part, root)
            assert calls.call_count == expected, f"run {number}"
    assert len(list(root.iterdir())) == 1


@pytest.mark.parametrize(
    ("part", "model_changes", "processor_changes", "of"),
    [
        ("text", {"seed": 1}, {}, "another weights"),
        ("image", {"seed": 1}, {}, "another weights"),
        ("text", {"pooling": {"text": "mean"}}, {}, "another pooling"),
        ("text", {}, {"max_length": 6}, "another processor"),
        ("image", {}, {"image_settings": {**SIZE, "do_rescale": False}}, "another processor"),
        ("image", {}, {"max_length": 6}, None),  # of texts
    ],
)
def test_another_tower_or_processor_has_features_of_its_own(
    minilm: str,
    make_data: Callable[..., PairDataset],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    part: str,
    model_changes: dict[str, Any],
    processor_changes: dict[str, Any],
    of: str | None,
) -> None:
    root, number = tmp_path / "features", {"text": 5, "image": 3}[part]
    caplog.set_level("INFO")
    assert store(build("composed"), make_data(make_processor(minilm)), part, root) == number
    (folder,) = root.iterdir()
    told = (
        f"frozen {part} tower: ran once for {number} new items; the features of {number} are kept"
    )
    assert f"{told} in {folder}" in caplog.text
    model, processor = (
        build("composed", **model_changes),
        make_processor(minilm, **processor_changes),
    )
    caplog.clear()
    assert store(model, make_data(processor), part, root) == (number if of else 0)
    told = f"frozen {part} tower: its features are computed anew, because those in {folder} are of {of}"
    assert (told in caplog.text) == (of is not None)
    assert store(build("composed"), make_data(make_processor(minilm)), part, root) == 0


def test_another_picture_under_the_same_name_never_gets_the_old_ones_features(
    minilm: str, make_data: Callable[..., PairDataset], tmp_path: Path
) -> None:
    model, root = build("composed"), tmp_path / "features"
    data = make_data(make_processor(minilm))
    store(model, data, "image", root)
    picture(tmp_path / "1.png", 9)
    error = data[1]
    assert isinstance(error, DataError)
    assert str(error).startswith("data, record 1, positive: ")
    assert "has no vector for item 0; the data has changed since it was written" in str(error)
    assert store(model, make_data(make_processor(minilm)), "image", root) == 1


@pytest.mark.parametrize("part", ["text", "image"])
def test_what_a_killed_run_has_computed_is_not_computed_again(
    minilm: str,
    make_data: Callable[..., PairDataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    monkeypatch.setattr(precompute, "SEGMENT_SECONDS", -1.0)  # a segment for every forward pass
    root, number = tmp_path / "features", {"text": 5, "image": 3}[part]
    model = build("composed")
    features, answers = model.encoder.features, iter([True])

    def killed(*args: Any) -> Tensor:
        if not next(answers, False):
            raise KeyboardInterrupt
        return features(*args)

    with (
        mock.patch.object(model.encoder, "features", killed),
        pytest.raises(KeyboardInterrupt),
    ):
        store(model, make_data(make_processor(minilm)), part, root)
    (folder,) = root.iterdir()
    assert len(list_segments(folder)) == 1
    assert store(build("composed"), make_data(make_processor(minilm)), part, root) == number - 2
    assert len(VectorTable(folder)) == number


def test_two_runs_at_once_share_a_folder(
    minilm: str, make_data: Callable[..., PairDataset], tmp_path: Path
) -> None:
    root, model = tmp_path / "features", build("composed")
    other = copy.deepcopy(model)
    features = model.encoder.features

    def meanwhile(*args: Any) -> Tensor:
        if not list(root.glob("*/segment-*")):
            store(other, make_data(make_processor(minilm)), "image", root)
        return features(*args)

    data = make_data(make_processor(minilm))
    expected = [embed(model, item, data.processor) for item in items_of(data)]
    with mock.patch.object(model.encoder, "features", meanwhile):
        store(model, data, "image", root)
    (folder,) = root.iterdir()
    assert len(list_segments(folder)) == 2  # both found nothing, and both keep what they have
    for item, embedding in zip(items_of(data), expected, strict=True):
        torch.testing.assert_close(embed(model, item, data.processor), embedding, atol=1e-6, rtol=0)


def config(tmp_path: Path, **values: Any) -> Config:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    path = str(tmp_path / "pairs.jsonl")
    return parse_config(
        {"model_name": "some/model", "data_path": path, "output_dir": str(tmp_path), **values}
    )


BOTH = {"text", "image"}


@pytest.mark.parametrize("kind", ["composed", "clip"])
def test_only_what_never_changes_is_stored(
    minilm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level("INFO")
    plain, processor = config(tmp_path), make_processor(minilm)

    def parts(frozen: str = "both", run: Config = plain, used: set[str] = BOTH) -> list[str]:
        return list(stored_parts(build(kind, frozen=frozen), run, processor, used=used))

    assert parts() == ["text", "image"]
    assert [parts(frozen) for frozen in ("text", "image", "none")] == [["text"], ["image"], []]
    assert parts(used={"image"}) == ["image"]
    assert parts(run=config(tmp_path, cache_frozen_encoder=False)) == []
    trained = build(kind)
    for module in trained.encoder.backbone_modules("text"):
        module.train()  # dropout
    assert stored_parts(trained, plain, processor, used=BOTH) == ["image"]
    assert not caplog.messages
    stream = config(tmp_path, streaming=True, max_steps=3)
    assert parts("image", stream) == []
    assert "streaming does not read the images before training" in caplog.text
    processor.augmentation = mock.Mock(spec=ImageAugmentation)
    assert parts() == ["text"]
    assert "image_augmentation gives it another image every time" in caplog.text


def test_towers_that_give_more_than_one_vector_are_not_stored() -> None:
    tokens = build("composed", pooling={"text": "none", "image": "none"})
    assert not any(tokens.encoder.has_fixed_features(part) for part in BOTH)
    sources = {"": BackboneSource(config=TEXT)}
    layers = build_model(ModelSpec(sources, projection_dim=6, layers=(1, 2)), freeze={"text": True})
    assert not layers.encoder.has_fixed_features("text")


def test_where_the_features_are_kept(tmp_path: Path) -> None:
    assert features_folder(config(tmp_path)) == tmp_path / "frozen_features"
    shared = config(tmp_path, frozen_features_dir="all/runs", freeze_text_encoder=True)
    assert features_folder(shared) == Path("all/runs")
