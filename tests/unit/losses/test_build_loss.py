"""What is refused before anything is computed, and what a loss says it ignores."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from vembed_ds.config.distillation import DistillationConfig
from vembed_ds.config.loss_rules import MULTI_POSITIVE, ONLY_WITH
from vembed_ds.config.schema import LossConfig
from vembed_ds.errors import ConfigError
from vembed_ds.losses import (
    LOSSES,
    MATRYOSHKA_OPTIONS,
    Embeddings,
    Guide,
    LossInputs,
    TeacherScores,
    TeacherVectors,
    build_loss,
    check_mrl_dims,
    ignored_data,
)
from vembed_ds.training.loss_setup import build_losses, learned_scalars


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
    of_the_model |= {"guide_query_instruction", "guide_document_instruction"}
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
    (loss,) = build_losses([config], DistillationConfig(), num_steps=1)
    assert loss(LossInputs(tokens, tokens.rows([1, 0]), **learned)) > 0


# Option: settings it needs to act, and a value that is not its default.
CHANGED: dict[str, tuple[dict[str, Any], Any]] = {
    "temperature": ({}, 0.5),
    "loss_bidirectional": ({}, True),
    "loss_directions": ({}, ["query_to_doc", "query_to_query"]),
    "loss_partition": ({"loss_directions": ["query_to_doc", "doc_to_query"]}, "per_direction"),
    "negatives_scope": ({}, "own"),
    "label_mode": ({}, "ignore"),
    "mask_duplicates": ({}, True),
    "guide_margin": ({}, 0.4),
    "guide_margin_type": ({"guide_margin": 0.4}, "relative"),
    "maxsim_reduction": ({}, "sum"),
    "triplet_margin": ({}, 0.1),
    "cosent_scale": ({}, 5.0),
    "hard_mining_topk": ({}, 2),
    "use_all_negatives": ({"hard_mining_topk": 2}, True),
    "use_mrl": ({"mrl_dims": [8, 4]}, True),
    "mrl_dims": ({"mrl_dims": [8, 4], "use_mrl": True}, [8, 2]),
    "mrl_weights": ({"mrl_dims": [8, 4], "use_mrl": True}, [0.5, 1.0]),
    "mrl_layers": ({"mrl_dims": [4], "use_mrl": True}, [1, 2]),
    "mrl_layer_weights": ({"mrl_dims": [4], "use_mrl": True, "mrl_layers": [1, 2]}, [0.5, 1.0]),
}


def full_inputs(*, tokens: bool, guided: bool, learned: bool) -> LossInputs:
    """Every field; rows 0, 2 and 5, and rows 1 and 4 have one label."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 8) if tokens else (8,)
    query, positive, negative = (torch.randn(6, *shape, generator=generator) for _ in range(3))
    positive[4] = query[1] + 0.2 * positive[4]  # the hardest of row 1, and of its label
    negative[1] = query[0] + 0.2 * negative[1]  # the hardest of row 0, and the same as its positive
    guide = Guide(*(torch.randn(6, 3, generator=generator) for _ in range(3)))
    mask = torch.ones(6, 3, dtype=torch.bool) if tokens else None
    return LossInputs(
        *(Embeddings(rows, mask) for rows in (query, positive, negative)),
        negative_counts=torch.tensor([2, 0, 2, 1, 0, 1]),
        labels=torch.tensor([0, 1, 0, 2, 1, 0]),
        query_keys=torch.arange(6),
        positive_keys=torch.tensor([11, 12, 13, 14, 12, 16]),
        negative_keys=torch.tensor([21, 11, 22, 23, 24, 25]),
        guide=guide if guided else None,
        logit_scale=torch.tensor([1.0]) if learned else None,
        logit_bias=torch.tensor([-2.0]) if learned else None,
    )


@pytest.mark.parametrize(
    ("loss_type", "option"),
    [
        (name, option)
        for name, spec in LOSSES.items()
        for option in sorted(spec.options | MATRYOSHKA_OPTIONS)
    ],
)
def test_every_key_of_a_loss_reaches_it(loss_type: str, option: str) -> None:
    needed, value = CHANGED[option]
    configs = [
        LossConfig.model_validate({"loss_type": loss_type, **needed, **changed})
        for changed in ({}, {option: value})
    ]
    inputs = full_inputs(
        tokens=loss_type == "colbert",
        guided=option.startswith("guide"),
        learned=loss_type == "sigmoid",
    )
    losses = build_losses(configs, DistillationConfig(), num_steps=1)
    before, after = (float(loss(inputs)) for loss in losses)
    assert abs(before - after) > 1e-3


