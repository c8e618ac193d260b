"""The whole batch in one plain PyTorch process: no DeepSpeed and no code of the project."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from tests.parity.data import CLIPS, SHARED, TEXTS, make_batch, pad

PROJECTION = 12
NUM_PATCHES = 2


class PlainModel(nn.Module):
    """Backbones and heads side by side, called by stream."""

    def __init__(self, folder: Path, *, kind: str, temperature: float) -> None:
        super().__init__()
        self.kind = kind
        self.parts = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.logit_scale = None
        if kind in CLIPS:
            self.parts["clip"] = AutoModel.from_pretrained(folder / "clip")
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        elif kind == "patches":
            self.parts["image"] = AutoModel.from_pretrained(folder / "image")
        elif kind in SHARED:
            self.parts["text"] = AutoModel.from_pretrained(folder / "text")
        else:
            heads = torch.load(folder / "heads.pt")
            for stream in ("text", "image"):
                self.parts[stream] = AutoModel.from_pretrained(folder / stream)
                self.heads[stream] = nn.Linear(16, PROJECTION, bias=False)
                self.heads[stream].load_state_dict({"weight": heads[stream]})
        if kind == "frozen":
            self.parts["text"].requires_grad_(False)

    def forward(self, stream: str, inputs: dict[str, Tensor]) -> Tensor:
        if stream == "joint":
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            image = {"pixel_values": inputs["pixel_values"]}
            parts = [self("text", text), self("image", image)]
            return sum(functional.normalize(part.float(), dim=-1) for part in parts)
        if stream == "image":
            dtype = next(self.parameters()).dtype
            inputs = {"pixel_values": inputs["pixel_values"].to(dtype)}
        if self.kind in CLIPS:
            clip = self.parts["clip"]
            encode = clip.get_text_features if stream == "text" else clip.get_image_features
            return encode(**inputs).pooler_output
        hidden = self.parts[stream](**inputs).last_hidden_state
        if self.kind in SHARED:
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            return (hidden * mask).sum(1) / mask.sum(1)
        return self.heads[stream](hidden[:, 0])


def train_plain(
    folder: Path,
    *,
    kind: str,
    steps: int,
    optimizer: dict[str, Any],
    max_grad_norm: float,
    bidirectional: bool,
    temperature: float,
    dropout_plan: tuple[int, int] | None,
    dtype: torch.dtype = torch.float32,
    decay_matrices_only: bool = False,
    cosine: tuple[int, int] | None = None,
    change: Callable[[PlainModel], object] | None = None,
    rates: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Train ``steps`` steps; losses, gradient norms, and every parameter before and after.

    ``dropout_plan`` is ``(world size, chunk size)``: with dropout the same random numbers must
    be drawn, so every chunk of every rank, cut from its items sorted by length, is embedded under
    its rank's stream of random numbers. Nothing else is distributed about it: all graphs are kept
    and the loss is computed once, on all rows. Without dropout the batch is embedded at once.

    ``cosine`` is ``(warm-up steps, steps of the whole run)``; ``None``: a constant rate.
    ``change`` alters the model before anything is trained. ``rates`` are learning rates of
    parameters by the start of their names.
    """
    model = PlainModel(folder, kind=kind, temperature=temperature)
    if change is not None:
        change(model)
    model.train()
    if kind == "frozen":
        model.parts["text"].eval()
    model.to(dtype)  # 16 bit: the optimizer works on float32 copies ("master weights")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    masters = {n: p if dtype == torch.float32 else p.detach().float() for n, p in trained.items()}
    before = {name: p.detach().clone() for name, p in masters.items()}
    settings = dict(optimizer)
    groups = _groups(masters, decay_matrices_only=decay_matrices_only)
    if rates:
        groups = _one_each(masters, groups, rates)
    stepper = getattr(torch.optim, settings.pop("type"))(groups, **settings)
    highest = [group["lr"] for group in stepper.param_groups]
    rng: dict[int, Tensor] = {}
    losses, norms = [], []
    for step in range(steps):
        records = make_batch(kind, step)
        scale = (
            model.logit_scale.float().exp() if model.logit_scale is not None else 1 / temperature
        )
        num_pairs = len(records)
        if kind in TEXTS:
            logits = _with_negatives(model, records, scale)
        elif kind == "patches":
            rows, columns = (
                [_patches(model, record[role]) for record in records]
                for role in ("query", "positive")
            )
            logits = _maxsim(rows, columns) * scale
        else:
            roles = _embed(model, records, dropout_plan, rng)
            query, positive = (
                functional.normalize(roles[r].float(), dim=-1) for r in ("query", "positive")
            )
            logits = query @ positive.T * scale
        target = torch.arange(num_pairs)
        loss = functional.cross_entropy(logits, target)
        if bidirectional:
            loss = (loss + functional.cross_entropy(logits[:, :num_pairs].T, target)) / 2
        model.zero_grad()
        loss.backward()
        for parameter in trained.values():  # what the batch does not touch has gradient zero
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for name, parameter in trained.items():
            masters[name].grad = parameter.grad.float()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in masters.values()])))
        if max_grad_norm:
            nn.utils.clip_grad_norm_(masters.values(), max_grad_norm)
        if cosine:
            for group, rate in zip(stepper.param_groups, highest, strict=True):
                group["lr"] = rate * _warm_up_cosine(step, *cosine)
        stepper.step()
        for name, parameter in trained.items():
            parameter.data.copy_(masters[name].data)
        losses.append(float(loss.detach()))
    after = {name: p.detach().clone() for name, p in masters.items()}
    return {"losses": losses, "norms": norms, "before": before, "after": after}


