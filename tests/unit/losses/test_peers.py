"""The value of other libraries' losses on the same tensors; they are given embeddings, no model."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as peers
from sentence_transformers.util import cos_sim, pairwise_cos_sim
from torch import Tensor, nn
from torch.nn import functional

from vembed_ds.losses import (
    Distillation,
    Embeddings,
    Guide,
    LossInputs,
    TeacherScores,
    TeacherVectors,
    build_loss,
)

B, D = 6, 8
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


class GivenEmbeddings(nn.Module):
    """A "model" whose features already are what a peer asks of it."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return D


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


QUERY, POSITIVE, NEGATIVES = draw(B, D, seed=0), draw(B, D, seed=1), draw(B, 2, D, seed=2)


def ours(loss_type: str, options: dict[str, Any], *, per_query: int = 0, **more: Any) -> float:
    """The project's loss; the first ``per_query`` negatives of each query."""
    explicit = {}
    if per_query:
        explicit = {
            "negative": Embeddings(NEGATIVES[:, :per_query].reshape(-1, D)),
            "negative_counts": torch.full((B,), per_query),
        }
    inputs = LossInputs(Embeddings(QUERY), Embeddings(POSITIVE), **explicit, **more)
    return float(build_loss(loss_type, **options)(inputs).detach())


def columns(per_query: int) -> list[Tensor]:
    return [QUERY, POSITIVE, *(NEGATIVES[:, k] for k in range(per_query))]


def features(per_query: int) -> list[dict[str, Tensor]]:
    return [{"sentence_embedding": column.clone()} for column in columns(per_query)]


@pytest.mark.parametrize("per_query", [0, 1, 2])
@pytest.mark.parametrize(
    ("directions", "partition"),
    [
        (ALL[:1], "joint"),
        (("query_to_doc", "doc_to_query"), "joint"),
        (("query_to_doc", "doc_to_query"), "per_direction"),
        (("query_to_doc", "query_to_query"), "joint"),
        (("query_to_doc", "doc_to_doc"), "joint"),
        (ALL, "joint"),
    ],
)
def test_infonce_is_multiple_negatives_ranking(
    directions: tuple[str, ...], partition: str, per_query: int
) -> None:
    peer = peers.MultipleNegativesRankingLoss(
        GivenEmbeddings(), scale=20.0, directions=directions, partition_mode=partition
    )
    options = {"temperature": 0.05, "loss_directions": directions, "loss_partition": partition}
    expected = peer.compute_loss_from_embeddings(columns(per_query), torch.zeros(B))
    assert ours("infonce", options, per_query=per_query) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("per_query", [0, 1])
@pytest.mark.parametrize(
    ("kind", "margin"), [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.5)]
)
@pytest.mark.parametrize("own_kind", [False, True])
def test_the_guide_is_gist_embed(own_kind: bool, kind: str, margin: float, per_query: int) -> None:
    guide = [draw(B, 3, seed=10 + place) for place in range(2 + per_query)]
    peer = gist(guide, temperature=0.05, margin_strategy=kind, margin=margin, own_kind=own_kind)
    directions = ("query_to_doc", "query_to_query", "doc_to_doc") if own_kind else ALL[:1]
    if own_kind and per_query:
        # GISTEmbedLoss leaves the explicit negatives out of doc_to_doc, where we have them.
        directions = ("query_to_doc", "query_to_query")
        peer.contrast_positives = False
    options = {
        "temperature": 0.05,
        "loss_directions": directions,
        "guide_margin": margin,
        "guide_margin_type": kind,
    }
    found = ours("infonce", options, per_query=per_query, guide=Guide(*guide))
    expected = float(peer(features(per_query), torch.zeros(B)))
    assert found == pytest.approx(expected, rel=1e-6)
    unguided = ours("infonce", {**options, "guide_margin": 2.0}, per_query=per_query)
    assert abs(found - unguided) > 1e-3


def gist(guide: list[Tensor], *, temperature: float, own_kind: bool, **options: Any) -> nn.Module:
    """GISTEmbedLoss without its constructor, which wants tokenizers."""
    peer = peers.GISTEmbedLoss.__new__(peers.GISTEmbedLoss)
    nn.Module.__init__(peer)
    rows = iter(guide)
    peer.model, peer.temperature = GivenEmbeddings(), temperature
    peer.guide = lambda features: {"sentence_embedding": next(rows)}
    peer.contrast_anchors = peer.contrast_positives = own_kind
    peer.must_retokenize = peer.gather_across_devices = False
    peer.similarity_fct = nn.CosineSimilarity(dim=-1)
    peer.cross_entropy_loss = nn.CrossEntropyLoss()
    for key, value in options.items():
        setattr(peer, key, value)
    return peer


