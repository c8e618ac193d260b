"""Embedding of texts and images with an exported, or any plain Hugging Face, folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils import cached_file

from vembed_ds.data.batches import collect_roles, lay_out
from vembed_ds.data.cells import ImageSource
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.data.vision_language import VisionLanguageProcessor
from vembed_ds.errors import ConfigError, DataError, one_line
from vembed_ds.models.backbones import BackboneSource, position_limit, stated_length
from vembed_ds.models.builder import ModelSpec, build_encoder
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TwoTowerEncoder
from vembed_ds.models.saved_folder import (
    SETTINGS_FILE,
    processor_sources,
    read_settings,
    saved_spec,
)
from vembed_ds.references import resolve_model_reference
from vembed_ds.similarity import Embeddings, concatenate, similarity

Array = np.ndarray[Any, Any]
Role = Literal["query", "document"]
Input = str | Path | ImageSource | Item


class SavedModel(NamedTuple):
    """A model that somebody saved.

    Attributes:
        source: Its folder, or a plain model's hub name.
        settings: Content of ``vembed_config.json``; empty for a plain folder.
        spec: How it is built.
    """

    source: str
    settings: dict[str, Any]
    spec: ModelSpec


class Encoder:
    """Embeds texts and images.

    A folder that ``vembed_ds.convert`` wrote is rebuilt as it was trained; where it holds an
    adapter, the base model is loaded and the adapter merged into it. A plain Hugging Face
    text, image or CLIP-like folder, which has no ``vembed_config.json``, is pooled as its family
    is made for: a CLIP-like model by itself, a causal language model at the last token, a
    convolutional model by its pooler, every other at its first token (``cls``).

    Args:
        folder: Exported folder, or a reference as in ``model_name``: hub name, folder, or
            ``package:NAME/folder``.
        device: ``None``: the first GPU, else the CPU.
        dtype: Of the weights; embeddings are float32 whatever it is.
        trust_remote_code: Run Python code that the folder brings, with your rights.

    Attributes:
        model: The :class:`EmbeddingModel`, in evaluation mode.
        processor: Its :class:`ItemProcessor`.
        settings: Content of ``vembed_config.json``; empty for a plain folder.

    Raises:
        ConfigError: The folder, or a part of it, is missing or cannot be loaded.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        saved = find_model(str(folder), trust_remote_code=trust_remote_code)
        self.settings: dict[str, Any] = saved.settings
        self.model = EmbeddingModel(build_encoder(saved.spec))
        self.processor: ItemProcessor = load_processor(saved, self.model)
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device is None else device)
        self.model.to(self.device).eval()
        for parameter in self.model.parameters():
            # Weights only: rotary frequencies and the like lose too much in 16 bit.
            parameter.data = parameter.data.to(dtype)

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        role: Role | None = None,
        batch_size: int = 32,
        normalize: bool = True,
        show_progress: bool = False,
    ) -> Array | list[Array]:
        """Embed texts.

        Args:
            texts: N texts; a single one counts as N = 1. Longer ones are truncated.
            role: ``query`` or ``document``: with the instruction of that side in training.
            batch_size: Texts in one forward pass; they are grouped by length.
            normalize: Scale every embedding to length 1.
            show_progress: Show a progress bar.

        Returns:
            ``[N, D]`` float32, in the order of ``texts``; ``[0, D]`` for none. Of a late-interaction
            model a list of N arrays ``[L_i, D]``, one vector per token.

        Raises:
            ConfigError: The model embeds no texts.
            DataError: A text gives no token.
        """
        self._require("text")
        listed = [texts] if isinstance(texts, str) else list(texts)
        return self.encode(
            [Item(text=text) for text in listed],
            role=role,
            batch_size=batch_size,
            normalize=normalize,
            show_progress=show_progress,
        )

    def encode_image(
        self,
        images: ImageSource | Path | Sequence[ImageSource | Path],
        *,
        role: Role | None = None,
        batch_size: int = 32,
        normalize: bool = True,
        show_progress: bool = False,
    ) -> Array | list[Array]:
        """Embed images.

        Args:
            images: N paths, encoded bytes or PIL images; a single one counts as N = 1. They are
                opened batch by batch.
            role: As in :meth:`encode_text`.
            batch_size: Images in one forward pass.
            normalize: Scale every embedding to length 1.
            show_progress: Show a progress bar.

        Returns:
            As :meth:`encode_text`.

        Raises:
            ConfigError: The model embeds no images.
            DataError: An image cannot be read; names it.
        """
        self._require("image")
        single = isinstance(images, str | bytes | Path | dict | Image.Image)
        listed: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
        sources = [str(source) if isinstance(source, Path) else source for source in listed]
        return self.encode(
            [Item(image=source) for source in sources],
            role=role,
            batch_size=batch_size,
            normalize=normalize,
            show_progress=show_progress,
        )

    def encode_queries(
        self,
        queries: Input | Sequence[Input],
        *,
        batch_size: int = 32,
        normalize: bool = True,
        show_progress: bool = False,
    ) -> Array | list[Array]:
        """Embed what is searched with, with the instruction of that side in training.

        Args:
            queries: N texts, images or items; a single one counts as N = 1. A ``str`` is a text, or a path where
                the model was trained with images on this side, or embeds images only; a ``Path`` is always an
                image.
            batch_size: Items in one forward pass.
            normalize: Scale every embedding to length 1.
            show_progress: Show a progress bar.

        Returns:
            As :meth:`encode_text`.

        Raises:
            ConfigError: The model embeds no such items, or has no one instruction for this side.
            DataError: One cannot be encoded; names it.
        """
        return self._encode_side("query", queries, batch_size, normalize, show_progress)

    def encode_documents(
        self,
        documents: Input | Sequence[Input],
        *,
        batch_size: int = 32,
        normalize: bool = True,
        show_progress: bool = False,
    ) -> Array | list[Array]:
        """Embed what is searched; otherwise as :meth:`encode_queries`."""
        return self._encode_side("document", documents, batch_size, normalize, show_progress)

    def similarity(self, queries: Array | list[Array], documents: Array | list[Array]) -> Array:
        """How alike every query is to every document, as the model was trained to compare.

        Args:
            queries: Q embeddings, from :meth:`encode_queries`; normalised or not.
            documents: N embeddings, from :meth:`encode_documents`.

        Returns:
            ``[Q, N]`` float32: the cosine; of token embeddings MaxSim.

        Raises:
            ValueError: They are not of one kind and width.
        """
        reduction = self.settings.get("maxsim_reduction") or "mean"
        found = similarity(_embeddings(queries), _embeddings(documents), reduction=reduction)
        return found.numpy()

    @property
    def width(self) -> int:
        """D, the dimensions of an embedding."""
        filler = self.processor.filler(self.model.parts[0])
        return embed_items(self.model, self.processor, [filler]).width

    def _encode_side(
        self,
        role: Role,
        given: Input | Sequence[Input],
        batch_size: int,
        normalize: bool,
        show_progress: bool,
    ) -> Array | list[Array]:
        single = isinstance(given, str | bytes | Path | dict | Image.Image | Item)
        listed: Any = [given] if single else given
        items: list[Item] = [self._item(one, role) for one in listed]
        if any(item.text is not None for item in items):
            self._require("text")
        if any(item.image is not None for item in items):
            self._require("image")
        return self.encode(
            items,
            role=role,
            batch_size=batch_size,
            normalize=normalize,
            show_progress=show_progress,
        )

    def _item(self, given: Any, role: Role) -> Item:
        if isinstance(given, Item):
            return given
        if isinstance(given, str) and not self._is_image_side(role):
            return Item(text=given)
        return Item(image=str(given) if isinstance(given, Path) else given)

    def _is_image_side(self, role: Role) -> bool:
        """Whether a ``str`` names an image on this side."""
        query, _, document = self.settings.get("retrieval_mode", "").partition("2")
        letter = query if role == "query" else document
        return letter == "i" or tuple(self.model.parts) == ("image",)

    def encode(
        self,
        items: Sequence[Item],
        *,
        role: Role | None = None,
        batch_size: int = 32,
        normalize: bool = True,
        show_progress: bool = False,
    ) -> Array | list[Array]:
        """Embed items that hold a text, an image, or both.

        Args:
            items: N items.
            role: As in :meth:`encode_text`; an item's own instruction is kept.
            batch_size: Items in one forward pass.
            normalize: Scale every embedding to length 1.
            show_progress: Show a progress bar.

        Returns:
            As :meth:`encode_text`.

        Raises:
            ConfigError: The model embeds no such items.
            DataError: An item cannot be encoded; names it.
        """
        if any(not isinstance(item, Item) for item in items):
            raise DataError(
                "encode takes Items; for texts call encode_text, for images encode_image"
            )
        instruction = self._instruction(role)
        told = [
            item if item.instruction else replace(item, instruction=instruction) for item in items
        ]
        # By kind and length, so that a batch has little padding.
        order = sorted(
            range(len(told)),
            key=lambda i: (told[i].image is None, -len(told[i].text or ""), i),
        )
        parts = []
        with tqdm(total=len(told), unit="item", disable=not show_progress) as progress:
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                parts.append(self._embed([(told[i], i) for i in places], normalize=normalize))
                progress.update(len(places))
        if not parts:
            return self._nothing()
        rows = concatenate(parts)
        places_of = np.argsort(np.array(order), kind="stable")
        return _arrays(rows.rows(torch.from_numpy(places_of)))

    def _instruction(self, role: Role | None) -> str:
        if role is None:
            return ""
        instruction: str | None = self.settings.get(f"{role}_instruction", "")
        if instruction is None:
            raise ConfigError(
                f"role={role!r}: the model was trained on data sets with instructions of their own; "
                "leave role out and give each Item its instruction"
            )
        return instruction

    def _require(self, part: str) -> None:
        if part not in self.model.parts:
            raise ConfigError(
                f"encode_{part}: the model has no {part} tower; "
                f"it embeds {' and '.join(self.model.parts)}"
            )

    def _embed(self, items: Sequence[tuple[Item, int]], *, normalize: bool) -> Embeddings:
        encoded = [
            self.processor.encode(item, origin=f"item {number}", augment_seed=None)
            for item, number in items
        ]
        rows = embed_items(self.model, self.processor, encoded)
        return _unit(rows) if normalize else rows

    def _nothing(self) -> Array | list[Array]:
        """No rows; the width is what the model gives for anything."""
        filler = self.processor.filler(self.model.parts[0])
        return _arrays(embed_items(self.model, self.processor, [filler]).rows(slice(0, 0)))


