"""Matryoshka: any loss over prefixes of the embeddings, and over the model's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def matryoshka(
    loss: BatchFunction,
    *,
    mrl_dims: Sequence[int],
    mrl_weights: Sequence[float] | None = None,
    num_layers: int = 1,
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
        num_layers: K; the embeddings hold K layers of equal width side by side on the last axis.
        mrl_layer_weights: u, in the order of the layers; ``None``: 1 each.

    Returns:
        A loss; it raises ``ConfigError`` for dimensions that the embeddings do not have.
    """
    dims = dict(zip(mrl_dims, mrl_weights or [1.0] * len(mrl_dims), strict=True))
    layers = mrl_layer_weights or [1.0] * num_layers

    def over_prefixes(batch: GlobalBatch) -> Tensor:
        width, rest = divmod(batch.query.width, num_layers)
        if rest:
            raise ValueError(f"{batch.query.width} dimensions are not {num_layers} equal layers")
        check_mrl_dims(mrl_dims, width=width)
        return torch.stack(
            [
                layer_weight * weight * loss(batch.dims(number * width, number * width + dim))
                for number, layer_weight in enumerate(layers)
                for dim, weight in dims.items()
            ]
        ).sum()

    return over_prefixes
