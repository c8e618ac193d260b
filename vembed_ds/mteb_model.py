"""Runs a model in MTEB (Muennighoff 2022, arXiv 2210.07316): ``mteb.evaluate(MtebModel(folder), tasks)``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vembed_ds.data.records import Item
from vembed_ds.errors import ConfigError
from vembed_ds.inference import Array, Encoder, Role

ROLES: dict[str, Role] = {"query": "query", "document": "document"}


class MtebModel:
    """A model as ``mteb`` (2.x, extra ``mteb``) expects one: its ``EncoderProtocol``.

    Queries and documents are given the instructions that the model was trained with; of tasks without
    roles (classification, similarity), neither. The instructions that MTEB has for some tasks are not
    used.

    Args:
        model_name: Folder from ``vembed_ds.convert``, or any reference that :class:`Encoder` takes.
        revision: For the protocol; a folder has none.
        device: ``None``: the first GPU, else the CPU.
        dtype: Of the weights.
        trust_remote_code: Run Python code that the folder brings, with your rights.

    Attributes:
        encoder: The :class:`Encoder`.
        mteb_model_meta: What MTEB stores with the results.

    Raises:
        ConfigError: ``mteb`` is not installed, the model is missing, or has a vector for each token.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self.mteb_model_meta = _meta(model_name, revision)
        self.encoder = Encoder(
            model_name, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if isinstance(self.encoder.encode([]), list):
            raise ConfigError(
                f"{model_name}: a late-interaction model gives a vector for each token, and MTEB compares "
                "single vectors; measure it with vembed-ds evaluate"
            )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> Array:
        """Embed what MTEB hands over.

        Args:
            inputs: Batches: ``text`` and ``image``, or one of them, each a list.
            task_metadata: Of the task; only its name matters, for messages.
            hf_split: No matter.
            hf_subset: No matter.
            prompt_type: Whether they are queries or documents; ``None``: neither.
            batch_size: Items in one forward pass.
            show_progress_bar: Show a progress bar.
            kwargs: Other options of MTEB; no matter.

        Returns:
            ``[N, D]`` float32, unit length.

        Raises:
            ConfigError: The batches hold neither, or the model does not embed what they hold.
        """
        items = [item for batch in inputs for item in _items(batch, task=task_metadata)]
        role = (
            None if prompt_type is None else ROLES.get(getattr(prompt_type, "value", prompt_type))
        )
        found = self.encoder.encode(
            items, role=role, batch_size=batch_size, show_progress=show_progress_bar
        )
        return np.asarray(found)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine of every row with every row, ``[N, M]`` float32."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine of row i with row i, ``[N]`` float32."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)


def _items(batch: Mapping[str, Any], *, task: Any) -> list[Item]:
    columns = {name: batch[name] for name in ("text", "image") if name in batch}
    if not columns:
        raise ConfigError(
            f"{getattr(task, 'name', task)}: its batches hold {', '.join(batch)}; this model embeds text "
            "and image; choose another task"
        )
    number = len(next(iter(columns.values())))
    return [Item(**{name: column[i] for name, column in columns.items()}) for i in range(number)]


def _unit(rows: Any) -> Tensor:
    values = torch.as_tensor(rows).float()
    return functional.normalize(values if values.dim() > 1 else values[None], dim=-1)


def _meta(model_name: str, revision: str | None) -> Any:
    try:
        from mteb.models.model_meta import ModelMeta, ScoringFunction
    except ImportError as error:
        raise ConfigError(
            "MtebModel: mteb is not installed; run pip install 'vembed-ds[mteb]'"
        ) from error
    # MTEB wants a name of the form owner/name, which is the folder of its results.
    name = re.sub(r"[^\w.-]+", "__", model_name.strip("./"))
    values: dict[str, Any] = dict.fromkeys(
        field for field, about in ModelMeta.model_fields.items() if about.is_required()
    )
    return ModelMeta(
        **{
            **values,
            "name": f"vembed-ds/{name}",
            "revision": revision or "local",
            "framework": ["PyTorch"],
            "similarity_fn_name": ScoringFunction.COSINE,
        }
    )