@torch.inference_mode()
def embed_items(
    model: EmbeddingModel, processor: ItemProcessor, items: Sequence[EncodedItem]
) -> Embeddings:
    """Embeddings of encoded items of any streams, float32 on the host, not normalised."""
    device = next(model.parameters()).device
    plan = lay_out({"items": items}, budget=ChunkBudget(items=None)).alone()
    inputs = {
        stream: {
            name: tensor.to(device)
            for name, tensor in processor.pad(stream, plan.streams[stream][places]).items()
        }
        for stream, places in plan.chunks[0].items()
    }
    outputs = {name: value.cpu() for name, value in model(inputs).items()}
    return collect_roles(plan, [outputs])["items"].float()


def _unit(rows: Embeddings) -> Embeddings:
    return Embeddings(functional.normalize(rows.values, dim=-1), rows.mask)


def _embeddings(rows: Array | list[Array]) -> Embeddings:
    """Arrays as :meth:`Encoder.encode` gives them; token embeddings are padded."""
    if not isinstance(rows, list):
        return Embeddings(torch.from_numpy(rows))
    tokens = [torch.from_numpy(array) for array in rows]
    padded = pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([len(array) for array in rows])
    return Embeddings(padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1))


def _arrays(rows: Embeddings) -> Array | list[Array]:
    if rows.mask is None:
        return rows.values.numpy()
    pairs = zip(rows.values, rows.mask, strict=True)
    return [values[mask].numpy() for values, mask in pairs]


