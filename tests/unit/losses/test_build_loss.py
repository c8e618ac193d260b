"""What is refused before anything is computed, and what a loss says it ignores."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from vembed_ds.config.loss_rules import MULTI_POSITIVE, ONLY_WITH
from vembed_ds.config.schema import LossConfig
from vembed_ds.errors import ConfigError
from vembed_ds.losses import (
    LOSSES,
    MATRYOSHKA_OPTIONS,
    Embeddings,
    Guide,
    LossInputs,
    build_loss,
    check_mrl_dims,
    ignored_data,
)
from vembed_ds.training.loss_setup import build_losses


def vectors(number: int, width: int = 4) -> Embeddings:
    return Embeddings(torch.randn(number, width))


def test_an_unknown_loss_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"loss_type='nce': no such loss; choose one of colbert"):
        build_loss("nce")


def test_an_option_of_another_loss_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"triplet_margin=0.5: infonce does not use it"):
        build_loss("infonce", temperature=0.1, triplet_margin=0.5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"positive": vectors(3)}, "2 queries and 3 positives; expected as many"),
        ({"negative": vectors(1)}, "explicit negatives without negative_counts"),
        (
            {"negative": vectors(1), "negative_counts": torch.tensor([1, 1])},
            "1 explicit negatives, but negative_counts sum to 2",
        ),
        ({"positive": vectors(2, 5)}, r"\(2, 4\) and \(2, 5\) cannot be compared"),
        (
            {
                "guide": Guide(torch.ones(2, 3), torch.ones(2, 3)),
                "negative": vectors(2),
                "negative_counts": torch.tensor([1, 1]),
            },
            "the guide needs vectors of all queries and documents",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs: dict[str, Any], message: str) -> None:
    given = LossInputs(**{"query": vectors(2), "positive": vectors(2), **inputs})
    with pytest.raises(ValueError, match=message):
        build_loss("infonce", temperature=0.1)(given)


@pytest.mark.parametrize(
    ("loss_type", "options", "message"),
    [
        ("colbert", {"temperature": 0.1}, r"token embeddings \[n, L, D\], but .* \(2, 4\)"),
        ("sigmoid", {}, "needs logit_scale and logit_bias of the model"),
        ("infonce", {"temperature": 0.1, "mask_duplicates": True}, "needs the content keys"),
    ],
)
def test_a_loss_says_what_it_misses(loss_type: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss(loss_type, **options)(LossInputs(vectors(2), vectors(2)))


def test_dimensions_that_the_model_lacks_are_refused() -> None:
    message = (
        r"mrl_dims=\[8, 6, 2\]: 8 is wider than the model's embeddings, which have 4 dimensions; "
        "remove what is above 4"
    )
    with pytest.raises(ConfigError, match=message):
        check_mrl_dims((8, 6, 2), width=4)
    loss = build_loss("infonce", temperature=0.1, use_mrl=True, mrl_dims=(8, 6, 2))
    with pytest.raises(ConfigError, match=message):
        loss(LossInputs(vectors(2), vectors(2)))


def test_layers_must_divide_the_width() -> None:
    loss = build_loss("infonce", temperature=0.1, use_mrl=True, mrl_dims=(1,), mrl_layers=(1, 2, 3))
    with pytest.raises(ValueError, match="4 dimensions are not 3 equal layers"):
        loss(LossInputs(vectors(2), vectors(2)))


@pytest.mark.parametrize(
    ("loss_type", "given", "ignored"),
    [
        ("infonce", ["labels", "negatives", "guide"], []),
        ("infonce", ["labels", "scores"], ["scores"]),
        ("triplet", ["guide", "negatives", "scores"], ["guide", "scores"]),
        ("cosent", ["labels", "negatives"], []),
        ("cosent", ["labels", "negatives", "scores"], ["labels", "negatives"]),
        ("colbert", ["guide"], []),
        ("sigmoid", ["scores", "labels"], ["scores"]),
        ("hard_negative", ["guide"], ["guide"]),
    ],
)
def test_data_that_a_loss_would_ignore(
    loss_type: str, given: list[str], ignored: list[str]
) -> None:
    assert ignored_data(loss_type, given) == ignored


def test_the_configuration_knows_the_losses_and_their_options() -> None:
    fields = LossConfig.model_fields
    assert set(get_args(fields["loss_type"].annotation)) == set(LOSSES)
    of_the_model = {"learnable_temperature", "guide_model_name"}
    of_the_model |= {"init_logit_scale", "init_logit_bias"}
    read = MATRYOSHKA_OPTIONS | {"loss_type"} | of_the_model
    assert set(fields) == read.union(*(spec.options for spec in LOSSES.values()))
    for key, losses in ONLY_WITH.items():
        if key not in of_the_model:
            # Accepted with sigmoid, which is the same in both directions.
            symmetric = {"sigmoid"} if key == "loss_bidirectional" else set()
            reading = {name for name, spec in LOSSES.items() if key in spec.options}
            assert set(losses) == reading | symmetric
    guided = {name for name, spec in LOSSES.items() if "guide" in spec.uses}
    assert set(ONLY_WITH["guide_model_name"]) == guided
    several = {name for name, spec in LOSSES.items() if "multi_positive" in spec.label_modes}
    assert set(MULTI_POSITIVE) == several


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_built_from_the_defaults_of_the_configuration(loss_type: str) -> None:
    config = LossConfig.model_validate({"loss_type": loss_type})
    tokens = Embeddings(torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    learned = {"logit_scale": torch.tensor([2.0]), "logit_bias": torch.tensor([-10.0])}
    (loss,) = build_losses([config])
    assert loss(LossInputs(tokens, tokens.rows([1, 0]), **learned)) > 0
