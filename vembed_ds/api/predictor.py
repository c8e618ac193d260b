"""vembed-factory's ``Predictor``, on an :class:`Encoder`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vembed_ds.config.compat import ENCODER_FAMILIES
from vembed_ds.data.cells import ImageSource
from vembed_ds.errors import ConfigError
from vembed_ds.inference import Array, Encoder

logger = logging.getLogger(__name__)

_DEFAULT_POOLING = "mean"  # of its argument; it then read what the folder says
_CHOSEN = ("cls", "mean", "last_token", "none")
Images = ImageSource | Path | Sequence[ImageSource | Path]


class Predictor:
    """Embeds texts and images with the arguments of vembed-factory's ``Predictor``.

    New scripts are better served by :class:`Encoder`, which has batches, roles and items of both.

    Args:
        model_path: As of :class:`Encoder`.
        device: As of :class:`Encoder`.
        encoder_mode: The folder says what its model is; ``composed`` of another model is an error.
        text_model_name: Not read: a composed folder holds its towers, trained. There, a hub name gave the
            towers as they were before training, without a word.
        image_model_name: The same.
        pooling_method: ``mean`` stands for what the folder says, as there; another one must be
            what it says.
        mrl_dim: Dimensions that are kept of every embedding; ``None``: all.

    Attributes:
        encoder: The :class:`Encoder`.
        model: Its model.
        processor: Its processor.

    Raises:
        ConfigError: The folder cannot be loaded, or an argument contradicts it.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        device: str | torch.device | None = None,
        encoder_mode: str = "auto",
        text_model_name: str | None = None,
        image_model_name: str | None = None,
        pooling_method: str = _DEFAULT_POOLING,
        mrl_dim: int | None = None,
    ) -> None:
        if encoder_mode not in ("auto", "composed", *ENCODER_FAMILIES):
            raise ConfigError(
                f"encoder_mode={encoder_mode!r}: expected auto, composed or "
                f"{', '.join(ENCODER_FAMILIES)}; auto suits every folder"
            )
        self.encoder = Encoder(os.fspath(model_path), device=device)
        self.model, self.processor = self.encoder.model, self.encoder.processor
        towers = {"text_model_name": text_model_name, "image_model_name": image_model_name}
        _check_towers(self.encoder, encoder_mode, {k: v for k, v in towers.items() if v})
        _check_pooling(self.encoder, pooling_method)
        self.mrl_dim = _checked_dim(self.encoder, mrl_dim)

    def encode_text(self, text: str | Sequence[str], normalize: bool = True) -> Any:
        """Embed texts.

        Args:
            text: One or more.
            normalize: Scale every embedding to length 1, behind ``mrl_dim``.

        Returns:
            ``[N, D]`` float32, also of one text; of a late-interaction model a list of N arrays
            ``[L_i, D]``.

        Raises:
            ConfigError: The model embeds no texts.
        """
        return self._kept(self.encoder.encode_text(text, normalize=False), normalize)

    def encode_image(self, image: Images, normalize: bool = True) -> Any:
        """Embed images.

        Args:
            image: A path or PIL image, or a list of them.
            normalize: As in :meth:`encode_text`.

        Returns:
            As :meth:`encode_text`.

        Raises:
            ConfigError: The model embeds no images.
            DataError: One cannot be read.
        """
        return self._kept(self.encoder.encode_image(image, normalize=False), normalize)

    def encode(self, inputs: Any, is_image: bool = False, normalize: bool = True) -> Any:
        """Embed texts, or images where ``is_image``; as the two above."""
        encode = self.encode_image if is_image else self.encode_text
        return encode(inputs, normalize)

    def _kept(self, rows: Array | list[Array], normalize: bool) -> Any:
        if isinstance(rows, list):
            return [self._kept(tokens, normalize) for tokens in rows]
        kept = rows[:, : self.mrl_dim]
        return _unit(kept) if normalize else kept


def _unit(rows: Array) -> Array:
    """Every row scaled to length 1; one of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Array = rows / np.maximum(length, 1e-12)
    return found


def _check_towers(encoder: Encoder, encoder_mode: str, named: dict[str, str]) -> None:
    composed = encoder.settings.get("encoder_mode") == "composed"
    given = {"encoder_mode": encoder_mode} if encoder_mode == "composed" else named
    if given and not composed:
        name, value = next(iter(given.items()))
        raise ConfigError(
            f"{name}={value!r}: the folder's model is not composed of two towers; leave it out"
        )
    for name, value in named.items():
        logger.warning("%s=%r: not read; the folder holds the trained tower", name, value)


def _check_pooling(encoder: Encoder, method: str) -> None:
    """A pooler, and a backbone of two towers, won over the argument there too."""
    found = {pooling for pooling in encoder.model.pooling().values() if pooling in _CHOSEN}
    if method != _DEFAULT_POOLING and found - {method}:
        raise ConfigError(
            f"pooling_method={method!r}: the model is pooled by {' and '.join(sorted(found))}, as "
            "it was trained or is made for; leave pooling_method out"
        )


def _checked_dim(encoder: Encoder, dim: int | None) -> int | None:
    """``None`` and 0 keep all, as there."""
    if not dim:
        return None
    width = encoder.width
    if type(dim) is not int or not 0 < dim <= width:
        raise ConfigError(
            f"mrl_dim={dim!r}: the embeddings have {width} dimensions; give 1 to {width}"
        )
    return dim
