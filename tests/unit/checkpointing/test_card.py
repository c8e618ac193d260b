"""The card of a converted model: its code gives the model's embeddings, its figures are the run's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from tests.distributed import export_cases as cases
from vembed_ds import Encoder
from vembed_ds.checkpointing.card import Evaluation, read_evaluations
from vembed_ds.checkpointing.export import export_model
from vembed_ds.errors import CheckpointError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.lora import LoraSpec, add_adapters

Save = Callable[..., Path]
TEXTS = ["a dog on the beach", "rain"]
FACTS = {
    "base_models": {"": "some-org/tiny-bert"},
    "data": ["pairs.jsonl"],
    "num_records": 1234,
    "data_fingerprint": "abc123",
    "loss": "infonce",
    "step": 40,
    "num_steps": 50,
    "global_batch": 64,
    "world_size": 2,
    "zero_stage": 3,
    "earlier_parts": [{"until_step": 16, "world_size": 1, "zero_stage": 2}],
    "learning_rate": 2e-5,
    "schedule": "cosine",
    "weight_decay": 0.01,
    "lora": None,
    "versions": {"vembed_ds": "0.1.0", "torch": "2.13.0"},
}


def pooled(backbones: Path, pooling: str, name: str = "text", **options: Any) -> EmbeddingModel:
    source = BackboneSource(name=str(backbones / name))
    return build_model(ModelSpec({"": source}, pooling={"": pooling}, **options))


def with_adapters(model: EmbeddingModel) -> EmbeddingModel:
    add_adapters(model.trained_backbones(), LoraSpec(r=2, alpha=4.0))
    return model


MODELS: dict[str, tuple[str, Callable[[Path], EmbeddingModel]]] = {
    "mean": ("shared", lambda folder: cases.make_model(folder, "shared")),
    "last token": ("gpt2", lambda folder: pooled(folder, "last_token", "gpt2")),
    "one layer": ("shared", lambda folder: pooled(folder, "cls", projection_dim=5)),
    "two layers": (
        "shared",
        lambda folder: pooled(folder, "pooler", projection_dim=5, projection_layers=2),
    ),
    "late": ("shared", lambda folder: pooled(folder, "none", projection_dim=5)),
    "clip": ("clip", lambda folder: cases.make_model(folder, "clip")),
    "composed": ("composed", lambda folder: cases.make_model(folder, "composed")),
    "convnext": ("convnext", lambda folder: cases.make_model(folder, "convnext")),
    "adapter": ("shared", lambda folder: with_adapters(pooled(folder, "mean"))),
}


def code_of(card: str, library: str) -> str:
    found = re.search(rf"With `{library}`:\n\n```python\n(.*?)\n```", card, re.DOTALL)
    assert found is not None, library
    return found[1]


# peft's own reading of the files asks transformers 5.23 by a name that is going away.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_code_gives_the_embeddings(
    backbones: Path, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, make = MODELS[name]
    out = tmp_path / "mine"
    export_model(save(make(backbones), kind), out, adapter=name == "adapter")
    monkeypatch.chdir(tmp_path)
    for file, picture in zip(("a.jpg", "b.jpg"), cases.images(), strict=False):
        picture.save(file)
    card = (out / "README.md").read_text()
    ours: dict[str, Any] = {}
    exec(code_of(card, "vembed_ds"), ours)
    plain: dict[str, Any] = {}
    exec(code_of(card, "transformers"), plain)
    theirs: dict[str, Any] = {}
    exec(code_of(card, "sentence-transformers"), theirs)
    encoder = Encoder(out, device="cpu")
    expected: dict[str, Any] = {}
    if "text" in encoder.model.parts:
        expected["text"] = encoder.encode_text(TEXTS)
    if "image" in encoder.model.parts:
        expected["image"] = encoder.encode_image([Image.open("a.jpg"), Image.open("b.jpg")])
    for stream, rows in expected.items():
        found = [made[f"{stream}_embeddings"] for made in (ours, plain, theirs)]
        for row, own, by_hand, by_them in zip(rows, *found, strict=True):
            np.testing.assert_array_equal(own, row)
            by_hand = by_hand.numpy()[: len(row)] if row.ndim == 2 else by_hand.numpy()
            np.testing.assert_allclose(by_hand, row, rtol=0, atol=2e-6)
            np.testing.assert_allclose(by_them, row, rtol=0, atol=2e-6)
    assert expected


def test_front_matter_and_figures(backbones: Path, save: Save, tmp_path: Path) -> None:
    saved = save(cases.make_model(backbones, "shared"), "shared")
    (saved / "model" / "training.json").write_text(json.dumps(FACTS))
    lines = [
        {"step": 0, "eval/recall@1": 0.125, "eval/mrr": None},
        {"step": 10, "train/loss": 1.0},
        {"step": 20, "eval/recall@1": 0.25},
        {"step": 40, "eval/recall@1": 0.5, "eval/num_queries": 60},
        {"step": 50, "eval/recall@1": 0.75},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4'
    (saved.parent / "metrics.jsonl").write_text(text)
    export_model(saved, tmp_path / "mine", dtype="bfloat16")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "some-org/tiny-bert",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["vembed_ds", "embeddings", "feature-extraction", "text"],
    }
    assert "# mine" in card.text
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card.text, re.MULTILINE))
    assert rows["Training data"] == "`pairs.jsonl`"
    assert rows["Training pairs"] == "1234"
    assert rows["Steps"] == "40 of 50"
    assert rows["Global batch"] == "64 pairs on 2 ranks, ZeRO stage 3"
    assert rows["Until step 16"] == "on 1 rank, ZeRO stage 2"
    assert rows["Weights here"] == "bfloat16"
    assert rows["Versions"] == "vembed_ds 0.1.0, torch 2.13.0"
    assert "|  | before training | step 40 |" in card.text
    assert "| recall@1 | 0.1250 | 0.5000 |" in card.text
    assert "| num_queries |  | 60 |" in card.text
    assert "`license` at the top" in card.text
    assert not (tmp_path / "mine" / "training.json").exists()


def test_without_facts_nothing_is_invented(backbones: Path, save: Save, tmp_path: Path) -> None:
    saved = save(cases.make_model(backbones, "composed"), "composed")
    (saved.parent / "metrics.jsonl").write_text('{"step": 1, "eval/mrr": 0.5}\n')
    export_model(saved, tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert "| Training pairs | not recorded |" in card.text
    assert "No evaluation was found" in card.text


def test_local_folders_and_random_weights_are_no_base_models_of_the_hub(
    backbones: Path, save: Save, tmp_path: Path
) -> None:
    saved = save(cases.make_model(backbones, "composed"), "composed")
    facts = FACTS | {"base_models": {"text": "folder private-bert", "image": None}}
    (saved / "model" / "training.json").write_text(json.dumps(facts))
    export_model(saved, tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert "`folder private-bert` and random weights" in card.text


def test_instructions_are_told(backbones: Path, save: Save, tmp_path: Path) -> None:
    saved = save(cases.make_model(backbones, "shared"), "shared")
    path = saved / "model" / "vembed_config.json"
    told = {"query_instruction": "query: ", "document_instruction": "passage: "}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    export_model(saved, tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert 'Begin every query with "query: " and every document with "passage: "' in card
    assert 'role="query"' in code_of(card, "vembed_ds")


def test_evaluations_until_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-step-2"
    assert read_evaluations(checkpoint, last_step=2) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "eval/mrr": 0.5}\n')
    assert read_evaluations(checkpoint, last_step=None) == []
    assert read_evaluations(checkpoint, last_step=1) == []
    assert read_evaluations(checkpoint, last_step=2) == [Evaluation(2, {"mrr": 0.5})]


def test_damaged_facts(backbones: Path, save: Save, tmp_path: Path) -> None:
    saved = save(cases.make_model(backbones, "shared"), "shared")
    (saved / "model" / "training.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"training.json: damaged: Expecting"):
        export_model(saved, tmp_path / "mine")
    assert not list(tmp_path.glob("*mine*"))
