"""Losses on embeddings: this rank's rows against the columns of every rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from vembed_ds.errors import ConfigError
from vembed_ds.losses.batch import gather_batch
from vembed_ds.losses.combination import (
    DISTILLATION_LOSSES,
    Distillation,
    alpha_schedule,
)
from vembed_ds.losses.comparison import DIRECTIONS, Selection
from vembed_ds.losses.infonce import colbert, in_batch_hard, info_nce
from vembed_ds.losses.inputs import (
    Guide,
    LossInputs,
    TeacherScores,
    TeacherVectors,
    Watched,
)
from vembed_ds.losses.matryoshka import BatchFunction, Prefixes, check_mrl_dims, matryoshka
from vembed_ds.losses.ranking import cosent, triplet
from vembed_ds.losses.sigmoid import sigmoid
from vembed_ds.losses.similarities import tile_size_of
from vembed_ds.losses.watching import SAMPLE, watch
from vembed_ds.similarity import Embeddings

__all__ = [
    "DIRECTIONS",
    "DISTILLATION_LOSSES",
    "LOSSES",
    "MATRYOSHKA_OPTIONS",
    "SAMPLE",
    "Distillation",
    "Embeddings",
    "Guide",
    "LossFunction",
    "LossInputs",
    "Prefixes",
    "TeacherScores",
    "TeacherVectors",
    "TileSize",
    "Watched",
    "alpha_schedule",
    "build_loss",
    "check_mrl_dims",
    "ignored_data",
    "with_distillation",
]

LossFunction = Callable[[LossInputs], Tensor]
TileSize = int | Literal["auto"] | None


@dataclass(frozen=True)
class LossSpec:
    """A loss and what it reads.

    Attributes:
        function: Of a gathered batch; takes ``options`` by keyword.
        options: Names of its options, those of :class:`Selection` included.
        label_modes: What it can do with labels; the first is its default.
        uses: Which of labels, scores, negatives and guide it looks at.
    """

    function: Callable[..., Tensor]
    options: frozenset[str]
    label_modes: tuple[str, ...]
    uses: frozenset[str]


_PAIRS = frozenset({"labels", "negatives"})
_COMMON = frozenset({"mask_duplicates", "label_mode"})
_GUIDED = frozenset({"guide_margin", "guide_margin_type"})
_INFONCE = (
    _COMMON
    | _GUIDED
    | {"temperature", "negatives_scope", "loss_bidirectional", "loss_directions", "loss_partition"}
)
_HARD = LossSpec(
    in_batch_hard,
    _COMMON | {"temperature", "negatives_scope", "hard_mining_topk", "use_all_negatives"},
    ("mask", "ignore"),
    _PAIRS,
)

LOSSES: dict[str, LossSpec] = {
    "infonce": LossSpec(
        info_nce, _INFONCE, ("multi_positive", "mask", "ignore"), _PAIRS | {"guide"}
    ),
    "colbert": LossSpec(
        colbert,
        _INFONCE | {"maxsim_reduction"},
        ("mask", "multi_positive", "ignore"),
        _PAIRS | {"guide"},
    ),
    "sigmoid": LossSpec(
        sigmoid, _COMMON | {"negatives_scope"}, ("multi_positive", "mask", "ignore"), _PAIRS
    ),
    "triplet": LossSpec(triplet, _COMMON | {"triplet_margin"}, ("mask", "ignore"), _PAIRS),
    "cosent": LossSpec(cosent, _COMMON | {"cosent_scale"}, ("mask", "ignore"), _PAIRS | {"scores"}),
    "in_batch_hard": _HARD,
    "hard_negative": _HARD,
}
"""``hard_negative`` is vembed-factory's other name of ``in_batch_hard``."""

MATRYOSHKA_OPTIONS = frozenset(
    ["use_mrl", "mrl_dims", "mrl_weights", "mrl_layers", "mrl_layer_weights"]
)
"""What :func:`build_loss` takes with every loss."""

_SELECTION = frozenset(Selection.__dataclass_fields__)
_OWN_NEGATIVES = ("triplet", "cosent")


