"""An engine without DeepSpeed, and a batch, for tests of the step itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from vembed_ds.data.batches import StepPlan, lay_out
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.processors import EncodedItem
from vembed_ds.similarity import Embeddings

WIDTH, LENGTH, ITEMS = 16, 5, 11


class PlainEngine:
    """Embeds by a small transformer, and notes what is asked of it.

    Args:
        dropout: Of the transformer.
    """

    device = torch.device("cpu")
    zero_stage = 0

    def __init__(self, *, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.module = nn.TransformerEncoderLayer(
            WIDTH, 2, dim_feedforward=32, dropout=dropout, batch_first=True
        )
        self.forwards: list[tuple[int, bool]] = []  # items, whether with gradient
        self.backwards = 0
        self.reduced = False
        self.when_broken: Callable[[], object] = lambda: None

    def embed(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        values = inputs["text"]["values"]
        self.forwards.append((len(values), torch.is_grad_enabled()))
        return {"text": self.module(values).mean(dim=1)}

    def backward(self, surrogate: Tensor) -> None:
        self.backwards += 1
        surrogate.backward()  # type: ignore[no-untyped-call]

    def parameters_held(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def reduce_once(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.module.zero_grad()
            self.when_broken()
            raise
        self.reduced = True

    def discard_gradients(self) -> None:
        self.module.zero_grad()

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.module.parameters() if p.grad is not None]


def make_roles(items: int = ITEMS) -> dict[str, list[EncodedItem]]:
    """Queries and positives that are one stream, so twice as many items."""
    generator = np.random.default_rng(0)

    def item() -> EncodedItem:
        values = generator.normal(size=(LENGTH, WIDTH)).astype(np.float32)
        return EncodedItem(
            "text", {"values": values, "input_ids": np.zeros(LENGTH, dtype=np.int64)}
        )

    return {role: [item() for _ in range(items)] for role in ("query", "positive")}


def make_plan(chunk_size: int | None, *, items: int = ITEMS) -> StepPlan:
    """The items in chunks."""
    budget = ChunkBudget(chunk_size, tokens=None)
    return lay_out(make_roles(items), budget=budget).alone()


def pad(stream: str, items: Sequence[EncodedItem]) -> dict[str, Tensor]:
    return {"values": torch.from_numpy(np.stack([item.inputs["values"] for item in items]))}


def loss(rows: Mapping[str, Embeddings], learned: Mapping[str, Tensor]) -> Tensor:
    logits = rows["query"].values @ rows["positive"].values.T
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
