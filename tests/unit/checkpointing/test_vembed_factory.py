"""I4: vembed-factory's Predictor embeds as trained with a converted folder, or we say why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.converting import adapted, composed_model, convert, family_model, save_checkpoint
from tests.distributed import export_cases as cases
from tests.predictor import Predictor
from vembed_ds import Encoder
from vembed_ds.checkpointing.companions import describe_readers
from vembed_ds.checkpointing.export import export_model
from vembed_ds.checkpointing.vembed_factory_layout import predictor_errors, predictor_problems
from vembed_ds.convert import main
from vembed_ds.errors import CheckpointError

TEXTS = ["a dog", "the sun " * 20, "rain", "a red apple on a wooden table"]
IMAGES = cases.images()

# Family, or "composed", and the options of the model.
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "bert_pooler": ("bert", {"pooling": {"": "pooler"}, "projection_dim": 6}),
    "modernbert_cls": ("modernbert", {"projection_dim": 6}),
    "modernbert_mean": ("modernbert", {"pooling": {"": "mean"}}),
    "qwen3": ("qwen3", {}),
    "qwen3_projection": ("qwen3", {"projection_dim": 6}),
    "clip": ("clip", {}),
    "clip_projection": ("clip", {"projection_dim": 6}),
    "dinov2": ("dinov2", {"projection_dim": 6}),
    "dinov3_vit": ("dinov3_vit", {}),
    "vit_pooler": ("vit", {"pooling": {"": "pooler"}}),
    "convnext": ("convnext", {}),
    "composed": ("composed", {"text_family": "modernbert", "pooling": {"text": "mean"}}),
}
OTHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert_cls": ("bert", {}, "it takes the backbone's own pooler, not cls"),
    "vit_mean": ("vit", {"pooling": {"": "mean"}}, "own pooler, not mean"),
    "composed_bert": ("composed", {"pooling": {"text": "mean"}}, "own pooler of texts, not mean"),
    "square": (
        "modernbert",
        {"projection_dim": 16},
        "leaves out a projection that keeps the width",
    ),
}
REFUSED_THERE: dict[str, tuple[str, dict[str, Any], str]] = {
    "two_layers": (
        "modernbert",
        {"projection_dim": 6, "projection_layers": 2},
        "it wants 1 layer in projection_head, and this model has 2",
    ),
    "composed_one_layer": (
        "composed",
        {"text_family": "modernbert", "projection_layers": 1},
        "it wants 2 layers in text_projection, and this model has 1",
    ),
}
SAID_ONLY: dict[str, tuple[str, dict[str, Any], str]] = {
    "tokens": ("bert", {"pooling": {"": "none"}}, "it takes token embeddings for one vector"),
    "siglip2": ("siglip2", {}, "an image's pixels only, not its mask and shape"),
    "qwen3_vl": ("qwen3_vl", {}, "items of a vision-language model into their template"),
}


def converted(
    tmp_path: Path, name: str, options: dict[str, Any], *, lora: dict[str, Any] | None = None
) -> Path:
    if name == "composed":
        model, processor = composed_model(tmp_path, **options)
    else:
        model, processor = family_model(tmp_path / name, name, **options)
    if lora is None:
        return convert(tmp_path, model, processor)
    return convert(tmp_path, adapted(model, **lora), processor, adapter=True)


def settings_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "vembed_config.json").read_text())
    return content


def predictor(folder: Path) -> Predictor:
    if settings_of(folder)["encoder_mode"] != "composed":
        return Predictor(str(folder))
    names = {f"{s}_model_name": str(folder / f"{s}_encoder") for s in ("text", "image")}
    return Predictor(str(folder), encoder_mode="composed", **names)


def difference(folder: Path) -> float:
    encoder, other = Encoder(folder, device="cpu"), predictor(folder)
    found = 0.0
    for part in encoder.model.parts:
        given: Any = TEXTS if part == "text" else IMAGES
        ours = getattr(encoder, f"encode_{part}")(given)
        found = max(found, float(np.abs(getattr(other, f"encode_{part}")(given) - ours).max()))
    return found


@pytest.mark.parametrize("name", READ)
def test_embeddings(tmp_path: Path, name: str) -> None:
    folder = converted(tmp_path, *READ[name])
    assert predictor_errors(settings_of(folder)) == predictor_problems(settings_of(folder)) == []
    assert difference(folder) < 1e-6


@pytest.mark.filterwarnings("ignore")  # it hands an adapted model to peft
@pytest.mark.parametrize(
    ("name", "dora"), [("modernbert", False), ("modernbert", True), ("clip", False)]
)
def test_adapters(tmp_path: Path, name: str, dora: bool) -> None:
    folder = converted(tmp_path, name, {"projection_dim": 6}, lora={"use_dora": dora})
    assert (folder / "adapter_model.safetensors").is_file()
    assert difference(folder) < 1e-6


@pytest.mark.parametrize("name", OTHER)
def test_what_it_embeds_otherwise_is_said(tmp_path: Path, name: str) -> None:
    kind, options, reason = OTHER[name]
    folder = converted(tmp_path, kind, options)
    assert any(reason in problem for problem in predictor_problems(settings_of(folder)))
    assert difference(folder) > 1e-3, "there is no reason to say so"


@pytest.mark.parametrize("name", REFUSED_THERE)
def test_another_number_of_layers_is_an_error_there(tmp_path: Path, name: str) -> None:
    kind, options, reason = REFUSED_THERE[name]
    folder = converted(tmp_path, kind, options)
    assert reason in predictor_errors(settings_of(folder))
    assert f"its Predictor ends with an error: {reason}" in describe_readers(folder)[1]
    with pytest.raises(RuntimeError, match="Missing key"):
        predictor(folder)


@pytest.mark.parametrize("name", SAID_ONLY)
def test_what_it_cannot_embed_is_said(tmp_path: Path, name: str) -> None:
    kind, options, reason = SAID_ONLY[name]
    folder = converted(tmp_path, kind, options)
    assert any(reason in problem for problem in predictor_problems(settings_of(folder)))


@pytest.mark.parametrize(
    ("dtype", "projection", "fails"),
    [("bfloat16", {}, True), ("float16", {"projection_dim": 6}, True), ("float16", {}, False)],
)
def test_16_bit_weights(
    tmp_path: Path, dtype: str, projection: dict[str, Any], fails: bool
) -> None:
    folder = convert(
        tmp_path, *family_model(tmp_path / "qwen3", "qwen3", **projection), dtype=dtype
    )
    errors = predictor_errors(settings_of(folder))
    assert errors == [f"it cannot compute {dtype} weights; convert to float32"] * fails
    assert predictor_problems(settings_of(folder)) == []
    if fails:
        with pytest.raises((TypeError, RuntimeError), match=r"BFloat16|same dtype"):
            predictor(folder).encode_text(TEXTS)
    else:
        assert difference(folder) < 0.01


def test_both_files_of_a_projection_hold_the_same(tmp_path: Path) -> None:
    folder = converted(tmp_path, *READ["composed"])
    for name in ("text_projection", "image_projection"):
        stored = torch.load(folder / f"{name}.pt", weights_only=True)
        ours = load_file(folder / f"{name}.safetensors")
        assert stored.keys() == ours.keys()
        assert all(torch.equal(stored[key], ours[key]) for key in ours)


def test_a_checkpoint_that_says_too_little(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, *family_model(tmp_path / "bert", "bert"))
    path = checkpoint / "model" / "vembed_config.json"
    settings = json.loads(path.read_text())
    del settings["backbones"]
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"has no backbones, so an earlier version .* wrote"):
        export_model(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_convert_says_how_others_read_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_checkpoint(tmp_path, *family_model(tmp_path / "bert", "bert"))
    out = tmp_path / "out"
    assert main([str(checkpoint), str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"sentence-transformers: SentenceTransformer({str(out)!r})\n" in printed
    assert "vembed-factory: its Predictor gives other embeddings: it takes the backb" in printed


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("clip", {}, "vembed-factory: Predictor({0!r})"),
        (
            "qwen3_vl",
            {},
            "sentence-transformers: SentenceTransformer({0!r}, trust_remote_code=True)",
        ),
        ("bert", {"pooling": {"": "none"}}, "sentence-transformers: MultiVectorEncoder({0!r})"),
        (
            "vit",
            {"pooling": {"": "none"}},
            "sentence-transformers: SentenceTransformer({0!r}, trust_remote_code=True)"
            ".encode(items, output_value='token_embeddings')",
        ),
        (
            "composed",
            {"text_family": "modernbert"},
            "vembed-factory: Predictor({0!r}, encoder_mode='composed', "
            "text_model_name={1!r}, image_model_name={2!r})",
        ),
    ],
)
def test_how_others_read_it(tmp_path: Path, name: str, options: dict[str, Any], line: str) -> None:
    folder = converted(tmp_path, name, options)
    places = [str(folder), str(folder / "text_encoder"), str(folder / "image_encoder")]
    assert line.format(*places) in describe_readers(folder)
