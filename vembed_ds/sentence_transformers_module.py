"""A module of sentence-transformers that embeds as :class:`Encoder` does.

For converted models that its own modules cannot compute (``checkpointing/sentence_transformers_layout.py``).
It is named in such a folder's ``modules.json``; nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from PIL import Image
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from vembed_ds.data.records import Item
from vembed_ds.errors import ConfigError, DataError
from vembed_ds.inference import Encoder, embed_items
from vembed_ds.similarity import Embeddings, concatenate

_PLACES = "places"  # in the features, beside a stream's inputs: the numbers of its items


class EncoderModule(InputModule):  # type: ignore[misc]  # of a package without types here
    """Embeds texts, images, and dicts of a ``text`` and an ``image``, of all kinds in one batch.

    A prompt is the items' instruction. Gives ``sentence_embedding`` ``[n, D]``, or
    ``token_embeddings`` ``[n, L, D]`` and their ``attention_mask`` ``[n, L]``.

    Args:
        folder: Converted folder, or its name on the hub.
        trust_remote_code: Run Python code that the folder brings.
    """

    def __init__(self, folder: str, *, trust_remote_code: bool = False) -> None:
        super().__init__()
        self.folder = folder
        encoder = Encoder(folder, device="cpu", trust_remote_code=trust_remote_code)
        self.model, self.processor = encoder.model, encoder.processor
        self.tokenizer = self.processor.tokenizer
        filler = self.processor.filler(self.model.parts[0])
        self._width = embed_items(self.model, self.processor, [filler]).width

    @property
    def modalities(self) -> list[Any]:
        """What it takes; ``message`` is their name for a batch of several kinds."""
        both = [("image", "text"), "message"] if len(self.model.parts) > 1 else []
        return [*self.model.parts, *both]

    @property
    def max_seq_length(self) -> int | None:
        """Longest input, in tokens."""
        return self.processor.max_length

    def get_embedding_dimension(self) -> int:
        """D."""
        return self._width

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """The model's inputs, named ``<stream>/<input>``, and the places of each stream's items.

        Raises:
            DataError: An input cannot be encoded; names its number.
        """
        encoded = []
        for number, given in enumerate(inputs):
            origin = f"input {number}"
            item = _item(given, prompt or "", origin=origin)
            encoded.append(self.processor.encode(item, origin=origin, augment_seed=None))
        features: dict[str, Tensor] = {}
        for stream in dict.fromkeys(item.stream for item in encoded):
            places = [i for i, item in enumerate(encoded) if item.stream == stream]
            padded = self.processor.pad(stream, [encoded[i] for i in places])
            features |= {f"{stream}/{name}": value for name, value in padded.items()}
            features[f"{stream}/{_PLACES}"] = torch.tensor(places)
        return features

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Embed what :meth:`preprocess` gives."""
        streams: dict[str, dict[str, Tensor]] = {}
        for key, value in features.items():
            stream, name = key.split("/")
            streams.setdefault(stream, {})[name] = value
        places = [inputs.pop(_PLACES) for inputs in streams.values()]
        parts = []
        for stream, inputs in streams.items():
            outputs = self.model({stream: inputs})
            parts.append(Embeddings(outputs[stream].float(), outputs.get(f"{stream}/mask")))
        rows = concatenate(parts).rows(torch.cat(places).argsort())
        if rows.mask is None:
            return {"sentence_embedding": rows.values}
        return {"token_embeddings": rows.values, "attention_mask": rows.mask}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Not offered: what it was loaded from is the model."""
        raise ConfigError(f"{output_path}: {self.folder} is not written anew; copy that folder")

    @classmethod
    def load(cls, model_name_or_path: str, *, trust_remote_code: bool = False, **_: Any) -> Self:
        """Read a converted folder."""
        return cls(model_name_or_path, trust_remote_code=trust_remote_code)


def _item(given: Any, instruction: str, *, origin: str) -> Item:
    parts = given if isinstance(given, dict) else {infer_modality(given): given}
    text, image = parts.get("text"), parts.get("image")
    if parts.keys() - {"text", "image"} or not (
        isinstance(text, str | None) and isinstance(image, str | bytes | Image.Image | None)
    ):
        raise DataError(
            f"{origin}: neither a text nor an image (a path or a PIL image), nor a dict of both"
        )
    return Item(text=text, image=image, instruction=instruction)
