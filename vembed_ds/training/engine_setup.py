"""From the configuration to the model inside its DeepSpeed engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from vembed_ds.checkpointing.frozen import keep_frozen_weights
from vembed_ds.config.schema import Config, TrainingConfig
from vembed_ds.data.chunking import AUTO, ChunkBudget
from vembed_ds.distributed import comm
from vembed_ds.distributed.seeding import seed_everything
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.engine.ds_config import resolve_ds_config
from vembed_ds.engine.initialize import initialize_engine
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.engine.schedules import build_schedule
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import ConfigError, one_line
from vembed_ds.losses import check_mrl_dims
from vembed_ds.models.builder import ModelSpec
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.rates import set_rates
from vembed_ds.models.reach import is_idle, mark_idle, mark_unreached
from vembed_ds.training.compiling import compile_backbones
from vembed_ds.training.data_setup import RunData, loader_timeout
from vembed_ds.training.frozen_features import features_folder, store_features, stored_parts
from vembed_ds.training.loop import Intervals
from vembed_ds.training.model_setup import own_rates, setup_model

logger = logging.getLogger(__name__)


def fill_ds_config(
    config: Config, raw: Mapping[str, Any], *, origin: str, origins: Mapping[str, str]
) -> dict[str, Any]:
    """DeepSpeed's config with our values in place of ``"auto"``, for the ranks that run this."""
    accelerator = get_accelerator()
    return fill_ds_config_for(
        config,
        raw,
        origin=origin,
        origins=origins,
        world_size=comm.world_size(),
        device_type=accelerator.device_name(),
        fp16_supported=bool(accelerator.is_fp16_supported()),
        bf16_supported=bool(accelerator.is_bf16_supported()),
    )


def fill_ds_config_for(
    config: Config,
    raw: Mapping[str, Any],
    *,
    origin: str,
    origins: Mapping[str, str],
    **machine: Any,
) -> dict[str, Any]:
    """The same for any ranks.

    Args:
        config: Of the run.
        raw: DeepSpeed's, as it stands in its file.
        origin: That file's name, for messages.
        origins: Where the values of ``config`` came from.
        machine: ``world_size``, ``device_type``, ``fp16_supported`` and ``bf16_supported`` of
            :func:`resolve_ds_config`.
    """
    optimizer = config.optimizer
    return resolve_ds_config(
        raw,
        origin=origin,
        origins=origins,
        batch_size=config.training.batch_size,
        precision=config.model.precision,
        gradient_reduction=config.training.gradient_reduction,
        max_grad_norm=optimizer.max_grad_norm,
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_epsilon,
        weight_decay=optimizer.weight_decay,
        **machine,
    )


UNCHOSEN = 32
"""Items of a pass where ``gradient_cache_chunk_size: auto`` is not chosen yet, or will not be."""


def chunk_budget(training: TrainingConfig) -> ChunkBudget:
    """How large the chunks of a step are, as configured; without gradient cache all is one."""
    if not training.use_gradient_cache:
        return ChunkBudget(items=None)
    size = training.gradient_cache_chunk_size
    return ChunkBudget(
        UNCHOSEN if size == AUTO else size,
        tokens=training.gradient_cache_chunk_tokens,
        sort=training.gradient_cache_sort,
    )


def inference_batch_size(config: Config) -> int:
    """Items per rank in a forward pass without graph: what fits in training fits here too."""
    training, slice_size = config.training, config.model.gradient_checkpointing_slice_size
    trained_at_once = chunk_budget(training).items or training.batch_size
    return config.run.eval_batch_size or min(trained_at_once, slice_size or trained_at_once)


def read_model(
    config: Config, spec: ModelSpec, data: RunData, *, zero_stage: int
) -> EmbeddingModel:
    """The model as it is before any training, on the host.

    Raises:
        ConfigError: It cannot be built.
    """
    seed_everything(config.training.seed)
    used = data.train.parts
    model = setup_model(config, spec, used=used, zero_stage=zero_stage)
    told = ", ".join(f"{part} {method}" for part, method in model.pooling().items())
    logger.info("pooling: %s", told)
    for stream in set(model.parts) - used:
        logger.info("no record holds a %s: that tower is not trained", stream)
    return model


