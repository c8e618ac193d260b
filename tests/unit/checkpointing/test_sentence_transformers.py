"""I4: sentence-transformers reads a converted folder as it was trained, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from tests.converting import adapted, composed_model, convert, family_model
from tests.distributed import export_cases as cases
from tests.parity.families import FAMILIES
from vembed_ds import Encoder
from vembed_ds.config.schema import ModelConfig
from vembed_ds.data.records import Item
from vembed_ds.errors import ConfigError, DataError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.training.model_setup import model_spec

TOLERANCE = 1e-6  # absolute, on unit vectors
IMAGES = cases.images()
# Texts of several lengths; the longest is cut.
TEXTS = ["a dog", "the sun " * 20, "rain", "a red apple on a wooden table"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library's own, whatever they are

# Family, and the options of the model.
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "bert_pooler": ("bert", {"pooling": {"": "pooler"}}),
    "bert_projection": ("bert", {"projection_dim": 6}),
    "bert_two_layers": ("bert", {"projection_dim": 6, "projection_layers": 2}),
    "e5": ("e5", {}),
    "modernbert": ("modernbert", {}),
    "qwen3": ("qwen3", {"projection_dim": 6}),
    "clip": ("clip", {}),
    "clip_projection": ("clip", {"projection_dim": 6}),
    "siglip": ("siglip", {}),
    "siglip2_fixed": ("siglip2_fixed", {}),
    "dinov2": ("dinov2", {"projection_dim": 6}),
    "dinov3_vit": ("dinov3_vit", {}),
    "vit_pooler": ("vit", {"pooling": {"": "pooler"}}),
    "vit_mean": ("vit", {"pooling": {"": "mean"}}),
    "convnext": ("convnext", {}),
}
# Read by the module of this package.
OWN = {"siglip2": "siglip2", "siglip2_vision": "siglip2_vision", "qwen3_vl": "qwen3_vl"}


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., Path]:
    """``family(name, options, settings, ...)``: a converted folder."""

    def make(name: str, settings: dict[str, Any] | None = None, **options: Any) -> Path:
        model, processor = family_model(tmp_path / name, name, **options)
        return convert(tmp_path, model, processor, settings)

    return make


def check(folder: Path, model: Any, encoder: Encoder | None = None) -> None:
    """Texts and images, as far as there are, embed as with ``Encoder``."""
    encoder = encoder or Encoder(folder, device="cpu")
    for part in encoder.model.parts:
        given = TEXTS if part == "text" else IMAGES
        expected = getattr(encoder, f"encode_{part}")(given)
        assert np.abs(expected[0] - expected[1]).max() > 1e-3, "all items embed alike"
        rows = model.encode(given, batch_size=3)
        assert rows.shape == expected.shape
        np.testing.assert_allclose(rows, expected, rtol=0, atol=TOLERANCE)
        assert model.get_embedding_dimension() == expected.shape[1]


@pytest.mark.parametrize("name", PLAIN)
def test_embeddings(family: Callable[..., Path], name: str) -> None:
    kind, options = PLAIN[name]
    folder = family(kind, **options)
    check(folder, SentenceTransformer(str(folder), device="cpu"))


def test_a_pooler_that_gives_a_map(tmp_path: Path) -> None:
    cases.save_backbones(tmp_path / "backbones")
    model = cases.make_model(tmp_path / "backbones", "resnet")
    folder = convert(tmp_path, model, cases.make_processor(model, "resnet"))
    check(folder, SentenceTransformer(str(folder), device="cpu"))


def test_composed(tmp_path: Path) -> None:
    folder = convert(tmp_path, *composed_model(tmp_path, pooling={"text": "mean"}))
    model = SentenceTransformer(str(folder), device="cpu")
    check(folder, model)
    with pytest.raises(ValueError, match="modality"):
        model.encode([{"text": "rain", "image": IMAGES[0]}])


def test_a_folder_that_came_from_sentence_transformers(minilm: str, tmp_path: Path) -> None:
    spec = ModelSpec({"": BackboneSource(name=minilm)})
    model = build_model(spec)
    folder = convert(tmp_path, model, cases.make_processor(model, "shared"))
    read = SentenceTransformer(str(folder), device="cpu")
    assert read.max_seq_length == cases.MAX_LENGTH
    check(folder, read)
    whole = SentenceTransformer(minilm, device="cpu").encode(["a dog"])
    np.testing.assert_allclose(read.encode(["a dog"]), whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["bert", "qwen3", "clip"])
def test_instructions_are_prompts(family: Callable[..., Path], name: str) -> None:
    told = {"query_instruction": "a red ", "document_instruction": "the sun "}
    folder = family(name, told)
    model, encoder = SentenceTransformer(str(folder), device="cpu"), Encoder(folder, device="cpu")
    for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
        expected = encoder.encode_text(TEXTS, role=role)
        assert np.abs(expected - encoder.encode_text(TEXTS)).max() > 1e-3
        np.testing.assert_allclose(encode(TEXTS), expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(
        model.encode(TEXTS), encoder.encode_text(TEXTS), rtol=0, atol=TOLERANCE
    )


def test_matryoshka(family: Callable[..., Path]) -> None:
    folder = family("bert", {"use_mrl": True, "mrl_dims": [16, 8]})
    whole = Encoder(folder, device="cpu").encode_text(TEXTS)
    model = SentenceTransformer(str(folder), device="cpu", truncate_dim=8)
    prefix = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    rows = model.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(rows, prefix, rtol=0, atol=TOLERANCE)
    assert SentenceTransformer(str(folder), device="cpu").encode(TEXTS).shape == whole.shape
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert config["matryoshka_dims"] == [16, 8]


def test_the_similarity_is_the_cosine(family: Callable[..., Path]) -> None:
    assert SentenceTransformer(str(family("clip")), device="cpu").similarity_fn_name == "cosine"


@pytest.mark.parametrize(
    ("name", "dora"),
    [("bert", False), ("bert", True), ("dinov2", False), ("clip", False), ("composed", False)],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_adapters(tmp_path: Path, name: str, dora: bool, adapter: bool) -> None:
    if name == "composed":
        model, processor = composed_model(tmp_path)
    else:
        model, processor = family_model(tmp_path / name, name, projection_dim=6)
    before = Encoder(convert(tmp_path / "plain", model, processor), device="cpu")
    folder = convert(tmp_path, adapted(model, use_dora=dora), processor, adapter=adapter)
    trusted = adapter and (dora or name == "composed")
    read = SentenceTransformer(str(folder), device="cpu", trust_remote_code=trusted)
    check(folder, read)
    for part in before.model.parts:
        given = TEXTS if part == "text" else IMAGES
        original = getattr(before, f"encode_{part}")(given)
        assert np.abs(read.encode(given) - original).max() > 1e-3, "the adapter does nothing"


@pytest.mark.parametrize("name", ["bert", "qwen3"])
@pytest.mark.parametrize("projection", [{}, {"projection_dim": 6}])
def test_one_vector_per_token(
    family: Callable[..., Path], name: str, projection: dict[str, Any]
) -> None:
    folder = family(name, pooling={"": "none"}, **projection)
    expected = Encoder(folder, device="cpu").encode_text(TEXTS)
    rows = MultiVectorEncoder(str(folder), device="cpu").encode_document(
        TEXTS, convert_to_numpy=True, batch_size=3
    )
    single = SentenceTransformer(str(folder), device="cpu")
    tokens = single.encode(TEXTS, output_value="token_embeddings", batch_size=3)
    for row, other, wanted in zip(rows, tokens, expected, strict=True):
        np.testing.assert_allclose(row, wanted, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(np.asarray(other), wanted, rtol=0, atol=TOLERANCE)
    with pytest.raises(KeyError, match="sentence_embedding"):
        single.encode(TEXTS)


@pytest.mark.parametrize("name", OWN)
def test_models_that_only_our_module_can_embed(family: Callable[..., Path], name: str) -> None:
    folder = family(OWN[name])
    with pytest.raises(ValueError, match=r"(?s)EncoderModule.*trust_remote_code=True"):
        SentenceTransformer(str(folder), device="cpu")
    check(folder, SentenceTransformer(str(folder), device="cpu", trust_remote_code=True))


@pytest.mark.parametrize(("name", "pooling"), [("vit", "none"), ("colpali", None)])
def test_tokens_of_images(family: Callable[..., Path], name: str, pooling: str | None) -> None:
    folder = family(name, pooling={"": pooling} if pooling else {})
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    rows = model.encode(IMAGES, output_value="token_embeddings")
    for row, wanted in zip(rows, Encoder(folder, device="cpu").encode_image(IMAGES), strict=True):
        np.testing.assert_allclose(np.asarray(row), wanted, rtol=0, atol=TOLERANCE)
    with pytest.raises(KeyError, match="sentence_embedding"):
        model.encode(IMAGES)


def test_a_batch_of_all_kinds_with_an_instruction(family: Callable[..., Path]) -> None:
    folder = family("qwen2_vl", {"query_instruction": "Find the picture."})
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    encoder = Encoder(folder, device="cpu")
    items = [
        Item(text="rain"),
        Item(image=IMAGES[0]),
        Item(text="the sun", image=IMAGES[1]),
        Item(text="a dog runs"),
    ]
    given: list[Any] = ["rain", IMAGES[0], {"text": "the sun", "image": IMAGES[1]}, "a dog runs"]
    rows = model.encode_query(given)
    np.testing.assert_allclose(rows, encoder.encode(items, role="query"), rtol=0, atol=TOLERANCE)
    assert np.abs(rows - encoder.encode(items)).max() > 1e-3
    with pytest.raises(DataError, match="input 0: neither a text nor an image"):
        model.encode([np.zeros((8, 8, 3), dtype=np.uint8)])
    with pytest.raises(ConfigError, match="is not written anew; copy that folder"):
        model.save(str(folder.parent / "again"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_16_bit_are_computed_in_float32(tmp_path: Path, dtype: str) -> None:
    model, processor = family_model(tmp_path / "bert", "bert", projection_dim=6)
    folder = convert(tmp_path, model, processor, dtype=dtype)
    read = SentenceTransformer(str(folder), device="cpu")
    assert read[0].model.dtype == torch.float32
    check(folder, read)


# Layers behind the pooling, as a folder of the library has them.
HEADS: dict[str, Callable[[], list[Any]]] = {
    "matrix": lambda: [Dense(16, 6, bias=False, activation_function=nn.Identity())],
    "two_layers": lambda: [
        Dense(16, 16, activation_function=nn.GELU()),
        Dense(16, 6, bias=False, activation_function=nn.Identity()),
    ],
}


def theirs(tmp_path: Path, heads: list[Any]) -> Path:
    """A folder that the library itself wrote."""
    FAMILIES["bert"].save(tmp_path / "bert")
    torch.manual_seed(3)
    modules = [Transformer(str(tmp_path / "bert")), Pooling(16, "mean"), *heads, Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": "a red "}, device="cpu")
    model.save(str(tmp_path / "theirs"))
    return tmp_path / "theirs"


@pytest.mark.parametrize("name", HEADS)
def test_their_dense_modules_are_a_starting_point(tmp_path: Path, name: str) -> None:
    folder = theirs(tmp_path, HEADS[name]())
    model, encoder = SentenceTransformer(str(folder), device="cpu"), Encoder(folder, device="cpu")
    check(folder, model, encoder)
    rows = encoder.encode_text(TEXTS, role="query")
    np.testing.assert_allclose(rows, model.encode_query(TEXTS), rtol=0, atol=TOLERANCE)
    # Training starts there, and what is converted afterwards is read there again.
    spec = model_spec(ModelConfig(model_name=str(folder)))
    trained = build_model(spec)
    again = convert(tmp_path, trained, encoder.processor)
    rows = SentenceTransformer(str(again), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(rows, model.encode(TEXTS), rtol=0, atol=TOLERANCE)
    with pytest.raises(ConfigError, match=r"projection_dim=7: .* has a trained projection to 6"):
        model_spec(ModelConfig(model_name=str(folder), projection_dim=7))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: Dense(16, 6), r"Dense modules \(Tanh behind a matrix with bias\) are no proj"),
        (
            lambda: Dense(16, 16, bias=False, activation_function=nn.Identity(), use_residual=True),
            r"Dense modules \(Identity behind a matrix without bias, use_residual\) are no proj",
        ),
    ],
)
def test_dense_modules_of_another_kind(
    tmp_path: Path, head: Callable[[], Any], message: str
) -> None:
    folder = theirs(tmp_path, [head()])
    with pytest.raises(ConfigError, match=message):
        Encoder(folder)
    with pytest.raises(ConfigError, match=message):
        model_spec(ModelConfig(model_name=str(folder)))


def test_a_dense_module_without_its_file(tmp_path: Path) -> None:
    folder = theirs(tmp_path, HEADS["matrix"]())
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"2_Dense/model.safetensors: missing; copy the folder"):
        Encoder(folder)


def test_without_its_files_another_embedding_would_be_given(family: Callable[..., Path]) -> None:
    """The reason for all this: the test would not notice otherwise that nothing is read."""
    folder = family("bert")
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    (folder / "modules.json").unlink()
    assert (
        np.abs(SentenceTransformer(str(folder), device="cpu").encode(TEXTS) - expected).max() > 0.1
    )
