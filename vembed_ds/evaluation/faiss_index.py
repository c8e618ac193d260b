"""Nearest documents by an index of faiss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vembed_ds.errors import ConfigError, one_line
from vembed_ds.similarity import Embeddings


def check_faiss(index: str) -> None:
    """Refuse an index that faiss does not know.

    Raises:
        ConfigError: Or when faiss is not installed.
    """
    _made(_faiss(), index, width=64)


def nearest(
    query_emb: Embeddings, corpus_emb: Embeddings, *, k: int, index: str
) -> tuple[Tensor, Tensor]:
    """The most similar documents by cosine, on the host.

    Args:
        query_emb: Q single vectors.
        corpus_emb: C single vectors of the same width.
        k: Documents per query.
        index: For ``faiss.index_factory``; ``Flat`` compares with all documents.

    Returns:
        Cosine ``[Q, k]`` float32, best first, and columns ``[Q, k]`` int64; -1 where the index
        found no document.

    Raises:
        ConfigError: When the index cannot be trained with so few documents, or not for this width.
    """
    faiss = _faiss()
    found = _made(faiss, index, width=corpus_emb.width)
    documents = corpus_emb.float().normalized().values.cpu().numpy()
    try:
        if not found.is_trained:
            found.train(documents)
        found.add(documents)
    except RuntimeError as error:
        raise ConfigError(
            f"backend=faiss:{index}: cannot be built from {len(documents)} documents: "
            f"{one_line(error)}; choose a smaller index, or faiss"
        ) from error
    scores, columns = found.search(query_emb.float().normalized().values.cpu().numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(columns)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "backend=faiss: faiss is not installed; run pip install 'vembed-ds[faiss]', or choose "
            "backend exact"
        ) from error
    return faiss


def _made(faiss: Any, index: str, *, width: int) -> Any:
    try:
        return faiss.index_factory(width, index, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"backend=faiss:{index}: faiss cannot make this index: {one_line(error)}; choose "
            "another, such as HNSW32, or faiss for the exact one"
        ) from error
