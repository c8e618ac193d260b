"""Learning rates of their own for the parts of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from vembed_ds.errors import ConfigError
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TwoTowerEncoder

RATE = "vembed_lr"


def set_rates(model: EmbeddingModel, rates: Mapping[str, float]) -> None:
    """Mark the trained parameters of a part with its rate, for the optimizer's groups.

    Args:
        model: Complete, adapters included.
        rates: Rate of ``text_encoder`` (the text backbone), ``image_encoder`` or ``projection``.
            What is in no such part (the learned temperature) keeps the rate of all.

    Raises:
        ConfigError: The model has no such part, or nothing of it is trained.
    """
    for part, rate in rates.items():
        modules = _modules(model, part)
        trained = [p for m in modules for p in m.parameters() if p.requires_grad]
        if not trained:
            problem = "nothing of it is trained" if modules else "the model has none"
            raise ConfigError(f"{part}_lr={rate:g}: {problem}; remove {part}_lr")
        for parameter in trained:
            setattr(parameter, RATE, rate)


def _modules(model: EmbeddingModel, part: str) -> list[nn.Module]:
    if part == "projection":
        return list(_projections(model))
    kind = part.removesuffix("_encoder")
    return model.encoder.backbone_modules(kind) if kind in model.parts else []


def _projections(model: EmbeddingModel) -> Iterator[nn.Module]:
    encoder = model.encoder
    if isinstance(encoder, TwoTowerEncoder):
        found = [encoder.projection]
    else:
        found = [encoder.tower(name).projection for name in encoder.towers]
    yield from (projection for projection in found if projection is not None)
