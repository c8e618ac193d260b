"""Self-distillation: the teacher is a moving average of the student.

Mean Teacher (Tarvainen & Valpola 2017, arXiv 1703.01780, section 2); for contrastive training of
embeddings ALBEF's momentum distillation (Li et al. 2021, arXiv 2107.07651, section 3.3).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vembed_ds.checkpointing.ema import load_average, save_average
from vembed_ds.distributed import comm
from vembed_ds.engine.ema import ShardedAverage
from vembed_ds.engine.teacher_engine import Partitioner, Residence, TeacherEngine
from vembed_ds.models.embedding_model import EmbeddingModel

Module = TypeVar("Module", bound=nn.Module)


class EmaTeacher:
    """A frozen copy of the student, in shards, that follows it step by step.

    Stands in for an engine in ``steps.gradient_cache.embed_plan``, with the student's own plan.
    In evaluation mode: no dropout. Collective: every rank makes it, before the student's engine.

    Args:
        student: Whole, on the host, in float32, with everything frozen that will be.
        ds_config: From :func:`resolve_teacher_config`; the student's own may be of any stage.
        decay: d, in ``[0, 1)``, constant: the average starts at weights that are worth
            something, so that it has no bias of the start to get rid of.
    """

    def __init__(self, student: EmbeddingModel, *, ds_config: dict[str, Any], decay: float) -> None:
        model = share_weights(student)
        partitioner = Partitioner(ds_config)
        for parameter in model.parameters():
            partitioner.take(parameter, parameter.data)
        self.engine = TeacherEngine(model, ds_config=ds_config)
        self._average = ShardedAverage(self.engine, student, decay=decay)

    @property
    def model(self) -> EmbeddingModel:
        """The copy; its parameters are empty but while they are gathered."""
        model = self.engine.module
        assert isinstance(model, EmbeddingModel)
        return model

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams it embeds: the student's."""
        return self.model.streams

    @property
    def parts(self) -> tuple[str, ...]:
        """Kinds of items, text and image, that it embeds."""
        return self.model.parts

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.engine.device

    @property
    def forwards(self) -> int:
        """Forward passes so far."""
        return self.engine.forwards

    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Forward pass of a chunk, without gradient, as the student's. Collective."""
        return self.engine.embed(inputs)

    def residence(self) -> Residence:
        """How much of its parameters this rank holds now, but for averages kept beside them."""
        return self.engine.residence()

    def close(self) -> None:
        """Free the shards."""
        self.engine.close()

    def update(self) -> None:
        """Follow the student's weights, behind every step that was applied.

        ``ema = d * ema + (1 - d) * w`` for the ``w`` that the student's forward pass uses. Each
        rank moves its own shards; nothing travels. Not behind a skipped step (fp16).
        """
        self._average.update()

    def save(self, folder: Path) -> None:
        """Write this rank's part of the average into a checkpoint. Every rank calls it."""
        save_average(folder, self._average.state_dict())

    def load(self, folder: Path) -> None:
        """Put back what :meth:`save` wrote, bit for bit. Collective.

        Raises:
            CheckpointError: On every rank: no such file, of another world size or model, damaged.
        """
        state = self._average.state_dict()
        found = comm.run_together(
            lambda: load_average(folder, like=state), doing=f"reading {folder}"
        )
        self._average.load_state_dict(found)


def share_weights(module: Module) -> Module:
    """A copy of ``module`` whose parameters are frozen and lie in the original's memory.

    For an engine that cuts them into shards of its own: a second whole model is never held.
    Buffers are copied: nothing that is trained here changes one (batch statistics are refused).
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, shared)
