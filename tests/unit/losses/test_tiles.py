"""Losses a tile at a time: the same numbers as in one piece, exact, and in less memory."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vembed_ds.config.distillation import DistillationConfig
from vembed_ds.config.schema import LossConfig
from vembed_ds.losses import (
    DIRECTIONS,
    DISTILLATION_LOSSES,
    Embeddings,
    Guide,
    LossFunction,
    LossInputs,
    TeacherScores,
    TeacherVectors,
    TileSize,
    build_loss,
)
from vembed_ds.losses.similarities import TILE_SIZE, TILE_SIZES, similarities, tile_size_of
from vembed_ds.losses.tiles import by_rows
from vembed_ds.similarity import similarity
from vembed_ds.training.loss_setup import build_losses

WIDTH = 8
T = {"temperature": 0.05}
GTE = {**T, "loss_directions": DIRECTIONS}
MRL = {"use_mrl": True, "mrl_dims": (8, 3)}

Case = tuple[str, dict[str, Any], str]
CASES: list[Case] = [
    ("infonce", T, ""),
    ("infonce", {**T, "loss_bidirectional": True}, ""),
    ("infonce", {**T, "loss_bidirectional": True}, "negatives labels learned"),
    ("infonce", {**GTE, "negatives_scope": "own", "mask_duplicates": True}, "negatives"),
    ("infonce", {**GTE, "guide_margin": 0.1}, "negatives labels guide"),
    ("infonce", {**GTE, "label_mode": "mask", **MRL}, "labels learned"),
    ("colbert", {**GTE, "maxsim_reduction": "sum"}, "tokens negatives learned"),
    ("sigmoid", {}, "negatives learned"),
    ("sigmoid", {"mask_duplicates": True}, "labels learned"),
    ("triplet", {"triplet_margin": 0.5}, "negatives"),
    ("triplet", {"triplet_margin": 0.5}, "tokens labels"),
    ("cosent", {"cosent_scale": 20.0}, "labels"),
    ("cosent", {"cosent_scale": 20.0}, "scores"),
    ("cosent", {"cosent_scale": 20.0}, "negatives"),
    ("in_batch_hard", {**T, "hard_mining_topk": 3}, "negatives learned"),
    ("in_batch_hard", {**T, "hard_mining_topk": 3, "use_all_negatives": True}, "labels"),
]
FOLLOWED: list[Case] = [
    *[(name, {}, "negatives") for name in DISTILLATION_LOSSES],
    *[(name, {}, "negatives known") for name in ("kl", "rank")],
    ("kl", MRL, "tokens"),
]


def name(case: Case) -> str:
    loss_type, options, given = case
    return f"{loss_type} {json.dumps(options)} {given}"


def inputs(
    num_pairs: int, given: str, *, dtype: torch.dtype = torch.float64, width: int = WIDTH
) -> LossInputs:
    """Pairs, with what is given by name; a seventh of them has one label, and one content."""
    generator = torch.Generator().manual_seed(0)
    tokens, number = "tokens" in given, torch.arange(num_pairs)

    def draw(count: int) -> Tensor:
        return torch.randn((count, 3, width) if tokens else (count, width), generator=generator)

    def items(values: Tensor) -> Embeddings:
        mask = None
        if tokens:
            mask = torch.rand(values.shape[:2], generator=generator) > 0.3
            mask[:, 0] = True
            values[~mask] = torch.nan
        # float32 first: what is given is the same in both types.
        return Embeddings(values.to(dtype).requires_grad_(), mask)

    query = draw(num_pairs)
    positive = query * 0.5 + draw(num_pairs)
    counts = number % 3
    given_negatives = "negatives" in given
    found = LossInputs(
        items(query.clone()),
        items(positive),
        negative=items(draw(int(counts.sum()))) if given_negatives else None,
        negative_counts=counts if given_negatives else None,
        labels=number % 7 if "labels" in given else None,
        scores=(number % 5).double() if "scores" in given else None,
        query_keys=number % 7,
        positive_keys=number % 7,
        negative_keys=torch.arange(int(counts.sum())) if given_negatives else None,
        logit_scale=torch.tensor([3.0], dtype=dtype, requires_grad=True),
        logit_bias=torch.tensor([-2.0], dtype=dtype, requires_grad=True),
    )
    if "learned" not in given:
        found = replace(found, logit_scale=None, logit_bias=None)
    if "guide" in given:
        assert found.negative is not None
        roles = (found.query, found.positive, found.negative)
        vectors = [torch.randn(len(role), 5, generator=generator).to(dtype) for role in roles]
        found = replace(found, guide=Guide(*vectors))
    return found


def taught(found: LossInputs, *, known: bool) -> LossInputs:
    """The same pairs, with what a teacher says of them."""
    roles = (found.query, found.positive, found.negative)
    if known:
        assert found.negative is not None
        scores = [torch.linspace(0, 1, len(role)).double() for role in roles[1:] if role]
        return replace(found, teachers=(TeacherScores(*scores),))
    said = [role and Embeddings(role.values.detach().cos(), role.mask) for role in roles]
    query, positive, negative = said
    assert query is not None
    assert positive is not None
    return replace(found, teachers=(TeacherVectors(query, positive, negative),))


def loss_of(case: Case, tile_size: TileSize) -> LossFunction:
    loss_type, options, _ = case
    if loss_type not in DISTILLATION_LOSSES:
        return build_loss(loss_type, tile_size=tile_size, **options)
    config = LossConfig.model_validate(options)
    followed = {"teachers": [{"model_name": "a"}], "distillation_loss_type": loss_type}
    (loss,) = build_losses(
        [config],
        DistillationConfig.model_validate({**followed, "distillation_alpha": 0.1}),
        num_steps=1,
        tile_size=tile_size,
    )
    return loss


def given_to(case: Case, num_pairs: int, **kwargs: Any) -> LossInputs:
    loss_type, _, given = case
    found = inputs(num_pairs, given, **kwargs)
    return taught(found, known="known" in given) if loss_type in DISTILLATION_LOSSES else found


def run(loss: LossFunction, given: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients, in float64."""
    roles = {"query": given.query, "positive": given.positive, "negative": given.negative}
    leaves = {role: items.values for role, items in roles.items() if items is not None}
    learned = {"scale": given.logit_scale, "bias": given.logit_bias}
    leaves |= {name: value for name, value in learned.items() if value is not None}
    value = loss(given)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    grads = {
        name: grad.double() for name, grad in zip(leaves, found, strict=True) if grad is not None
    }
    return value.detach().double(), grads


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tile_size", [1, 8])
@pytest.mark.parametrize("case", [*CASES, *FOLLOWED], ids=name)
def test_tiles_are_the_loss_in_one_piece(case: Case, tile_size: int) -> None:
    given = given_to(case, 11)  # tiles that do not divide it, of tokens 2 x 3
    (value, grads), (whole, wanted) = (
        run(loss_of(case, size), given) for size in (tile_size, None)
    )
    assert value.item() == pytest.approx(whole.item(), rel=1e-12)
    assert set(grads) == set(wanted)
    for role, grad in grads.items():
        torch.testing.assert_close(grad, wanted[role], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", [*CASES, *FOLLOWED], ids=name)
def test_float32_is_the_formula_in_float64(case: Case) -> None:
    value, grads = run(loss_of(case, 16), given_to(case, 50, dtype=torch.float32))
    exact = given_to(case, 50)
    whole, wanted = run(loss_of(case, None), exact)
    assert value.item() == pytest.approx(whole.item(), rel=2e-7)
    for role, grad in grads.items():
        # Rounding makes logits of 20 wrong by 1e-6, in one piece as well.
        assert distance(grad, wanted[role]) < 2e-6


def closest(given: LossInputs, share: float) -> LossInputs:
    """The same, with positives that are their queries but for a share of themselves."""
    near = given.query.values + share * given.positive.values
    return replace(given, positive=Embeddings(near.detach().requires_grad_(), given.positive.mask))


@pytest.mark.parametrize(("temperature", "size"), [(0.07, 2e-4), (0.03, 3e-10)])
@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("infonce", {}),
        ("infonce", {"loss_bidirectional": True}),
        ("in_batch_hard", {"hard_mining_topk": 3}),
    ],
)
def test_a_small_loss_has_all_its_digits(
    loss_type: str, options: dict[str, Any], temperature: float, size: float
) -> None:
    """A positive that is not of the same product as the others costs 1 % of the gradient here."""
    loss = build_loss(loss_type, tile_size=16, temperature=temperature, **options)
    near = closest(inputs(40, "", dtype=torch.float32, width=64), 0.05)
    value, grads = run(loss, near)
    leaves = [e.values.detach().double().requires_grad_() for e in (near.query, near.positive)]
    query, positive = (leaf / leaf.norm(dim=1, keepdim=True) for leaf in leaves)
    logits = query @ positive.T / temperature
    directions = [logits, logits.T] if "loss_bidirectional" in options else [logits]
    kept = options.get("hard_mining_topk", 39)
    exact = torch.stack([beside_the_positive(z, kept) for z in directions]).mean()
    assert size / 10 < exact < size
    # Logits of 14 and 33 with a rounding of 1e-6: of that, a small loss is a multiple.
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    for grad, wanted in zip(grads.values(), torch.autograd.grad(exact, leaves), strict=True):
        assert distance(grad, wanted) < 1e-5


