"""Matryoshka: any loss over prefixes of the embeddings, and over the model's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vembed_ds.errors import ConfigError
from vembed_ds.losses.batch import GlobalBatch

BatchFunction = Callable[[GlobalBatch], Tensor]


def check_mrl_dims(mrl_dims: Sequence[int], *, width: int) -> None:
    """Refuse dimensions that the embedding does not have.

    Args:
        mrl_dims: As configured.
        width: Dimensions of the model's embeddings (of one layer's).

    Raises:
        ConfigError: Naming the widest.
    """
    if max(mrl_dims) > width:
        raise ConfigError(
            f"mrl_dims={list(mrl_dims)}: {max(mrl_dims)} is wider than the model's embeddings, "
            f"which have {width} dimensions; remove what is above {width}"
        )


@dataclass(frozen=True)
class Prefixes:
    """Which parts of embeddings a loss is summed over.

    Attributes:
        dims: d, in any order.
        weights: w, in the order of ``dims``.
        layer_weights: u, of the layers of equal width that the embeddings hold side by side.
    """

    dims: Sequence[int]
    weights: Sequence[float]
    layer_weights: Sequence[float] = (1.0,)


def sum_over(prefixes: Prefixes | None, width: int, loss: Callable[[int, int], Tensor]) -> Tensor:
    """``sum_k u_k sum_d w_d L(layer_k[..., :d])``; the loss of the whole without prefixes.

    Args:
        prefixes: What to sum over.
        width: Of the embeddings, all layers together.
        loss: Of the dimensions from start to stop.

    Raises:
        ConfigError: A prefix is wider than an embedding.
        ValueError: The layers do not divide the width.
    """
    if prefixes is None:
        return loss(0, width)
    num_layers = len(prefixes.layer_weights)
    own, rest = divmod(width, num_layers)
    if rest:
        raise ValueError(f"{width} dimensions are not {num_layers} equal layers")
    check_mrl_dims(prefixes.dims, width=own)
    return torch.stack(
        [
            layer_weight * weight * loss(layer * own, layer * own + dim)
            for layer, layer_weight in enumerate(prefixes.layer_weights)
            for dim, weight in zip(prefixes.dims, prefixes.weights, strict=True)
        ]
    ).sum()


def matryoshka(
    loss: BatchFunction,
    *,
    mrl_dims: Sequence[int],
    mrl_weights: Sequence[float] | None = None,
    mrl_layers: Sequence[int] = (1,),
    mrl_layer_weights: Sequence[float] | None = None,
) -> BatchFunction:
    """The weighted sum of ``loss`` over layers and prefixes.

    ``sum_k u_k sum_d w_d L(layer_k[..., :d])`` (Kusupati et al. 2022, arXiv 2205.13147, eq. 1;
    layers: Li et al. 2024, arXiv 2402.14776, of whose terms this has all, in every step, and
    not the divergence from the last layer).

    Args:
        loss: Of a gathered batch.
        mrl_dims: d, in any order.
        mrl_weights: w, in the order of ``mrl_dims``; ``None``: 1 each.
        mrl_layers: Numbers of K layers, for the log; the embeddings hold K layers of equal width side
            by side on the last axis.
        mrl_layer_weights: u, in the order of the layers; ``None``: 1 each.

    Returns:
        A loss; it raises ``ConfigError`` for dimensions that the embeddings do not have.
    """
    prefixes = Prefixes(
        mrl_dims,
        weights=mrl_weights or [1.0] * len(mrl_dims),
        layer_weights=mrl_layer_weights or [1.0] * len(mrl_layers),
    )

    def over_prefixes(batch: GlobalBatch) -> Tensor:
        own = batch.query.width // len(mrl_layers)

        def of(start: int, stop: int) -> Tensor:
            layer = f"layer_{mrl_layers[start // own]}_" if len(mrl_layers) > 1 else ""
            name = f"{layer}dim_{stop - start}"
            found = loss(replace(batch.dims(start, stop), part=f"{name}_"))
            batch.note(name, found)
            return found

        return sum_over(prefixes, batch.query.width, of)

    return over_prefixes
