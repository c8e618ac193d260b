"""Rules about the keys of section ``loss`` that need more than one key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from vembed_ds.config.schema import Config, LossConfig
from vembed_ds.references import reference_problem

LOSS_KEYS = tuple(LossConfig.model_fields)

INFONCE = ("infonce", "colbert")
SCALED = (*INFONCE, "in_batch_hard", "hard_negative")

ONLY_WITH: dict[str, tuple[str, ...]] = {
    "learnable_temperature": SCALED,
    "loss_bidirectional": (*INFONCE, "sigmoid"),  # sigmoid looks at every pair once anyway
    "loss_directions": INFONCE,
    "loss_partition": INFONCE,
    "negatives_scope": (*SCALED, "sigmoid"),
    "guide_model_name": INFONCE,
    "maxsim_reduction": ("colbert",),
}
"""Losses that read a key. Keys that vembed-factory's files may hold for another loss than the
chosen one (temperature, triplet_margin, ...) are not here: they say which loss they belong to."""

MULTI_POSITIVE = (*INFONCE, "sigmoid")


def loss_problems(config: Config) -> Iterator[str]:
    """One sentence per problem, naming key, value, rule and remedy."""
    loss = config.loss
    yield from _unread_keys(loss)
    yield from _directions(loss)
    yield from _guide(loss)
    yield from _matryoshka(loss)
    if loss.label_mode == "multi_positive" and loss.loss_type not in MULTI_POSITIVE:
        yield (
            f"label_mode=multi_positive: loss_type={loss.loss_type} has one positive per query; "
            "set label_mode to mask or ignore"
        )
    if loss.use_all_negatives and loss.hard_mining_topk != _default("hard_mining_topk"):
        yield (
            f"hard_mining_topk={loss.hard_mining_topk}: has no effect with use_all_negatives; "
            "remove one of the two"
        )


def _unread_keys(loss: LossConfig) -> Iterator[str]:
    for key, losses in ONLY_WITH.items():
        value = getattr(loss, key)
        if loss.loss_type not in losses and value != _default(key):
            shown = list(value) if isinstance(value, tuple) else value
            yield (
                f"{key}={shown!r}: loss_type={loss.loss_type} does not use it; remove {key}, "
                f"or set loss_type to {' or '.join(losses)}"
            )


def _directions(loss: LossConfig) -> Iterator[str]:
    directions = loss.loss_directions
    shown = f"loss_directions={list(directions)}"
    if "query_to_doc" not in directions:
        yield f"{shown}: only query_to_doc holds the positives; add query_to_doc"
    if repeated := {d for d in directions if directions.count(d) > 1}:
        yield f"{shown}: {min(repeated)} stands there twice; keep one"
    lonely = [d for d in directions if d in ("query_to_query", "doc_to_doc")]
    if loss.loss_partition == "per_direction" and lonely:
        yield (
            f"loss_partition=per_direction: {lonely[0]} holds no positive, so that it has no "
            f"softmax of its own; set loss_partition: joint, or remove {lonely[0]}"
        )
    for key in ("loss_directions", "loss_partition"):
        if loss.loss_bidirectional and getattr(loss, key) != _default(key):
            yield f"{key}: loss_bidirectional decides it already; remove one of the two"


def _guide(loss: LossConfig) -> Iterator[str]:
    if loss.guide_model_name is not None:
        if problem := reference_problem(loss.guide_model_name):
            yield f"guide_model_name={loss.guide_model_name!r}: {problem}"
        return
    for key in (
        "guide_margin",
        "guide_margin_type",
        "guide_query_instruction",
        "guide_document_instruction",
    ):
        if getattr(loss, key) != _default(key):
            yield (
                f"{key}={getattr(loss, key)!r}: there is no guide; set guide_model_name, "
                f"or remove {key}"
            )


def _matryoshka(loss: LossConfig) -> Iterator[str]:
    if not loss.use_mrl:
        for key in ("mrl_layers", "mrl_layer_weights"):
            if value := getattr(loss, key):
                yield f"{key}={list(value)}: needs Matryoshka; set use_mrl: true, or remove {key}"
        return
    dims, layers = loss.mrl_dims, loss.mrl_layers or ()
    if repeated := {dim for dim in dims if dims.count(dim) > 1}:
        yield f"mrl_dims={list(dims)}: {min(repeated)} stands there twice; keep one"
    if any(first >= second for first, second in pairwise(layers)):
        yield f"mrl_layers={list(layers)}: must ascend, the last layer last; sort them"
    yield from _weights("mrl_weights", loss.mrl_weights, "mrl_dims", dims)
    yield from _weights("mrl_layer_weights", loss.mrl_layer_weights, "mrl_layers", layers)


def _weights(
    key: str, weights: Sequence[float] | None, of: str, values: Sequence[int]
) -> Iterator[str]:
    if weights is None:
        return
    if len(weights) != len(values):
        yield (
            f"{key}={list(weights)}: {len(weights)} weights for {of}={list(values)}; "
            "give one for each, in the same order"
        )
    elif not any(weights):
        yield f"{key}={list(weights)}: nothing would be trained; give one a weight above 0"


def _default(key: str) -> object:
    return LossConfig.model_fields[key].default