def find_model(reference: str, *, trust_remote_code: bool) -> SavedModel:
    """What a reference names: where it is, and how its model is built.

    Raises:
        ConfigError: It is missing, holds checkpoints, or belongs to another program.
    """
    source = _locate(reference)
    settings = read_settings(Path(source), trust_remote_code=trust_remote_code)
    spec = saved_spec(source, settings, trust_remote_code=trust_remote_code)
    return SavedModel(source, settings, spec)


def _locate(reference: str) -> str:
    """Folder or hub name; an exported model on the hub is fetched whole."""
    source = resolve_model_reference(reference)
    if Path(source).is_dir():
        if any((Path(source) / name).is_file() for name in ("latest", "trainer_state.json")):
            raise ConfigError(
                f"{reference}: holds training checkpoints, not a model; "
                f"first: vembed-ds convert {reference} models/{Path(source).absolute().name}"
            )
        return source
    try:
        found = cached_file(source, SETTINGS_FILE, _raise_exceptions_for_missing_entries=False)
        return source if found is None else snapshot_download(source)
    except OSError as error:
        raise ConfigError(
            f"{reference}: no such folder here, and as a name on the hub: {one_line(error)}; check "
            "the name, or give a folder or package:NAME/folder; HF_HUB_OFFLINE=1 asks the hub's "
            "cache only"
        ) from error


