"""A family trained by one plain process, item by item: no padding, no chunk, no project code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.parity.families import FAMILIES
from tests.parity.lora_cases import PlainAdapter

COMPOSED = {
    "composed": {"text": "bert", "image": "convnext"},
    "composed with NaFlex": {"text": "bert", "image": "siglip2_vision"},
}
TEMPERATURE = 0.1
RANK_SHARE = 6
# Explicit negatives of every record, by step; the second rank has none in the first.
NEGATIVES = (
    (2, 0, 1, 0, 0, 0, *[0] * RANK_SHARE),
    (0, 1, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0),
    (0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0),
)


class PlainFamily(nn.Module):
    """The Hugging Face model of a folder, or two of them with heads."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__()
        self.name = name
        self.models = nn.ModuleDict()
        if name in COMPOSED:
            for stream, family in COMPOSED[name].items():
                self.models[stream] = FAMILIES[family].load(folder / f"{stream}_encoder")
        else:
            self.models["one"] = FAMILIES[name].load(folder)

    def add_heads(self, heads: dict[str, dict[str, Tensor]]) -> None:
        """Linear, GELU, Linear of each stream."""
        for stream, state in heads.items():
            shapes = [state[name].shape for name in ("0.weight", "2.weight")]
            head = nn.Sequential(
                nn.Linear(shapes[0][1], shapes[0][0]),
                nn.GELU(),
                nn.Linear(shapes[1][1], shapes[1][0], bias=False),
            )
            head.load_state_dict(state)
            self.models[f"{stream}_head"] = head

    def forward(self, item: tuple[str, dict[str, Any]]) -> Tensor:
        """``[D]``, or ``[L, D]``; every vector of unit norm."""
        stream, inputs = item
        if self.name in COMPOSED:
            family = FAMILIES[COMPOSED[self.name][stream]]
            row = family.embed(self.models[stream], stream, inputs)
            row = self.models[f"{stream}_head"](row)
        else:
            row = FAMILIES[self.name].embed(self.models["one"], stream, inputs)
        return functional.normalize(row, dim=-1)


def train_plain(
    name: str,
    folder: Path,
    steps: list[dict[str, list[Any]]],
    *,
    optimizer: dict[str, Any],
    heads: dict[str, Any],
    lora: bool = False,
) -> dict[str, Any]:
    """Losses, gradient norms, and every trained parameter before and after."""
    model = PlainFamily(name, folder)
    model.add_heads(heads)
    if lora:
        adapt_blocks(model)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    stepper = torch.optim.SGD(trained.values(), lr=optimizer["lr"], momentum=optimizer["momentum"])
    losses, norms = [], []
    for roles in steps:
        rows = {role: [model(item) for item in items] for role, items in roles.items()}
        loss = plain_loss(rows["query"], rows["positive"], rows["negative"])
        model.zero_grad()
        loss.backward()
        for parameter in trained.values():  # what the batch does not touch has gradient zero
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norms.append(float(nn.utils.get_total_norm([p.grad for p in trained.values()])))
        stepper.step()
        losses.append(float(loss.detach()))
    after = {name: p.detach().clone() for name, p in trained.items()}
    return {"losses": losses, "norms": norms, "before": before, "after": after}


def adapt_blocks(model: PlainFamily) -> None:
    """Adapters in every linear layer of a repeated block, and nothing else trained."""
    names = {module: name for name, module in model.named_modules()}
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    inside = dict.fromkeys(m for b in blocks for m in b.modules() if type(m) is nn.Linear)
    model.requires_grad_(False)
    for module in inside:
        owner, _, leaf = names[module].rpartition(".")
        adapter = PlainAdapter(module, names[module], variant="lora", dropout=0.0)
        setattr(model.get_submodule(owner), leaf, adapter)


def plain_loss(query: list[Tensor], positive: list[Tensor], negative: list[Tensor]) -> Tensor:
    """InfoNCE in both directions over all rows, the negatives behind the positives.

    Of token embeddings s is MaxSim, the mean over the query's tokens.
    """
    documents = [*positive, *negative]
    if query[0].dim() == 2:
        scores = [[(q @ d.T).amax(dim=1).mean() for d in documents] for q in query]
        logits = torch.stack([torch.stack(row) for row in scores]) / TEMPERATURE
    else:
        logits = torch.stack(query) @ torch.stack(documents).T / TEMPERATURE
    target = torch.arange(len(query))
    back = logits[:, : len(query)].T
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(back, target)) / 2