def build_loss(
    loss_type: str,
    *,
    label_mode: str | None = None,
    use_mrl: bool = False,
    mrl_dims: Sequence[int] = (),
    mrl_weights: Sequence[float] | None = None,
    mrl_layers: Sequence[int] | None = None,
    mrl_layer_weights: Sequence[float] | None = None,
    distillation: Distillation | None = None,
    tile_size: TileSize = "auto",
    **options: Any,
) -> LossFunction:
    """The loss of that name; options are called as in the configuration.

    Args:
        loss_type: A key of ``LOSSES``.
        label_mode: What to do with labels; ``None``: the loss's default.
        use_mrl: Sum the loss over ``mrl_dims``, and over the layers if there are any.
        mrl_dims: See :func:`vembed_ds.losses.matryoshka.matryoshka`.
        mrl_weights: Likewise.
        mrl_layers: Their number matters here, and their numbers name parts in the log.
        mrl_layer_weights: Likewise.
        distillation: What the student follows beside its task; ``None``: nothing.
        tile_size: Rows and columns that are compared at a time; ``None``: all, in one piece.
        **options: Of ``LOSSES[loss_type].options``; what is not given is off.

    Returns:
        A collective function of this rank's :class:`LossInputs`: every rank calls it with equal
        B; averaged over ranks it is the loss of the whole batch.

    Raises:
        ConfigError: Unknown name or option.
    """
    if loss_type not in LOSSES:
        known = ", ".join(sorted(LOSSES))
        raise ConfigError(f"loss_type={loss_type!r}: no such loss; choose one of {known}")
    spec = LOSSES[loss_type]
    if unknown := sorted(set(options) - spec.options):
        raise ConfigError(f"{unknown[0]}={options[unknown[0]]!r}: {loss_type} does not use it")
    selection = {name: options.pop(name) for name in _SELECTION & set(options)}
    if loss_type in _OWN_NEGATIVES:
        selection["negatives_scope"] = "own"
    selection["label_mode"] = label_mode or spec.label_modes[0]
    options |= _directions(options)
    chosen, reduction = Selection(**selection), options.get("reduction", "mean")
    task: BatchFunction = partial(spec.function, selection=chosen, **options)
    if use_mrl:
        task = matryoshka(
            task,
            mrl_dims=mrl_dims,
            mrl_weights=mrl_weights,
            mrl_layers=mrl_layers or (1,),
            mrl_layer_weights=mrl_layer_weights,
        )
    num_layers = len(mrl_layers or (1,)) if use_mrl else 1
    queries = any(direction.endswith("query") for direction in options.get("directions", ()))

    def loss(inputs: LossInputs) -> Tensor:
        batch = gather_batch(inputs, queries=queries, tile_size=_size(inputs, tile_size))
        if inputs.watched is not None:
            watch(
                batch,
                inputs.watched,
                selection=chosen,
                reduction=reduction,
                num_layers=num_layers,
            )
        found = task(batch)
        return found if distillation is None else distillation.combine(found, batch, inputs)

    return loss


def with_distillation(
    task: LossFunction, distillation: Distillation, *, tile_size: TileSize = "auto"
) -> LossFunction:
    """A task's loss, whatever computes it, beside what its teachers say; for a script of one's own.

    Args:
        task: Of this rank's inputs; its mean over ranks is the loss of the whole batch.
        distillation: How the student follows.
        tile_size: As in :func:`build_loss`.
    """

    def loss(inputs: LossInputs) -> Tensor:
        batch = gather_batch(inputs, queries=False, tile_size=_size(inputs, tile_size))
        return distillation.combine(task(inputs), batch, inputs)

    return loss


def _size(inputs: LossInputs, tile_size: TileSize) -> int | None:
    return tile_size_of(inputs.query.values.device) if tile_size == "auto" else tile_size


def _directions(options: dict[str, Any]) -> dict[str, Any]:
    """The keys' names to the function's; takes the former out of ``options``."""
    names = {"loss_directions": "directions", "loss_partition": "partition"}
    names |= {"maxsim_reduction": "reduction"}
    found = {name: options.pop(key) for key, name in names.items() if key in options}
    if options.pop("loss_bidirectional", False):
        found |= {"directions": ("query_to_doc", "doc_to_query"), "partition": "per_direction"}
    return found


def ignored_data(loss_type: str, given: Collection[str]) -> list[str]:
    """What of the data the loss would not look at, so that it can be refused by name.

    Args:
        loss_type: A key of ``LOSSES``.
        given: Which of ``labels``, ``scores``, ``negatives`` and ``guide`` the data and the
            configuration give. Labels that ``label_mode: ignore`` ignores are ignored on request.

    Returns:
        The ignored among them, sorted. CoSENT with scores looks at nothing else.
    """
    uses = LOSSES[loss_type].uses
    if loss_type == "cosent" and "scores" in given:
        uses = frozenset({"scores"})
    return sorted(set(given) - uses)
