"""Which parts of a model are compiled, and what is refused with it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from vembed_ds.config.schema import Config
from vembed_ds.data.processors import ItemProcessor, rounded_length
from vembed_ds.errors import ConfigError
from vembed_ds.models.compiled import compile_in_place
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.vision_language import VisionLanguageEncoder

logger = logging.getLogger(__name__)

LONGEST = 8192  # of texts whose length nothing bounds


def refuse_compiling(config: Config, ds_config: Mapping[str, Any]) -> None:
    """ZeRO-3 fills and empties parameters in hooks, which a compiled graph does not see.

    Raises:
        ConfigError: The model shall be compiled at stage 3.
    """
    if config.training.use_torch_compile and int(ds_config["zero_optimization"]["stage"]) == 3:
        raise ConfigError(
            "use_torch_compile=true: ZeRO stage 3 gathers parameters in hooks of modules, which "
            "compiled ones do not run; use stage 0, 1 or 2, or set use_torch_compile: false"
        )


def compile_backbones(
    model: EmbeddingModel, processor: ItemProcessor, *, used: Collection[str]
) -> None:
    """Compile what embeds the items of a run; from then on texts are padded to few lengths. Local.

    Args:
        model: Whole.
        processor: The run's; it knows which features are stored, so that nothing embeds them.
        used: Kinds of items that the data has.

    Raises:
        ConfigError: The model is one that has not been compared with the uncompiled one, or nothing
            can be compiled here.
    """
    encoder = model.encoder
    if isinstance(encoder, VisionLanguageEncoder):
        raise ConfigError(
            "use_torch_compile=true: is not offered for vision-language models, whose images have "
            "other sizes in every chunk; set use_torch_compile: false"
        )
    parts = [part for part in model.parts if part in used and part not in processor.stored]
    modules: dict[nn.Module, None] = {}  # a backbone may be that of both
    for part in parts:
        modules |= dict.fromkeys(m for m in encoder.backbone_modules(part) if any(m.children()))
    processor.round_lengths = True
    limit = processor.max_length or LONGEST
    lengths = {rounded_length(length, limit=limit) for length in range(1, limit + 1)}
    compile_in_place(modules, num_lengths=len(lengths))
    logger.info(
        "compiled: %s, for at most %d lengths of texts",
        ", ".join(type(module).__name__ for module in modules) or "nothing",
        len(lengths),
    )