def test_graded_cosent_is_cosent_loss() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.0, 1.0])
    peer = peers.CoSENTLoss(GivenEmbeddings(), scale=20.0)
    expected = peer.compute_loss_from_embeddings([QUERY, POSITIVE], scores)
    found = ours("cosent", {"cosent_scale": 20.0}, scores=scores)
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_triplet_with_one_negative_is_triplet_loss() -> None:
    peer = peers.TripletLoss(
        GivenEmbeddings(), peers.TripletDistanceMetric.COSINE, triplet_margin=0.5
    )
    expected = peer.compute_loss_from_embeddings(columns(1), torch.zeros(B))
    found = ours("triplet", {"triplet_margin": 0.5}, per_query=1)
    assert found == pytest.approx(float(expected), rel=1e-6)


SCORES = draw(B, 3, seed=3)  # a teacher's, of a positive and two negatives


def follow(
    name: str,
    teacher: TeacherVectors | TeacherScores,
    *,
    projections: dict[int, Tensor] | None = None,
    **options: Any,
) -> float:
    """Distillation alone, with two negatives of each query."""
    distillation = Distillation(name, weights=(1.0,), alpha=lambda step: 0.0, **options)
    return ours(
        "triplet",
        {"triplet_margin": 0.5, "distillation": distillation},
        per_query=2,
        teachers=(teacher,),
        projections=projections or {},
    )


STORED = TeacherScores(SCORES[:, 0], SCORES[:, 1:].flatten())


def test_kl_of_scores_is_distill_kl_div_loss() -> None:
    peer = peers.DistillKLDivLoss(
        GivenEmbeddings(), pairwise_cos_sim, student_temperature=0.3, teacher_temperature=0.7
    )
    expected = peer.compute_loss_from_embeddings(columns(2), SCORES)
    found = follow("kl", STORED, temperature=0.3, teacher_temperatures=(0.7,))
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_margin_mse_of_scores_is_margin_mse_loss() -> None:
    peer = peers.MarginMSELoss(GivenEmbeddings(), pairwise_cos_sim)
    expected = peer.compute_loss_from_embeddings(columns(2), SCORES)
    assert follow("margin_mse", STORED) == pytest.approx(float(expected), rel=1e-6)


def test_rank_is_cosent_loss_of_every_query() -> None:
    peer = peers.CoSENTLoss(GivenEmbeddings(), scale=20.0)
    documents = torch.cat([POSITIVE.unsqueeze(1), NEGATIVES], dim=1)
    rows = [
        peer.compute_loss_from_embeddings([query.expand(3, -1), own], scores)
        for query, own, scores in zip(QUERY, documents, SCORES, strict=True)
    ]
    expected = torch.stack(rows).mean()
    assert follow("rank", STORED, scale=20.0) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("width", [D, 5])
def test_regression_is_twice_the_cosine_embed_distill_loss(width: int) -> None:
    targets = [draw(B, width, seed=40 + place) for place in range(4)]  # of the four columns
    peer = peers.EmbedDistillLoss(GivenEmbeddings(), distance_metric="cosine")
    projections = {}
    if width != D:
        peer.projection = nn.Linear(D, width, bias=False)
        projections[0] = peer.projection.weight
    expected = peer.compute_loss_from_embeddings(columns(2), targets)
    negative = torch.stack(targets[2:], dim=1).flatten(0, 1)
    teacher = TeacherVectors(*map(Embeddings, (*targets[:2], negative)))
    found = follow("regression", teacher, projections=projections)
    assert found == pytest.approx(2 * float(expected.detach()), rel=1e-6)


def test_matryoshka_is_matryoshka_loss() -> None:
    model = GivenEmbeddings()
    inner = peers.MultipleNegativesRankingLoss(model, scale=20.0)
    peer = peers.MatryoshkaLoss(model, inner, [2, 8, 4], [0.5, 1.0, 2.0])
    options = {"use_mrl": True, "mrl_dims": (2, 8, 4), "mrl_weights": (0.5, 1.0, 2.0)}
    found = ours("infonce", {"temperature": 0.05, **options}, per_query=2)
    assert found == pytest.approx(float(peer(features(2), torch.zeros(B))), rel=1e-6)