# Keys of the teachers themselves; what they say goes into the loss.
OF_THE_TEACHERS = {"teacher_model_name", "teacher_ema_decay", "teacher_scores", "teacher_mode"}
OF_THE_TEACHERS |= {"teacher_cache", "teacher_ds_config", "teacher_precision"}
OF_THE_TEACHERS |= {"teacher_trust_remote_code"}
OF_THE_TEACHERS |= {"teacher_query_instruction", "teacher_document_instruction"}

TWO = [{"model_name": "a"}, {"scores": True}]
# Key: the loss it belongs to, settings it needs, and a value that is not its default.
FOLLOWED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "distillation_loss_type": ("kl", {}, "mse"),
    "distillation_alpha": ("kl", {}, 0.2),
    "distillation_alpha_end": (
        "kl",
        {"distillation_alpha_schedule": "linear", "distillation_alpha_end": 0.5},
        0.1,
    ),
    "distillation_alpha_schedule": ("kl", {"distillation_alpha_end": 0.1}, "cosine"),
    "distillation_temperature": ("kl", {}, 0.2),
    "teacher_temperature": ("kl", {}, 0.2),
    "distillation_scale": ("rank", {}, 2.0),
    "teachers": ("mse", {}, [{**TWO[0], "weight": 3.0}, TWO[1]]),
}


@pytest.mark.parametrize("key", sorted(set(DistillationConfig.model_fields) - OF_THE_TEACHERS))
def test_every_key_of_distillation_reaches_its_loss(key: str) -> None:
    loss_type, needed, value = FOLLOWED[key]
    settings = {"distillation_loss_type": loss_type, "teachers": TWO, **needed}
    before, after = (
        build_losses(
            [LossConfig()], DistillationConfig.model_validate({**settings, **changed}), num_steps=9
        )[0]
        for changed in ({}, {key: value})
    )
    inputs = replace(full_inputs(tokens=False, guided=False, learned=False), step=2)
    assert inputs.negative is not None
    given = (inputs.positive, inputs.query, inputs.negative)
    teachers = (TeacherVectors(*given), TeacherScores(torch.linspace(0, 1, 6), torch.ones(6)))
    inputs = replace(inputs, teachers=teachers)
    assert abs(float(before(inputs)) - float(after(inputs))) > 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mrl_dims", [8, 2]),
        ("mrl_weights", [0.5, 1.0]),
        ("mrl_layers", [1, 2]),
        ("maxsim_reduction", "sum"),
    ],
)
def test_the_tasks_prefixes_and_reduction_are_those_of_distillation(key: str, value: Any) -> None:
    settings = {"loss_type": "colbert", "use_mrl": True, "mrl_dims": [4, 2]}
    followed = DistillationConfig.model_validate(
        {"teachers": TWO[:1], "distillation_alpha": 0.0, "distillation_loss_type": "mse"}
    )
    configs = [LossConfig.model_validate({**settings, **more}) for more in ({}, {key: value})]
    inputs = full_inputs(tokens=True, guided=False, learned=False)
    teacher = TeacherVectors(inputs.positive, inputs.query, inputs.negative)
    given = replace(inputs, teachers=(teacher,))
    before, after = (float(loss(given)) for loss in build_losses(configs, followed, num_steps=1))
    assert abs(before - after) > 1e-3


def test_the_start_of_what_a_loss_learns() -> None:
    def start(**values: Any) -> tuple[float | None, float | None]:
        return learned_scalars(LossConfig.model_validate(values))

    assert start() == (None, None)
    assert start(learnable_temperature=True, temperature=0.25) == (pytest.approx(math.log(4)), None)
    sigmoid = {"loss_type": "sigmoid", "init_logit_scale": 1.5, "init_logit_bias": -3.0}
    assert start(**sigmoid) == (1.5, -3.0)