def beside_the_positive(logits: Tensor, kept: int) -> Tensor:
    """The mean of ``log(1 + sum_c exp(z_ic - z_ii))`` over the largest of every row."""
    margins = logits - logits.diagonal().unsqueeze(1)
    others = margins.masked_fill(torch.eye(len(logits)) > 0, -torch.inf)
    return others.topk(kept, dim=1).values.exp().sum(dim=1).log1p().mean()


@pytest.mark.parametrize("label_mode", ["multi_positive", "ignore"])
@pytest.mark.parametrize("tile_size", [None, 3])
def test_the_lowest_temperature_overflows_nowhere(tile_size: int | None, label_mode: str) -> None:
    """Logits of 10,000, beyond any exponential; cosines in quarters, which float32 has exactly."""
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1], [-1, 1, -1, -1]])
    query = signs.repeat(2, 1).float().requires_grad_()
    positive = signs.flip(0).repeat(2, 1).float().requires_grad_()
    labels = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5])
    loss = build_loss(
        "infonce",
        temperature=1e-4,
        loss_bidirectional=True,
        label_mode=label_mode,
        tile_size=tile_size,
    )
    given = LossInputs(Embeddings(query), Embeddings(positive), labels=labels)
    value, grads = run(loss, given)
    cosines = (query @ positive.T / 4).double()
    same = torch.eye(8).double()
    if label_mode == "multi_positive":
        same = (labels == labels[:, None]).double()
    wanted = torch.zeros(()).double()
    for logits in (cosines * 1e4, cosines.T * 1e4):
        rows = logits.logsumexp(1) - (logits * same).sum(1) / same.sum(1)
        wanted = wanted + rows.mean() / 2
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert value > 1000
    expected = torch.autograd.grad(wanted, [query, positive])
    for grad, exact in zip(grads.values(), expected, strict=True):
        # The dot product's gradient, of which the cosine's has the part across.
        unit = query.detach() / 2 if grad is grads["query"] else positive.detach() / 2
        across = exact - (exact * unit).sum(1, keepdim=True) * unit
        torch.testing.assert_close(grad, across.double(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("tokens", ["", "tokens"])
def test_lengths_have_the_gradient_of_pytorchs_division(tokens: str) -> None:
    """Also of a vector of zeros, and of tokens behind padding that is not a number."""
    given = inputs(9, tokens)
    with torch.no_grad():
        given.query.values[2] = 0
    weights = torch.randn(9, 9, generator=torch.Generator().manual_seed(1)).double()
    scale = torch.tensor([3.0]).double().requires_grad_()
    leaves = [given.query.values, given.positive.values, scale]
    plain = (scale * similarity(given.query, given.positive) * weights).sum()
    compared = similarities(given.query, given.positive, tile_size=2)
    ours = by_rows(
        compared, lambda rows, logits: (logits * weights[rows]).sum(dim=1), scale=scale
    ).sum()
    torch.testing.assert_close(ours, plain)
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True)
    for found, wanted in pairs:
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[9]], ids=name)
def test_autocast_rounds_nothing(case: Case) -> None:
    """It would do so in the pass that runs under it, and not in the other."""
    given = given_to(case, 11, dtype=torch.float32)
    value, grads = run(loss_of(case, 4), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, found = run(loss_of(case, 4), given)
    assert torch.equal(value, rounded)
    assert all(torch.equal(grad, found[role]) for role, grad in grads.items())


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.untyped_storage().nbytes() // value.itemsize)
        return found


@pytest.mark.parametrize("case", [*CASES, *FOLLOWED], ids=name)
@pytest.mark.one_in(5)
def test_no_tensor_grows_with_the_square_of_the_batch(case: Case) -> None:
    def largest(num_pairs: int, tile_size: int | None) -> int:
        given, loss = given_to(case, num_pairs), loss_of(case, tile_size)
        with Largest() as seen:
            run(loss, given)
        return seen.numbers

    small, large = 42, 84  # whose squares are more than all of their items' numbers
    tile_size = 24 if "tokens" in case[2] else 8
    assert largest(large, tile_size) <= 2 * largest(small, tile_size)
    if case[0] != "regression" and "scores" not in case[2]:
        assert largest(large, None) >= large**2


def test_the_configuration_decides_the_tiles() -> None:
    def tiles_of(**options: Any) -> int:
        (loss,) = build_losses([LossConfig()], DistillationConfig(), num_steps=1, **options)
        given = inputs(600, "")
        with Largest() as seen:
            loss(given)
        return seen.numbers

    assert tiles_of(tile_size=None) == 600 * 600
    assert tiles_of(tile_size=100) == 100 * 100
    assert tiles_of() == tiles_of(tile_size="auto") == TILE_SIZES["cpu"] ** 2
    assert tile_size_of(torch.device("meta")) == TILE_SIZE


def test_the_tokens_of_a_tile_count() -> None:
    given = inputs(40, "tokens")
    compared = similarities(given.query, given.positive, tile_size=12)
    assert compared.cut() == (4, 4)  # of 3 x 3 tokens each: 144 similarities
    assert replace(compared, tile_size=None).cut() == (40, 40)
    assert replace(compared, tile_size=1).cut() == (1, 1)
