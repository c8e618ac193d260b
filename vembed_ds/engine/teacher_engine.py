"""A frozen model in a DeepSpeed engine without optimizer: ZeRO-3, evaluation, no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from torch import Tensor, nn

from vembed_ds.engine.communication import join_deepspeed
from vembed_ds.engine.release import remember_engine

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Residence(NamedTuple):
    """How many elements of the parameters a rank holds.

    Attributes:
        shard: Of its shards, on the device or offloaded; with hpZ also of its machine's.
        live: Of parameters that are whole at this moment.
        largest: Of the largest parameter.
        total: Of all parameters, over all ranks.
    """

    shard: int
    live: int
    largest: int
    total: int


class Partitioner:
    """Cuts parameters into the ranks' shards one after another.

    Args:
        ds_config: From :func:`resolve_teacher_config`.
    """

    def __init__(self, ds_config: dict[str, Any]) -> None:
        join_deepspeed()
        self._ds_config = ds_config
        self._dtype = teacher_dtype(ds_config)
        self._first: Any = None

    def take(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Keep this rank's shard of ``value`` in ``parameter``, frozen. Collective.

        Args:
            parameter: Of the shape of ``value``; its data are given up.
            value: On the host, of at least one dimension; rank 0's counts.
        """
        parameter.requires_grad_(False)
        parameter.data = value.to(self._dtype)
        if self._first is None:
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=holder, config_dict_or_path=self._ds_config)
            self._first = parameter
        else:
            self._first.convert_to_zero_parameters(param_list=[parameter])


class TeacherEngine:
    """A model sharded as ZeRO-3 shards it, which only embeds.

    Collective, after ``init_distributed``.

    Args:
        model: Frozen. Either whole and the same on every rank, or with every parameter cut by one
            :class:`Partitioner`; its buffers on any device.
        ds_config: From :func:`resolve_teacher_config`.

    Raises:
        ValueError: A parameter requires a gradient.
    """

    def __init__(self, model: nn.Module, *, ds_config: dict[str, Any]) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                raise ValueError(f"parameter {name} requires a gradient: a teacher is not trained")
        join_deepspeed()
        device = torch.device(get_accelerator().current_device_name())
        for buffer in model.buffers():  # DeepSpeed leaves those of a partitioned model alone
            buffer.data = buffer.data.to(device)
        self.engine, *_ = deepspeed.initialize(model=model.eval(), config=ds_config)
        remember_engine(self.engine)
        # Left behind, it would be taken for the student's.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        self.forwards = 0

    @property
    def module(self) -> nn.Module:
        """The model; its parameters are empty but while they are gathered."""
        module: nn.Module = self.engine.module
        return module

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device(self.engine.device)

    @torch.no_grad()
    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Embed a chunk, in evaluation mode and without gradient. Collective.

        Args:
            inputs: As of :class:`EmbeddingModel`, on :attr:`device`.

        Returns:
            As of :class:`EmbeddingModel`, in the teacher's precision.
        """
        assert not self.module.training, "somebody switched the teacher to training"
        self.forwards += 1
        outputs: dict[str, Tensor] = self.engine(inputs)
        assert not any(output.requires_grad for output in outputs.values())
        return outputs

    def residence(self) -> Residence:
        """How much of the parameters this rank holds now."""
        parameters: list[Any] = list(self.module.parameters())
        shards = [p.ds_tensor.numel() for p in parameters]
        second = [p.ds_secondary_tensor for p in parameters if p.ds_secondary_tensor is not None]
        sizes = [p.ds_numel for p in parameters]
        return Residence(
            shard=sum(shards) + sum(tensor.numel() for tensor in second),
            live=sum(p.numel() for p in parameters),
            largest=max(sizes),
            total=sum(sizes),
        )

    def close(self) -> None:
        """Free the shards; the engine cannot be used again."""
        self.engine.destroy()
        for parameter in self.module.parameters():
            parameter.ds_tensor = parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]


def teacher_dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    """Of the weights, by a resolved config."""
    chosen = [dtype for name, dtype in _DTYPES.items() if ds_config[name]["enabled"]]
    return chosen[0] if chosen else torch.float32