def _with_negatives(model: PlainModel, records: list[dict[str, Any]], scale: float) -> Tensor:
    """Logits of the queries against the positives, then all negatives."""
    queries = [record["query"] for record in records]
    documents = [record["positive"] for record in records]
    documents += [negative for record in records for negative in record["negatives"]]
    if model.kind != "tokens":
        rows, columns = (
            functional.normalize(model("text", pad("text", [i for _, i in items])), dim=-1)
            for items in (queries, documents)
        )
        return rows @ columns.T * scale
    rows, columns = ([_tokens(model, item) for item in items] for items in (queries, documents))
    return _maxsim(rows, columns) * scale


def _maxsim(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    scores = [[(q @ d.T).amax(dim=1).mean() for d in columns] for q in rows]
    return torch.stack([torch.stack(row) for row in scores])


def _patches(model: PlainModel, item: Any) -> Tensor:
    """Unit vectors of the class token and of the two patches most like it, in their order."""
    hidden = model.parts["image"](**pad("image", [item[1]])).last_hidden_state[0]
    states = hidden.detach()
    likeness = [float(functional.cosine_similarity(states[0], h, dim=0)) for h in states[1:]]
    best = sorted(range(len(likeness)), key=lambda i: -likeness[i])[:NUM_PATCHES]
    return functional.normalize(hidden[[0, *(i + 1 for i in sorted(best))]], dim=-1)


def _tokens(model: PlainModel, item: Any) -> Tensor:
    """Unit vectors of one text's tokens, embedded by itself."""
    hidden = model.parts["text"](**pad("text", [item[1]])).last_hidden_state[0]
    return functional.normalize(hidden, dim=-1)


def _groups(masters: dict[str, Tensor], *, decay_matrices_only: bool) -> list[dict[str, Any]]:
    if not decay_matrices_only:
        return [{"params": list(masters.values())}]
    # A class token [1, 1, D], a bias, a norm and the temperature are no matrices.
    matrices = [n for n, p in masters.items() if sum(size > 1 for size in p.shape) >= 2]
    others = [n for n in masters if n not in matrices]
    return [
        {"params": [masters[n] for n in matrices]},
        {"params": [masters[n] for n in others], "weight_decay": 0.0},
    ]


def _one_each(
    masters: dict[str, Tensor], groups: list[dict[str, Any]], rates: dict[str, float]
) -> list[dict[str, Any]]:
    """A group for every parameter, with its own rate where it has one."""
    names = {id(parameter): name for name, parameter in masters.items()}
    single = [{**group, "params": [p]} for group in groups for p in group["params"]]
    for group in single:
        name = names[id(group["params"][0])]
        for start, rate in rates.items():
            if name.startswith(start):
                group["lr"] = rate
    return single


def _warm_up_cosine(step: int, warm_up: int, total: int) -> float:
    if step < warm_up:
        return step / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up))) / 2


