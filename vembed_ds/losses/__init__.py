"""Contrastive losses on embeddings: local rows against the columns of every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vembed_ds.errors import ConfigError
from vembed_ds.losses.infonce import info_nce


@dataclass(frozen=True)
class LossInputs:
    """What a loss may look at; everything is this rank's share of the batch.

    Attributes:
        query: ``[B, D]`` float32, not normalised.
        positive: ``[B, D]`` float32; row i answers query i.
        logit_scale: ``[1]`` float32, the log of the inverse temperature, when it is learned.
    """

    query: Tensor
    positive: Tensor
    logit_scale: Tensor | None = None


LossFunction = Callable[[LossInputs], Tensor]


def build_loss(loss_type: str, **options: Any) -> LossFunction:
    """The loss of that name.

    Args:
        loss_type: A key of ``LOSSES``.
        **options: ``temperature`` (divides the cosine; > 0) and ``bidirectional``.

    Returns:
        A collective function: every rank calls it with equal B and gets the mean over its own
        rows; averaged over ranks it is the loss of the whole batch.

    Raises:
        ConfigError: Unknown name.
    """
    if loss_type not in LOSSES:
        known = ", ".join(sorted(LOSSES))
        raise ConfigError(f"loss_type={loss_type!r}: no such loss; choose one of {known}")
    return LOSSES[loss_type](**options)


def _build_info_nce(*, temperature: float, bidirectional: bool) -> LossFunction:
    def loss(inputs: LossInputs) -> Tensor:
        return info_nce(
            inputs.query,
            inputs.positive,
            temperature=temperature,
            logit_scale=inputs.logit_scale,
            bidirectional=bidirectional,
        )

    return loss


LOSSES: dict[str, Callable[..., LossFunction]] = {"infonce": _build_info_nce}
