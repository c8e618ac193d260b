"""The negatives are those of sentence-transformers' `mine_hard_negatives`, on the same embeddings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from vembed_ds.evaluation.search import search
from vembed_ds.mining.rules import Rules, Scored, choose
from vembed_ds.similarity import Embeddings

NUM_QUERIES, NUM_MORE, WIDTH = 40, 60, 8


class Vectors:
    """Unit vectors by text, in the place of a SentenceTransformer."""

    device = torch.device("cpu")
    model_card_data = SimpleNamespace(base_model="none")

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        query = generator.normal(size=(NUM_QUERIES, WIDTH))
        noise = generator.normal(size=(NUM_QUERIES, WIDTH))
        more = generator.normal(size=(NUM_MORE, WIDTH))
        self.query, self.positive, self.more = (
            (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
            for rows in (query, query + noise, more)
        )

    def of(self, texts: list[str]) -> np.ndarray[Any, Any]:
        sides = {"q": self.query, "p": self.positive, "m": self.more}
        return np.stack([sides[text[0]][int(text[1:])] for text in texts])

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray[Any, Any]:
        return self.of(texts)

    encode_document = encode_query

    @staticmethod
    def similarity(a: Any, b: Any) -> torch.Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    @staticmethod
    def similarity_pairwise(a: Any, b: Any) -> torch.Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(dim=-1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"relative_margin": None, "range_max": 20}, {}),
        ({"relative_margin": 0.05}, {"relative_margin": 0.05}),
        ({"relative_margin": 0.5, "range_min": 3}, {"relative_margin": 0.5}),
        ({"relative_margin": None, "margin": 0.2}, {"absolute_margin": 0.2}),
        (
            {"relative_margin": 0.05, "max_score": 0.5, "min_score": 0.1, "range_min": 1},
            {"relative_margin": 0.05, "max_score": 0.5, "min_score": 0.1},
        ),
    ],
)
def test_the_same_negatives(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    miner = pytest.importorskip("sentence_transformers.util.hard_negatives")
    vectors = Vectors()
    # All documents are candidates: theirs counts positives among range_max, where they are found.
    rules = Rules(num_negatives=4, **{"range_max": 99, **ours})
    texts = {side: [f"{side}{n}" for n in range(NUM_QUERIES)] for side in "qp"}
    found = miner.mine_hard_negatives(
        datasets.Dataset.from_dict({"query": texts["q"], "positive": texts["p"]}),
        vectors,
        corpus=[*texts["p"], *(f"m{n}" for n in range(NUM_MORE))],
        num_negatives=4,
        range_min=rules.range_min,
        range_max=rules.num_candidates,
        output_format="labeled-list",
        verbose=False,
        **theirs,
    )
    expected = {row: [] for row in texts["q"]}
    for row in found:
        labelled = zip(row["positive"], row["labels"], strict=True)
        expected[row["query"]] = [text for text, label in labelled if not label]
    corpus = [*texts["p"], *(f"m{n}" for n in range(NUM_MORE))]
    best = search(
        Embeddings(torch.from_numpy(vectors.query)),
        Embeddings(torch.from_numpy(vectors.of(corpus))),
        k=rules.num_candidates,
        chunk_size=16,
        ignored=[[n] for n in range(NUM_QUERIES)],
    )
    positive = torch.from_numpy((vectors.query * vectors.positive).sum(axis=1))
    chosen = choose(Scored(best.scores, positive), rules=rules, queries=range(NUM_QUERIES))
    mined = {
        f"q{n}": [corpus[best.rows[n, place]] for place in places if place >= 0]
        for n, places in enumerate(chosen.places.tolist())
    }
    assert mined == expected
    assert sum(map(len, mined.values())) > 60