def load_processor(saved: SavedModel, model: EmbeddingModel) -> ItemProcessor:
    """The processor of a saved model.

    Args:
        saved: From :func:`find_model`.
        model: Built from it; its weights do not matter.

    Raises:
        ConfigError: A part is missing or cannot be loaded.
    """
    source, settings, spec = saved
    folders = {
        part: folder
        for part, folder in processor_sources(source, settings).items()
        if part in model.parts
    }
    limit = _text_limit(model)
    processor = build_item_processor(
        folders.get("text"),
        folders.get("image"),
        max_length=settings.get("max_seq_length") or stated_length(BackboneSource(name=source)),
        fallback_length=limit,
        model_config=_config(model),
        trust_remote_code=spec.trust_remote_code,
    )
    if "pad_to_max_length" in settings:
        processor.pad_to_max_length = settings["pad_to_max_length"]
    if isinstance(processor, VisionLanguageProcessor):
        processor.default_instruction = settings.get("prompt") or ""
    if limit is not None and processor.max_length is not None:
        processor.max_length = min(processor.max_length, limit)
    return processor


def _config(model: EmbeddingModel) -> Any:
    """Config of the one backbone; ``None`` for a composed encoder."""
    encoder = model.encoder
    if isinstance(encoder, TwoTowerEncoder):
        return encoder.backbone.config
    towers = [encoder.tower(name) for name in encoder.towers]
    return towers[0].backbone.config if len(towers) == 1 else None


def _text_limit(model: EmbeddingModel) -> int | None:
    """Longest text, in tokens, that the model has positions for."""
    return position_limit(text_backbone(model)) if "text" in model.parts else None


def text_backbone(model: EmbeddingModel) -> Any:
    """The Hugging Face model that reads texts, of a model that embeds them."""
    encoder = model.encoder
    return (
        encoder.backbone if isinstance(encoder, TwoTowerEncoder) else encoder.tower("text").backbone
    )