def prepare_model(
    config: Config,
    model: EmbeddingModel,
    data: RunData,
    folder: Path,
    *,
    mrl_dims: Sequence[int] = (),
) -> int:
    """Keep what is frozen, and make the model of :func:`read_model` ready for its engine. Collective.

    Features of frozen towers are computed on the way.

    Returns:
        The width of its embeddings (of one layer's).

    Raises:
        ConfigError: It has fewer dimensions than one of ``mrl_dims``.
    """
    used = data.train.parts
    for kind in stored_parts(model, config, data.processor, used=used):
        store_features(
            model,
            [*data.tables, *(found.dataset for found in data.val.values())],
            kind,
            processor=data.processor,
            root=features_folder(config),
            device=torch.device(get_accelerator().current_device_name()),
            batch_size=inference_batch_size(config),
            num_workers=config.data.num_workers,
            timeout_seconds=loader_timeout(config),
        )
        mark_idle(model.encoder.backbone_modules(kind))
    inputs: dict[str, Mapping[str, Tensor]] = {
        part: data.processor.pad(part, [data.processor.filler(part)])
        for part in model.parts
        if part in used
    }
    _spare_unreached(model, inputs)
    width = _width(model, inputs)
    if mrl_dims:
        check_mrl_dims(mrl_dims, width=width)
    if config.model.precision != "fp32":
        comm.run_together(lambda: keep_frozen_weights(model, folder), doing=f"writing {folder}")
    if config.model.gradient_checkpointing:
        for backbone in model.trained_backbones():
            enable_activation_checkpointing(
                backbone,
                mechanism=config.model.activation_checkpointing,
                slice_size=config.model.gradient_checkpointing_slice_size,
            )
    set_rates(model, own_rates(config.optimizer))
    if config.training.use_torch_compile:
        comm.run_together(
            lambda: compile_backbones(model, data.processor, used=used), doing="compiling"
        )
    return width


def start_engine(
    config: Config, model: EmbeddingModel, ds_config: dict[str, Any], intervals: Intervals
) -> TrainEngine:
    """The model inside its engine. Collective."""
    optimizer = config.optimizer
    engine = initialize_engine(
        model,
        ds_config=ds_config,
        param_groups=build_param_groups(model, weight_decay=optimizer.weight_decay),
        schedule=build_schedule(
            optimizer.scheduler_type,
            num_steps=intervals.num_steps,
            warmup_steps=optimizer.warmup_steps,
            warmup_ratio=optimizer.warmup_ratio,
        ),
        zero3_gather=config.training.zero3_gather,
        gradient_reduction=config.training.gradient_reduction,
        idle=[p for p in model.parameters() if is_idle(p)],
    )
    # Same weights everywhere, but each rank drops out units of its own.
    seed_everything(config.training.seed + 1 + comm.rank())
    return engine


def _width(model: EmbeddingModel, inputs: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Dimensions of an embedding, of one layer's where several are trained."""
    stream = next(iter(inputs))
    with torch.no_grad():
        rows = model.eval()({stream: inputs[stream]})[stream]
    model.train()
    return int(rows.shape[-1]) // model.num_layers


def _spare_unreached(model: EmbeddingModel, inputs: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Keep weight decay from what no embedding depends on.

    Args:
        model: On the host.
        inputs: A padded item of every kind in use.

    Raises:
        ConfigError: The model does not take what its processor gives.
    """
    try:
        names = mark_unreached(model, inputs)
    except Exception as error:  # whatever a model raises for inputs that it is not made for
        given = {stream: sorted(chunk) for stream, chunk in inputs.items()}
        raise ConfigError(
            f"the model does not embed what its processor gives ({given}): {one_line(error)}; "
            "the model is not supported, or processor and model do not belong together"
        ) from error
    if names:
        logger.info("%d parameters are not used (first: %s): no decay", len(names), names[0])
