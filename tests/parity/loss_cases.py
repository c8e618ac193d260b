"""Steps under every loss, twice: through the project's engine, and plainly, item by item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from tests.distributed import loss_reference
from tests.parity import cases, data
from vembed_ds.data.batches import plan_step
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.data.collators import Batch
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.losses import build_loss
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.similarity import Embeddings
from vembed_ds.steps.gradient_cache import compute_gradient
from vembed_ds.training.loss_inputs import GUIDE, loss_inputs

STEPS = 3
PAIRS = 6
TILE_SIZE = 2  # of 3 rows on each rank: tiles that do not divide them
LEARNED = {"logit_scale": 1.3, "logit_bias": -2.0}
# The second of two ranks has no explicit negative, and each rank has a pair of both labels.
COUNTS = [2, 0, 1, 0, 0, 0]
LABELS = [7, 8, 7, 9, 8, 7]
SCORES = [0.1, 0.9, 0.4, 0.4, 0.7, 0.2]
KEYS = {
    "query": [1, 2, 3, 4, 5, 1],
    "positive": [11, 12, 13, 14, 12, 16],
    "negative": [21, 13, 12],
}


def make_items(step: int) -> dict[str, list[dict[str, np.ndarray]]]:
    """Texts of every role, of all ranks."""
    generator = np.random.default_rng(2000 + step)

    def texts(number: int) -> list[dict[str, np.ndarray]]:
        lengths = generator.integers(3, 10, size=number)
        return [{"input_ids": generator.integers(2, data.EOS, size=n)} for n in lengths]

    return {"query": texts(PAIRS), "positive": texts(PAIRS), "negative": texts(sum(COUNTS))}


def make_guide(step: int) -> dict[str, np.ndarray]:
    """A guide's vectors of the same items: ``[n, 3]`` by role."""
    generator = np.random.default_rng(3000 + step)
    numbers = {"query": PAIRS, "positive": PAIRS, "negative": sum(COUNTS)}
    return {role: generator.normal(size=(n, 3)).astype(np.float32) for role, n in numbers.items()}


def train_plain(
    folder: Path, *, loss_type: str, options: dict[str, Any], case: dict[str, Any], lr: float
) -> dict[str, Any]:
    """One process, the whole batch, one item after the other; nothing of the project's code."""
    model = nn.Module()
    model.text = AutoModel.from_pretrained(folder / "text")
    for name in case.get("learned", ()):
        setattr(model, name, nn.Parameter(torch.tensor([LEARNED[name]])))
    trained = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=lr, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        items = make_items(step)
        batch: dict[str, Any] = {
            role: [_embed_plain(model.text, item, case) for item in found]
            for role, found in items.items()
        }
        batch |= {f"{role}_keys": keys for role, keys in KEYS.items()}
        batch |= {"negative_counts": COUNTS, "has_negatives": True}
        batch |= {name: getattr(model, name)[0].double() for name in case.get("learned", ())}
        batch |= {"labels": LABELS} if "labels" in case else {}
        batch |= {"scores": SCORES} if "scores" in case else {}
        if "guide" in case:
            batch["guide"] = {r: list(torch.from_numpy(v)) for r, v in make_guide(step).items()}
        loss = loss_reference.value_of(loss_type, batch, options)
        optimizer.zero_grad()
        loss.backward()
        for value in trained.values():
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        norms.append(float(nn.utils.get_total_norm([value.grad for value in trained.values()])))
        optimizer.step()
        losses.append(float(loss.detach()))
    after = {name: value.detach().clone() for name, value in trained.items()}
    return {"losses": losses, "norms": norms, "before": before, "after": after}


def _embed_plain(text: nn.Module, item: dict[str, np.ndarray], case: dict[str, Any]) -> Tensor:
    outputs = text(**data.pad("text", [item]), output_hidden_states=True)
    if case.get("tokens"):
        return outputs.last_hidden_state[0].double()
    layers = case.get("layers", [])
    states = [outputs.hidden_states[layer] for layer in layers[:-1]]
    means = [state[0].mean(dim=0) for state in (*states, outputs.last_hidden_state)]
    return torch.cat(means).double()


def train(
    *,
    folder: str,
    loss_type: str,
    options: dict[str, Any],
    case: dict[str, Any],
    ds_config: dict[str, Any],
    chunk_size: int | None,
) -> dict[str, Any]:
    """The same through the engine; see `tests.parity.cases.train`."""
    model = _make_model(Path(folder), case)
    engine = cases.make_engine(model, ds_config=ds_config)
    loss_function = build_loss(loss_type, tile_size=TILE_SIZE, **options)
    model.train()
    losses, norms = [], []
    for step in range(STEPS):
        batch = _share(step, case)
        plan = plan_step(
            batch.roles,
            budget=ChunkBudget(chunk_size),
            streams=model.streams,
            filler=lambda stream: EncodedItem(*data.fillers()[stream]),
        )
        result = compute_gradient(
            engine,
            plan,
            loss_function=lambda rows, learned, batch=batch: loss_function(
                loss_inputs(batch, rows, learned)
            ),
            pad=lambda stream, items: data.pad(stream, [item.inputs for item in items]),
            trainable=model.trainable,
        )
        losses.append(float(comm.mean_over_ranks(result.loss)))
        norms.append(float(engine.step()))
    after = {_plain_name(n): value for n, value in cases.whole_parameters(engine).items()}
    engine.engine.destroy()
    return {"losses": losses, "norms": norms, "after": after}


def _make_model(folder: Path, case: dict[str, Any]) -> EmbeddingModel:
    spec = ModelSpec(
        {"": BackboneSource(name=str(folder / "text"))},
        pooling={"": "none" if case.get("tokens") else "mean"},
        layers=tuple(case.get("layers", ())),
    )
    learned = {f"init_{name}": LEARNED[name] for name in case.get("learned", ())}
    return build_model(spec, **learned)


def _share(step: int, case: dict[str, Any]) -> Batch:
    """This rank's records."""
    size = PAIRS // comm.world_size()
    first = comm.rank() * size
    pairs = slice(first, first + size)
    before = sum(COUNTS[:first])
    places = {
        "query": pairs,
        "positive": pairs,
        "negative": slice(before, before + sum(COUNTS[pairs])),
    }
    items = make_items(step)
    return Batch(
        indices=list(range(size)),
        roles={
            role: [EncodedItem("text", item) for item in items[role][part]]
            for role, part in places.items()
        },
        keys={role: KEYS[role][part] for role, part in places.items()},
        negative_counts=COUNTS[pairs],
        labels=LABELS[pairs] if "labels" in case else None,
        scores=SCORES[pairs] if "scores" in case else None,
        vectors={
            GUIDE: {
                role: Embeddings(torch.from_numpy(rows[places[role]]))
                for role, rows in make_guide(step).items()
            }
        }
        if "guide" in case
        else {},
    )


def _plain_name(name: str) -> str:
    return name.removeprefix("parts.")
