"""Training on a stream: the run on the same data read whole, at any number of ranks, resumed or not."""

from __future__ import annotations

import csv
import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.distributed.test_train import RUN, ds_file, losses_of, metrics_of, run
from tests.worlds import World

MakeConfig = Callable[..., str]
STREAM = {"streaming": True, "max_steps": 7, "val_data_path": None}  # three steps are an epoch
AUGMENTED = {"image_augmentation": [{"RandomHorizontalFlip": {"p": 0.5}}]}
TAR_COLUMNS = {"query": "txt", "positive_image": "png"}


def losses(world: World, config: str, out: Path, stage: int = 2, **more: Any) -> dict[int, float]:
    run(world, config, stage, **more)
    return losses_of(out)


@pytest.fixture
def without_dropout(clip_folder: Path, tmp_path: Path) -> str:
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = (clip_folder / "config.json").read_text()
    assert '"attention_dropout": 0.1' in text
    (folder / "config.json").write_text(
        text.replace('"attention_dropout": 0.1', '"attention_dropout": 0.0')
    )
    return str(folder)


def written(pairs: Path, folder: Path, kind: str) -> Path:
    """The pairs in another format; the images by path, or inside."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    file = folder / f"pairs.{kind}"
    if kind == "jsonl.gz":
        file.write_bytes(gzip.compress(pairs.read_bytes()))
    elif kind == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["query", "positive"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        images = [(pairs.parent / row["positive"]).read_bytes() for row in rows]
        pq.write_table(pa.table({"query": [r["query"] for r in rows], "image": images}), file)
    else:
        with tarfile.open(file, "w") as archive:
            for number, row in enumerate(rows):
                (folder / "text").write_text(row["query"])
                archive.add(folder / "text", f"{number:03d}.txt")
                archive.add(pairs.parent / row["positive"], f"{number:03d}.png")
    return file


@pytest.mark.parametrize(
    ("kind", "taught"),
    [("jsonl.gz", False), ("csv", False), ("parquet", False), ("tar", False), ("tar", True)],
)
@pytest.mark.one_in(2)
def test_a_stream_trains_as_the_data_read_whole(
    world: Callable[[int], World],
    make_config: MakeConfig,
    clip_folder: Path,
    pairs: Path,
    tmp_path: Path,
    kind: str,
    taught: bool,
) -> None:
    pytest.importorskip("kornia")
    settings = STREAM | AUGMENTED
    if taught:
        teachers = [{"model_name": str(clip_folder)}, {"ema_decay": 0.5}]
        settings |= {
            "teachers": teachers,
            "distillation_alpha": 0.1,
            "gradient_checkpointing": True,
        }
    whole = make_config(**settings | {"streaming": False, "output_dir": str(tmp_path / "whole")})
    expected = losses(world(2), whole, tmp_path / "whole")
    more = {"column_mapping": TAR_COLUMNS} if kind == "tar" else {}
    config = make_config(
        **settings | more,
        data_path=str(written(pairs, tmp_path, kind)),
        num_workers=1 if kind == "tar" else 0,
    )
    assert losses(world(2), config, tmp_path / "out") == expected
    assert len(expected) == 7
    assert "train/epoch" not in metrics_of(tmp_path / "out")[-1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.one_in(3)
def test_a_stream_does_not_depend_on_the_ranks(
    world: Callable[[int], World],
    make_config: MakeConfig,
    without_dropout: str,
    tmp_path: Path,
    stage: int,
) -> None:
    found = []
    for ranks in (1, 2):
        config = make_config(
            **STREAM | {"batch_size": 8 // ranks, "output_dir": str(tmp_path / f"out-{ranks}")},
            model_name=without_dropout,
            shuffle_buffer=5,
        )
        found.append(losses(world(ranks), config, tmp_path / f"out-{ranks}", stage))
    one, two = found
    assert two == pytest.approx(one, rel=1e-5)
    assert len(set(one.values())) == 7


def test_a_resumed_stream_continues_its_losses(
    world: Callable[[int], World], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(**STREAM, save_steps=4, shuffle_buffer=5, num_workers=1)
    expected = losses(world(2), config, tmp_path / "out")
    # In the second epoch: the stream must find out how long the first was.
    (tmp_path / "out" / "latest").write_text("checkpoint-step-4")
    assert losses(world(2), config, tmp_path / "out", resume="auto") == expected
    assert len(set(expected.values())) == 7


def test_another_stream_is_not_resumed(
    world: Callable[[int], World], make_config: MakeConfig, pairs: Path, tmp_path: Path
) -> None:
    run(world(2), make_config(**STREAM, save_steps=4), 1)
    (tmp_path / "out" / "latest").write_text("checkpoint-step-4")
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text().replace("bright", "BRIGHT"))
    for changes, message in (
        ({"data_path": str(other)}, 'data_fingerprint: "'),
        ({"shuffle_buffer": 5}, "shuffle_buffer: 10000 -> 5"),
        ({"streaming": False}, "streaming: true -> false"),
    ):
        config = make_config(**STREAM | {"save_steps": 4} | changes)
        for answer in world(2).run(RUN, config=config, ds_config=ds_file(1), resume="auto"):
            assert message in answer["error"]


def changed(pairs: Path, folder: Path, line: str) -> Path:
    lines = pairs.read_text().splitlines()
    lines[9] = line
    file = folder / "changed.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_bad_record_ends_both_ranks(
    world: Callable[[int], World], make_config: MakeConfig, pairs: Path, tmp_path: Path
) -> None:
    file = changed(pairs, tmp_path, json.dumps({"query": " ", "positive": "9.png"}))
    config = make_config(**STREAM, data_path=str(file), gradient_self_test=False)
    answers = world(2).run(RUN, config=config, ds_config=ds_file(1))
    message = f"{file}, record 9, column 'query': ' ' is a blank text"
    assert sum(answer["error"].startswith(f"DataError: {message}") for answer in answers) == 1
    assert sum(f"failed: {message}" in answer["error"] for answer in answers) == 1


def test_a_broken_line_ends_both_ranks(
    world: Callable[[int], World], make_config: MakeConfig, pairs: Path, tmp_path: Path
) -> None:
    file = changed(pairs, tmp_path, '{"query": ')
    # Near the end of a first epoch of small batches, so that training has begun.
    config = make_config(**STREAM, data_path=str(file), gradient_self_test=False, shuffle_buffer=1)
    for answer in world(2).run(RUN, config=config, ds_config=ds_file(1)):
        assert answer["error"].startswith(f"DataError: {file}: line 10 is not valid JSON")


def test_validation_data_of_a_stream_is_read_whole(
    world: Callable[[int], World], make_config: MakeConfig, pairs: Path
) -> None:
    config = make_config(
        **STREAM | {"val_data_path": str(pairs), "max_steps": 2, "warmup_ratio": 0.0}
    )
    results = run(world(2), config, 1)
    assert {"eval/recall@1", "eval/mrr"} <= results[0]["metrics"].keys()