def test_sigmoid_is_the_loss_of_transformers_siglip() -> None:
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 1}
    config = SiglipConfig(
        text_config={**small, "vocab_size": 16},
        vision_config={**small, "image_size": 8, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    scale, bias = torch.tensor([1.3]), torch.tensor([-2.0])
    with torch.no_grad():
        model.logit_scale.copy_(scale)
        model.logit_bias.copy_(bias)
        output = model(
            input_ids=torch.randint(0, 16, (B, 5)),
            pixel_values=torch.randn(B, 3, 8, 8),
            return_loss=True,
        )
    inputs = LossInputs(
        Embeddings(output.text_embeds),
        Embeddings(output.image_embeds),
        logit_scale=scale,
        logit_bias=bias,
    )
    assert float(build_loss("sigmoid")(inputs)) == pytest.approx(float(output.loss), rel=1e-6)


def padded_tokens(number: int, longest: int, *, seed: int) -> Embeddings:
    lengths = torch.arange(number) % longest + 1
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    return Embeddings(draw(number, longest, D, seed=seed), mask)


def unit(tokens: Embeddings) -> Tensor:
    """Token vectors of length 1, padding 0."""
    assert tokens.mask is not None
    return functional.normalize(tokens.values, dim=-1) * tokens.mask.unsqueeze(-1)


TOKENS = [padded_tokens(B, longest, seed=20 + longest) for longest in (4, 5, 3)]


def late(items: list[Embeddings], options: dict[str, Any]) -> float:
    """ColBERT's loss of queries, positives and, if there is a third, one negative per query."""
    query, positive, *negative = items
    explicit = {}
    if negative:
        explicit = {"negative": negative[0], "negative_counts": torch.ones(B, dtype=torch.int64)}
    return float(build_loss("colbert", **options)(LossInputs(query, positive, **explicit)))


@pytest.mark.parametrize("negatives", [False, True])
def test_summed_colbert_is_the_multi_vector_loss_of_sentence_transformers(negatives: bool) -> None:
    from sentence_transformers.multi_vector_encoder.losses import (
        MultiVectorMultipleNegativesRankingLoss,
    )

    class Model(nn.Module):
        def forward(self, features: dict[str, Any], task: str) -> dict[str, Tensor]:
            return features["given"]

    given = [
        {"given": {"token_embeddings": unit(t), "attention_mask": t.mask}}
        for t in TOKENS[: 2 + negatives]
    ]
    peer = MultiVectorMultipleNegativesRankingLoss(Model(), scale=2.0)
    found = late(TOKENS[: 2 + negatives], {"temperature": 0.5, "maxsim_reduction": "sum"})
    assert found == pytest.approx(float(peer(given)), rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("pylate") is None, reason="pylate is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("negatives", [False, True])
def test_summed_colbert_is_pylates_contrastive_loss(negatives: bool) -> None:
    losses = pytest.importorskip("pylate.losses")

    class Model(GivenEmbeddings):
        skiplist: tuple[int, ...] = ()
        do_query_expansion = False

    # Theirs multiplies similarities by the mask, so that a document's padding wins at 0 where all
    # real tokens are negative: only documents without padding are comparable.
    query, documents = TOKENS[0], [unpadded(seed=seed) for seed in (30, 31)][: 1 + negatives]
    given = [
        {
            "token_embeddings": t.padded(tokens=5).values,
            "attention_mask": t.padded(tokens=5).mask,
            "input_ids": torch.ones(B, 5, dtype=torch.int64),
        }
        for t in (query, *documents)
    ]
    peer = losses.Contrastive(Model(), temperature=0.5)
    found = late([query, *documents], {"temperature": 0.5, "maxsim_reduction": "sum"})
    assert found == pytest.approx(float(peer(given)), rel=1e-5)


def unpadded(*, seed: int) -> Embeddings:
    return Embeddings(draw(B, 5, D, seed=seed), torch.ones(B, 5, dtype=torch.bool))


@pytest.fixture
def colpali() -> Iterator[types.ModuleType]:
    """colpali-engine's losses, without its ``__init__``, which wants torchvision."""
    found = importlib.util.find_spec("colpali_engine")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("colpali-engine is not installed")
    package = types.ModuleType("colpali_engine")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["colpali_engine"] = package
    yield importlib.import_module("colpali_engine.loss.late_interaction_losses")
    for name in [name for name in sys.modules if name.split(".")[0] == "colpali_engine"]:
        del sys.modules[name]


@pytest.mark.parametrize("normalize", [False, True])
def test_colbert_is_colpalis_loss(colpali: types.ModuleType, normalize: bool) -> None:
    # Theirs takes zeros for padding, as pylate does.
    query, positive = TOKENS[0], unpadded(seed=30)
    peer = colpali.ColbertLoss(temperature=0.5, normalize_scores=normalize)
    expected = float(peer(unit(query), unit(positive)))
    options = {"temperature": 0.5, "maxsim_reduction": "mean" if normalize else "sum"}
    found = late([query, positive], options)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_peers_cosine_is_ours() -> None:
    from vembed_ds.similarity import similarity

    found = similarity(Embeddings(QUERY), Embeddings(POSITIVE))
    torch.testing.assert_close(found, cos_sim(QUERY, POSITIVE))
