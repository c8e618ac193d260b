"""What of a loss is shown: its parts by formula, accuracy by brute force; and that watching changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vembed_ds.losses import SAMPLE, Embeddings, LossInputs, TeacherScores, Watched, build_loss
from vembed_ds.losses.combination import Distillation

B, D = 12, 8


def inputs_of(seed: int = 0, *, number: int = B, near: float = 0.7, **more: Any) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(number, D, generator=generator)
    positive = near * query + torch.randn(number, D, generator=generator)
    return LossInputs(Embeddings(query), Embeddings(positive), **more)


def cosines(rows: Embeddings, columns: Embeddings) -> np.ndarray:
    a, b = rows.values.double().numpy(), columns.values.double().numpy()
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    found: np.ndarray = a @ b.T
    return found


def accuracy_of(loss_type: str, inputs: LossInputs, tile_size: int | None, **options: Any) -> float:
    watched = Watched()
    loss = build_loss(loss_type, tile_size=tile_size, **options)
    loss(replace(inputs, watched=watched))
    assert watched.accuracy is not None
    return float(watched.accuracy)


@pytest.mark.parametrize("tile_size", [None, 2, 5])
def test_accuracy_of_plain_pairs(tile_size: int | None) -> None:
    inputs = inputs_of()
    table = cosines(inputs.query, inputs.positive)
    expected = float(np.mean(table.argmax(axis=1) == np.arange(B)))
    assert 0.2 < expected < 1
    assert accuracy_of("infonce", inputs, tile_size, temperature=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("tile_size", [None, 3])
@pytest.mark.parametrize("scope", ["own", "shared"])
def test_accuracy_sees_the_negatives_that_the_loss_sees(scope: str, tile_size: int | None) -> None:
    counts = [place % 3 for place in range(B)]
    owner = np.repeat(np.arange(B), counts)
    plain = inputs_of()
    generator = torch.Generator().manual_seed(7)
    hard = plain.query.values[owner] + 0.8 * torch.randn(len(owner), D, generator=generator)
    inputs = replace(plain, negative=Embeddings(hard), negative_counts=torch.tensor(counts))
    table = cosines(inputs.query, inputs.positive)
    against = cosines(inputs.query, Embeddings(hard))
    hits = []
    for row in range(B):
        seen = against[row] if scope == "shared" else against[row][owner == row]
        others = np.concatenate([np.delete(table[row], row), seen])
        hits.append(table[row, row] > others.max())
    found = accuracy_of("infonce", inputs, tile_size, temperature=0.1, negatives_scope=scope)
    assert found == pytest.approx(np.mean(hits))
    assert found != accuracy_of("infonce", plain, tile_size, temperature=0.1)


@pytest.mark.parametrize(
    ("mode", "loss_type"), [("multi_positive", "infonce"), ("mask", "triplet")]
)
def test_accuracy_with_labels(mode: str, loss_type: str) -> None:
    labels = torch.arange(B) % 4
    inputs = inputs_of(near=0.3, labels=labels)
    table, same = cosines(inputs.query, inputs.positive), labels.numpy()[:, None] == labels.numpy()
    hits = []
    for row in range(B):
        right = table[row][same[row]].max() if mode == "multi_positive" else table[row, row]
        hits.append(right > table[row][~same[row]].max())
    options = {"temperature": 0.1} if loss_type == "infonce" else {"triplet_margin": 0.5}
    assert accuracy_of(loss_type, inputs, 3, label_mode=mode, **options) == pytest.approx(
        np.mean(hits)
    )


def test_accuracy_without_duplicates_of_the_answer() -> None:
    plain = inputs_of()
    twice = plain.positive.values.clone()
    twice[1] = twice[0]
    keys = torch.tensor([0, 0, *range(2, B)])
    inputs = replace(
        plain, positive=Embeddings(twice), positive_keys=keys, query_keys=torch.arange(B)
    )
    table = cosines(inputs.query, inputs.positive)
    same = keys.numpy()[:, None] == keys.numpy()
    hits = [table[r, r] > table[r][~same[r]].max() for r in range(B)]
    found = accuracy_of("infonce", inputs, None, temperature=0.1, mask_duplicates=True)
    assert found == pytest.approx(np.mean(hits))
    # Seen as a negative, the copy ties: a miss.
    assert accuracy_of("infonce", inputs, None, temperature=0.1) <= np.mean(hits)


def test_equal_embeddings_are_no_success() -> None:
    ones = Embeddings(torch.ones(B, D))
    assert accuracy_of("infonce", LossInputs(ones, ones), 4, temperature=0.1) == 0.0


def test_accuracy_of_a_sample_of_a_large_batch() -> None:
    inputs = inputs_of(number=SAMPLE + 30, near=1.5)
    table = cosines(inputs.query, inputs.positive)
    expected = np.mean(table.argmax(axis=1)[:SAMPLE] == np.arange(SAMPLE))
    assert accuracy_of("infonce", inputs, 64, temperature=0.1) == pytest.approx(expected)


def test_graded_pairs_have_no_accuracy() -> None:
    watched = Watched()
    inputs = inputs_of(scores=torch.linspace(0, 1, B, dtype=torch.float64), watched=watched)
    build_loss("cosent", cosent_scale=20.0)(inputs)
    assert watched.accuracy is None
    assert watched.gathered_values == B * D


def test_gathered_values_count_all_columns() -> None:
    watched = Watched()
    negative = {
        "negative": Embeddings(torch.ones(3, D)),
        "negative_counts": torch.tensor([3] + [0] * 11),
    }
    inputs = inputs_of(watched=watched, **negative)
    build_loss("infonce", temperature=0.1, loss_bidirectional=True)(inputs)
    assert watched.gathered_values == (B + B + 3) * D


@pytest.mark.parametrize("watching", [False, True])
@pytest.mark.parametrize("layers", [None, (2, 5)])
def test_parts_of_matryoshka_in_several_directions(
    layers: tuple[int, ...] | None, watching: bool
) -> None:
    """Each is the loss of its dimensions and direction alone; with their weights they are the loss."""
    inputs = inputs_of(watched=Watched() if watching else None)
    weights, layer_weights = (1.0, 0.5), (0.25, 1.0)
    options: dict[str, Any] = {"temperature": 0.1, "loss_bidirectional": True}
    loss = build_loss(
        "infonce",
        use_mrl=True,
        mrl_dims=(4, 2),
        mrl_weights=weights,
        mrl_layers=layers,
        mrl_layer_weights=layer_weights if layers else None,
        **options,
    )(inputs)
    parts, total = dict(inputs.parts), 0.0
    for place, layer in enumerate(layers or (1,)):
        for dim, weight in zip((4, 2), weights, strict=True):
            start = place * (D // len(layers or (1,)))
            cut = [e.dims(start, start + dim) for e in (inputs.query, inputs.positive)]
            name = f"layer_{layer}_dim_{dim}" if layers else f"dim_{dim}"
            forth = build_loss("infonce", temperature=0.1)(LossInputs(*cut))
            back = build_loss("infonce", temperature=0.1)(LossInputs(*reversed(cut)))
            assert float(parts.pop(f"{name}_query_to_doc")) == pytest.approx(float(forth), rel=1e-6)
            assert float(parts.pop(f"{name}_doc_to_query")) == pytest.approx(float(back), rel=1e-6)
            part = float(parts.pop(name))
            assert part == pytest.approx(float(forth + back) / 2, rel=1e-6)
            total += (layer_weights[place] if layers else 1.0) * weight * part
    assert parts == {}
    assert float(loss) == pytest.approx(total, rel=1e-6)


def test_a_joint_softmax_and_a_single_direction_have_no_parts() -> None:
    for directions in (("query_to_doc",), ("query_to_doc", "doc_to_query")):
        inputs = inputs_of()
        build_loss("infonce", temperature=0.1, loss_directions=directions)(inputs)
        assert inputs.parts == {}


def test_parts_of_several_teachers() -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.ones(B, dtype=torch.int64)
    teachers = tuple(
        TeacherScores(torch.rand(B, generator=generator), torch.rand(B, generator=generator))
        for _ in range(2)
    )
    negative = {
        "negative": Embeddings(torch.randn(B, D, generator=generator)),
        "negative_counts": counts,
    }

    def parts(
        seen: tuple[TeacherScores, ...], weights: list[float], **more: Any
    ) -> dict[str, float]:
        inputs = inputs_of(teachers=seen, **negative)
        rule = Distillation("kl", weights, alpha=lambda step: 0.5, **more)
        build_loss("infonce", temperature=0.1, distillation=rule)(inputs)
        return {name: float(part) for name, part in inputs.parts.items()}

    both = parts(teachers, [1.0, 3.0], names=["a", "b"])
    first, second = (parts((teacher,), [1.0])["distillation"] for teacher in teachers)
    assert both.keys() == {"task", "distillation", "teacher_a", "teacher_b"}
    assert both["teacher_a"] == pytest.approx(first)
    assert both["teacher_b"] == pytest.approx(second)
    assert both["distillation"] == pytest.approx((first + 3 * second) / 4)
    assert parts(teachers, [1.0, 1.0]).keys() == {"task", "distillation", "teacher_1", "teacher_2"}


def test_watching_changes_no_bit_of_loss_and_gradient() -> None:
    found = []
    for watched in (None, Watched()):
        inputs = inputs_of(watched=watched, labels=torch.arange(B) % 5)
        leaves = [inputs.query.values.requires_grad_(), inputs.positive.values.requires_grad_()]
        state = torch.get_rng_state()
        loss = build_loss("infonce", temperature=0.1, loss_bidirectional=True, tile_size=5)(inputs)
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for plain, watched_too in zip(*found, strict=True):
        assert plain is not None
        assert torch.equal(plain, watched_too)