def _embed(
    model: PlainModel,
    records: list[dict[str, Any]],
    dropout_plan: tuple[int, int] | None,
    rng: dict[int, Tensor],
) -> dict[str, Tensor]:
    rows = ("query", "positive")
    world, chunk = dropout_plan or (1, len(records) * 2)
    per_rank = len(records) // world
    shares = [records[rank * per_rank :][:per_rank] for rank in range(world)]
    streams = [_sorted_streams(share, rows) for share in shares]
    lengths = [{s: [_length(i) for _, i in found] for s, found in own.items()} for own in streams]
    cuts = [{s: _cut(found, chunk) for s, found in own.items()} for own in lengths]
    embedded: dict[str, list[Tensor]] = {role: [] for role in rows}
    for rank, share in enumerate(shares):
        if dropout_plan:
            torch.set_rng_state(rng.get(rank, torch.Generator().manual_seed(rank).get_state()))
        found: dict[Any, Tensor] = {}
        for stream, parts in cuts[rank].items():
            # Every rank makes as many chunks as the one that makes most.
            most = max(len(of_rank.get(stream, [])) for of_rank in cuts)
            _split(parts, lengths[rank][stream], most)
        for number in range(max(map(len, cuts[rank].values()))):
            for stream in sorted(streams[rank], reverse=True):  # text before image
                for part in cuts[rank][stream][number : number + 1]:
                    items = [streams[rank][stream][place] for place in part]
                    outputs = model(stream, pad(stream, [inputs for _, inputs in items]))
                    found |= dict(zip([place for place, _ in items], outputs, strict=True))
        for role in rows:
            embedded[role] += [found[role, index] for index in range(len(share))]
        rng[rank] = torch.get_rng_state()
    return {role: torch.stack(found) for role, found in embedded.items()}


def _sorted_streams(
    records: list[dict[str, Any]], roles: tuple[str, ...]
) -> dict[str, list[tuple[tuple[str, int], Any]]]:
    """By stream the items with their places ``(role, index)``, the longest first."""
    streams: dict[str, list[Any]] = {}
    for role in roles:
        for index, record in enumerate(records):
            stream, inputs = record[role]
            streams.setdefault(stream, []).append(((role, index), inputs))
    return {s: sorted(found, key=lambda item: -_length(item[1])) for s, found in streams.items()}


def _length(inputs: Any) -> int:
    return len(inputs["input_ids"]) if "input_ids" in inputs else 1


def _cut(lengths: list[int], chunk: int) -> list[list[int]]:
    """Places of each chunk: as many as take no more, padded, than ``chunk`` of the longest.

    An eighth of that may be padding, unless there would be more chunks than of ``chunk`` items.
    """
    budget = chunk * lengths[0]
    for padding in (budget // 8, budget):
        parts: list[list[int]] = []
        for place in range(len(lengths)):
            part = [*parts[-1], place] if parts else []
            taken = len(part) * lengths[part[0]] if part else 0
            if part and taken <= budget and taken - sum(lengths[p] for p in part) <= padding:
                parts[-1] = part
            else:
                parts.append([place])
        if len(parts) <= math.ceil(len(lengths) / chunk):
            break
    return parts


def _split(parts: list[list[int]], lengths: list[int], number: int) -> None:
    """Halve the largest until there are ``number``."""
    while len(parts) < number:
        largest = max((p for p in parts if len(p) > 1), key=lambda p: len(p) * lengths[p[0]])
        at, middle = parts.index(largest), (len(largest) + 1) // 2
        parts[at : at + 1] = [largest[:middle], largest[middle:]]
