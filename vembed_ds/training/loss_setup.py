"""From the configuration to the losses, and what does not go together with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vembed_ds.config.datasets import merged_loss
from vembed_ds.config.distillation import DistillationConfig, teacher_entries
from vembed_ds.config.schema import Config, DatasetEntry, LossConfig
from vembed_ds.data.dataset import PairEncoder
from vembed_ds.data.records import RecordReader
from vembed_ds.errors import ConfigError
from vembed_ds.losses import (
    LOSSES,
    MATRYOSHKA_OPTIONS,
    Distillation,
    LossFunction,
    Prefixes,
    TileSize,
    alpha_schedule,
    build_loss,
    ignored_data,
)

logger = logging.getLogger(__name__)

WEAK_ALPHA = 0.1  # above it `kl` and `mse` are a tenth of the gradient at most


def loss_configs(loss: LossConfig, entries: Mapping[str, DatasetEntry]) -> list[LossConfig]:
    """The loss settings of every data set, its own over those of all.

    Raises:
        ConfigError: They do not learn the same things.
    """
    found = [merged_loss(loss, entry.loss) for entry in entries.values()]
    if len({learned_scalars(own) for own in found}) > 1:
        raise ConfigError(
            "datasets: their losses do not learn the same scale and bias from the same start "
            "(learnable_temperature, temperature, init_logit_scale, init_logit_bias, or "
            "loss_type=sigmoid beside another); the model has one of each"
        )
    if len({own.mrl_layers for own in found}) > 1:
        raise ConfigError("datasets: mrl_layers differ; the model embeds one set of layers")
    return found


def build_losses(
    losses: Iterable[LossConfig],
    distillation: DistillationConfig,
    *,
    num_steps: int,
    tile_size: TileSize = "auto",
) -> list[LossFunction]:
    """The loss of every data set.

    Args:
        losses: Of every data set.
        distillation: Of all of them.
        num_steps: Of the run.
        tile_size: As configured.
    """
    return [
        build_loss(
            own.loss_type,
            distillation=build_distillation(own, distillation, num_steps=num_steps),
            tile_size=tile_size,
            **_options(own),
        )
        for own in losses
    ]


def build_distillation(
    loss: LossConfig, config: DistillationConfig, *, num_steps: int
) -> Distillation | None:
    """How the student follows its teachers; ``None``: it has none."""
    entries = teacher_entries(config)
    if not entries:
        return None
    start, end = config.distillation_alpha, config.distillation_alpha_end
    return Distillation(
        config.distillation_loss_type,
        weights=[entry.weight for entry in entries],
        alpha=alpha_schedule(
            config.distillation_alpha_schedule,
            start=start,
            end=start if end is None else end,
            num_steps=num_steps,
        ),
        temperature=config.distillation_temperature,
        names=[entry.name or str(number) for number, entry in enumerate(entries, start=1)],
        teacher_temperatures=[entry.temperature for entry in entries],
        scale=config.distillation_scale,
        reduction=loss.maxsim_reduction,
        prefixes=_prefixes(loss),
    )


def weak_distillation(config: Config) -> str | None:
    """One line for settings under which teachers hardly matter beside the task; ``None``: fine."""
    section = config.distillation
    alpha = section.distillation_alpha
    weak = section.distillation_loss_type in ("kl", "mse") and alpha > WEAK_ALPHA
    if not (weak and teacher_entries(section)):
        return None
    return (
        f"distillation_alpha={alpha:g}: beside a contrastive task the gradient of "
        f"{section.distillation_loss_type} of cosines is some hundred times smaller, so that the teachers "
        "hardly matter; docs/losses.md has the alphas at which both are of one size (0.001 to 0.007)"
    )


def _prefixes(loss: LossConfig) -> Prefixes | None:
    if not loss.use_mrl:
        return None
    num_layers = len(loss.mrl_layers or (0,))
    return Prefixes(
        dims=loss.mrl_dims,
        weights=loss.mrl_weights or (1.0,) * len(loss.mrl_dims),
        layer_weights=loss.mrl_layer_weights or (1.0,) * num_layers,
    )


def _options(loss: LossConfig) -> dict[str, Any]:
    names = LOSSES[loss.loss_type].options | MATRYOSHKA_OPTIONS
    return {name: value for name, value in loss if name in names}


def learned_scalars(loss: LossConfig) -> tuple[float | None, float | None]:
    """Start of the learned log scale, and of the learned bias; ``None``: not learned."""
    if loss.loss_type == "sigmoid":
        return loss.init_logit_scale, loss.init_logit_bias
    return (-math.log(loss.temperature) if loss.learnable_temperature else None), None


def check_data(
    losses: Iterable[LossConfig],
    members: Sequence[PairEncoder],
    distillation: DistillationConfig,
) -> None:
    """Refuse data that no loss would look at, unless it stands there by chance.

    Args:
        losses: Of every data set.
        members: The data sets.
        distillation: Of all of them; every distillation loss looks at negatives.

    Raises:
        ConfigError: Explicit negatives, or labels, scores or a teacher's scores that
            ``column_mapping`` names; or a teacher's scores without negatives to compare.
    """
    followed = bool(teacher_entries(distillation))
    for loss, member in zip(losses, members, strict=True):
        reader = member.reader
        _check_teacher_scores(reader, distillation.distillation_loss_type)
        given = {
            "negatives": reader.has_negatives,
            "labels": reader.label_column is not None,
            "scores": reader.score_column is not None,
        }
        for name in ignored_data(loss.loss_type, [name for name, has in given.items() if has]):
            if name == "negatives" and followed:
                continue
            if name == "negatives" or name.removesuffix("s") in reader.column_mapping:
                raise ConfigError(
                    f"loss_type={loss.loss_type}: does not look at the {name} of {reader.origin}; "
                    "remove that column, or choose another loss"
                )
            logger.warning("%s: its %s are not used by %s", reader.origin, name, loss.loss_type)


def _check_teacher_scores(reader: RecordReader, loss_type: str) -> None:
    if reader.teacher_columns is not None and not reader.has_negatives and loss_type != "mse":
        raise ConfigError(
            f"distillation_loss_type={loss_type}: compares a query's documents with each other, and "
            f"{reader.origin} has scores of one only; add negatives with neg_scores, or use mse"
        )
    for role in reader.unread_scores:
        if role in reader.column_mapping:
            raise ConfigError(
                f"column_mapping {role}={reader.column_mapping[role]!r}: teacher_scores is not set, so "
                f"that column of {reader.origin} is not read; set teacher_scores: true, or remove "
                f"{role} from column_mapping"
            )
        logger.warning("%s: its %s are not used without teacher_scores", reader.origin, role)


def evaluated_dims(loss: LossConfig) -> tuple[int, ...]:
    """Prefixes of the embeddings that are evaluated beside the whole."""
    return loss.mrl_dims if loss.use_mrl else ()


def export_loss(loss: LossConfig) -> dict[str, Any]:
    """What a converted model says of its loss."""
    return {
        "loss_type": loss.loss_type,
        "temperature": loss.temperature,
        "use_mrl": loss.use_mrl,
        "mrl_dims": list(evaluated_dims(loss)),
    }
