"""Batches of padded tensors, with vembed-factory's keys: the inputs of each role, and joining them.

=================  ===========================================================================
query              input_ids, attention_mask; query_pixel_values, query_image_grid_thw; for
                   image queries of a vision-language model query_input_ids, ..._mask
positive           pos_input_ids, pos_attention_mask, pos_pixel_values (or pixel_values),
                   pos_image_grid_thw (or image_grid_thw)
negatives          neg_input_ids, neg_attention_mask, neg_pixel_values, neg_image_grid_thw;
                   neg_counts: how many each query has
labels             class of each query
=================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vembed_ds.errors import DataError
from vembed_ds.models.outputs import maybe_first

__all__ = [
    "concat_batches",
    "maybe_first",
    "unpack_negative_batch",
    "unpack_positive_batch",
    "unpack_query_batch",
]

TensorBatch = Mapping[str, Any]
Inputs = dict[str, Tensor]


def unpack_query_batch(batch: TensorBatch, retrieval_mode: str) -> Inputs:
    """The model's arguments of the B queries.

    Args:
        batch: Tensors ``[B, ...]`` by key.
        retrieval_mode: Its first letter decides: ``t`` text, ``i`` image, ``m`` both.

    Raises:
        DataError: The batch lacks what the mode needs.
    """
    letter = retrieval_mode[0]
    prefix = "query_" if letter == "i" and batch.get("query_input_ids") is not None else ""
    return _unpack(
        batch,
        letter,
        role=f"retrieval_mode={retrieval_mode}: the query",
        text=prefix,
        image=["query_"],
    )


def unpack_positive_batch(batch: TensorBatch, retrieval_mode: str) -> Inputs:
    """The model's arguments of the B positives; the mode's last letter decides.

    Args:
        batch: As in :func:`unpack_query_batch`.
        retrieval_mode: As there.

    Raises:
        DataError: The batch lacks what the mode needs.
    """
    return _unpack(
        batch,
        retrieval_mode[-1],
        role=f"retrieval_mode={retrieval_mode}: the positive",
        text="pos_",
        image=["pos_", ""],
    )


def unpack_negative_batch(batch: TensorBatch) -> Inputs | None:
    """The model's arguments of the negatives, texts or images; ``None`` when there are none.

    Args:
        batch: As in :func:`unpack_query_batch`.
    """
    has_text = batch.get("neg_input_ids") is not None
    has_image = batch.get("neg_pixel_values") is not None
    if not (has_text or has_image):
        return None
    letter = "m" if has_text and has_image else "t" if has_text else "i"
    return _unpack(batch, letter, role="the negative", text="neg_", image=["neg_"])


def concat_batches(
    batches: Sequence[Mapping[str, Tensor]], pad_token_id: int = 0
) -> tuple[Inputs, list[int]]:
    """Join the inputs of several roles for one forward pass.

    Args:
        batches: Arguments of a model, with the same names in each but for images
            (``pixel_values``, ``image_grid_thw``), which some may lack.
        pad_token_id: Fills shorter ``input_ids`` on the right; their masks are filled with 0.

    Returns:
        The joined arguments, and how many items each batch has.

    Raises:
        DataError: Some batches have texts and others have none, so that rows would shift.
    """
    text_names = [{name for name in batch if name not in _IMAGES} for batch in batches]
    if any(names != text_names[0] for names in text_names):
        raise DataError(
            f"concat_batches: the batches have {', '.join(str(sorted(n)) for n in text_names)}; "
            "give batches with the same text inputs, or embed them apart"
        )
    sizes = [len(_rows(batch)) for batch in batches]
    names = dict.fromkeys(name for batch in batches for name in batch)
    joined = {
        name: _joined(
            [batch[name] for batch in batches if name in batch],
            is_text=name not in _IMAGES,
            fill=pad_token_id if name == "input_ids" else 0,
        )
        for name in names
    }
    return joined, sizes


_IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes")
_TEXTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def _rows(batch: Mapping[str, Tensor]) -> Tensor:
    for name in ("input_ids", "image_grid_thw", "pixel_values"):
        if name in batch:
            return batch[name]
    raise DataError(f"no input_ids and no pixel_values, only {sorted(batch)}: nothing to embed")


def _joined(tensors: Sequence[Tensor], *, is_text: bool, fill: int) -> Tensor:
    if not is_text:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([functional.pad(t, (0, longest - t.shape[1]), value=fill) for t in tensors])


def _unpack(
    batch: TensorBatch, letter: str, *, role: str, text: str, image: Sequence[str]
) -> Inputs:
    inputs: Inputs = {}
    if letter in "im":
        prefix = next((p for p in image if batch.get(f"{p}pixel_values") is not None), image[0])
        inputs |= _named(batch, prefix, _IMAGES, needed="pixel_values", role=role)
    # The tokens of a vision-language model hold its images; beside those of other models, a text
    # would be a second item.
    if letter in "tm" or "image_grid_thw" in inputs:
        inputs |= _named(batch, text, _TEXTS, needed="input_ids", role=role)
    return inputs


def _named(
    batch: TensorBatch, prefix: str, names: Sequence[str], *, needed: str, role: str
) -> Inputs:
    found = {name: batch.get(f"{prefix}{name}") for name in names}
    if found[needed] is None:
        raise DataError(f"{role} needs {prefix}{needed}, but the batch has {', '.join(batch)}")
    return {name: value for name, value in found.items() if value is not None}
