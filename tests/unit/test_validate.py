"""The command that looks at every record before a run does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from tests.tiny import caption, save_picture
from vembed_ds import validate as validate_command
from vembed_ds.data import inspection
from vembed_ds.data.inspection import Findings, Lines, Problem
from vembed_ds.validate import main

NUM_PAIRS = 300


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Records whose images are five files."""
    generator = np.random.default_rng(0)
    for index in range(5):
        save_picture(tmp_path / f"{index}.png", index=index, generator=generator)
    return [{"query": caption(i), "positive": f"{i % 5}.png"} for i in range(NUM_PAIRS)]


@pytest.fixture
def validate(
    clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """``validate(rows, *flags, **keys)``: exit code, and what was printed."""

    def run(rows: list[Any], *flags: str, **keys: Any) -> tuple[int, str]:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
        config = {
            "model_name": str(clip_folder),
            "data_path": str(tmp_path / "train.jsonl"),
            "image_root": str(tmp_path),
            "output_dir": str(tmp_path / "out"),
            **keys,
        }
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
        code = main(["--config", str(tmp_path / "my.yaml"), *flags])
        printed = capsys.readouterr()
        return code, printed.out + printed.err.rpartition("\r")[2]

    return run


def test_good_data(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    for row in rows:
        row["label"] = len(row["query"]) % 3
    code, text = validate([*rows, rows[0]])
    assert code == 0
    assert f"data_path={tmp_path}/train.jsonl: 301 of 301 records read, all can be used\n" in text
    assert "  distinct: queries 300, positives 5, pairs 300\n" in text
    assert "max length 32, cut 0\n" in text
    assert "  images: width (min 20, median 20, p95 20, p99 20, max 20), height (min 20," in text
    assert "  labels: number 3, most " in text


def test_every_bad_record_is_named_wherever_it_stands(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path.parent / "outside.png").write_bytes(b"x")
    rows[2] = {"query": "  ", "positive": "0.png"}
    rows[150] = {"query": "a", "positive": "../outside.png"}
    rows[170] = {"query": "a", "positive": "https://a.b/c.png"}
    rows[200] = {"query": "a", "positive": "gone.png"}
    rows[299] = {"query": "a", "positive": "cut.png"}  # the last: no head is enough
    code, text = validate(["", *rows], "--output", str(tmp_path / "report.json"))
    assert code == 1
    assert "300 of 300 records read, PROBLEMS (3 value, 2 image)\n" in text
    file = tmp_path / "train.jsonl"
    for line, message in (
        (4, "record 2, column 'query': '  ' is a blank text; remove the record or fill it in"),
        (152, "record 150, column 'positive': image '../outside.png' lies outside image_root="),
        (172, "record 170, column 'positive': image 'https://a.b/c.png' is a https: URL, and"),
        (202, f"record 200, positive: image {tmp_path}/gone.png does not exist; correct"),
        (301, f"record 299, positive: image {tmp_path}/cut.png cannot be read (OSError: "),
    ):
        assert f"{file}:{line} " in text
        assert f"{file}, {message}" in text
    (report,) = json.loads((tmp_path / "report.json").read_text())["data"]
    assert report["counts"] == {"value": 3, "image": 2}
    assert [problem["record"] for problem in report["problems"]] == [2, 150, 170, 200, 299]
    assert report["problems"][4]["place"] == f"{file}:301"
    assert report["figures"]["images"]["width"]["max"] == 20


def test_images_may_be_left_closed(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "cut.png").write_bytes(b"no image")
    rows[3]["positive"], rows[4]["positive"] = "cut.png", "gone.png"
    code, text = validate(rows, "--images", "exists")
    assert code == 1
    assert "PROBLEMS (1 image)" in text
    assert "gone.png does not exist" in text
    assert "  images:" not in text


def test_texts_that_are_cut_are_counted(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]]
) -> None:
    rows[7]["query"] = "very " * 40
    code, text = validate(rows, num_workers=2)
    assert code == 0
    assert "max 42, max length 32, cut 1\n" in text


def test_a_limit_is_spread_over_the_data(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows[200]["positive"] = "gone.png"
    code, text = validate(rows, "--limit", "3")
    assert code == 1
    assert "3 of 300 records read, PROBLEMS (1 image)" in text


def test_long_lists_are_cut_and_counted(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]]
) -> None:
    code, text = validate([{"query": "a", "positive": "gone.png"}] * 30 + rows)
    assert code == 1
    assert "PROBLEMS (30 image)" in text
    assert text.count("gone.png does not exist") == 20
    assert "and 10 more (--output lists them)" in text


def test_kept_problems_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "KEPT", 2)
    found, part = Findings(), Findings(records=3)
    for record in range(3):
        part.report(Problem("image", "gone", record))
    found.add(part)
    found.add(part)
    assert len(found.problems) == 2


def test_validation_pairs_that_are_trained_on(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    other = [*rows[:4], {"query": "new", "positive": "0.png"}]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    code, text = validate(rows, val_data_path=str(tmp_path / "val.jsonl"))
    assert code == 0
    assert "val.jsonl: 5 of 5 records read, all can be used\n" in text
    assert "  pairs also trained on: 4\n" in text


def test_a_broken_file_does_not_hide_the_others(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "val.jsonl").write_text(json.dumps(rows[0]) + "\n" + '{"query": "a", \n')
    code, text = validate(rows, val_data_path=str(tmp_path / "val.jsonl"))
    assert code == 1
    assert "300 of 300 records read, all can be used\n" in text
    assert "val_data_path: PROBLEMS (1 file)\n" in text
    assert "line 2 is not valid JSON" in text


def test_several_data_sets_are_named(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "b.csv").write_text("query,positive\na,0.png\nb,gone.png\n")
    entries = [{"data_path": str(tmp_path / name)} for name in ("train.jsonl", "b.csv")]
    code, text = validate(rows, data_path=None, datasets=entries)
    assert code == 1
    assert "300 of 300 records read, all can be used" in text
    assert "b.csv: 2 of 2 records read, PROBLEMS (1 image)\n" in text
    assert f"{tmp_path}/b.csv:3 " in text


def test_a_dry_run_says_what_would_be_read_and_written(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    report, picture = tmp_path / "new" / "report.json", tmp_path / "pairs.png"
    flags = ["--dry_run", "--limit", "7", "--output", str(report), "--thumbnails", str(picture)]
    rows[3]["positive"] = "gone.png"
    code, text = validate(rows, *flags)
    assert code == 0
    assert text == (
        f"data_path={tmp_path}/train.jsonl: 7 of 300 records would be read\n"
        f"would write {report}\nwould write {picture}\n"
    )
    assert not report.parent.exists()
    assert not picture.exists()
    assert not (tmp_path / "out").exists()


def test_a_dry_run_opens_the_data(validate: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, text = validate([{"question": "a", "positive": "0.png"}], "--dry_run")
    assert code == 2
    assert "no column holds the text of the query" in text


@pytest.mark.parametrize("flag", ["--output", "--thumbnails"])
def test_files_that_cannot_be_written_are_named_before_anything_is_read(
    validate: Callable[..., tuple[int, str]],
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
) -> None:
    monkeypatch.setattr(validate_command, "check", None)
    code, text = validate(rows, flag, "/dev/null/file")
    assert code == 2
    assert f"error: {flag} /dev/null/file: /dev/null is no folder to write to" in text


def test_wrong_configuration(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]]
) -> None:
    code, text = validate(rows, batch_sise=3)
    assert code == 2
    assert text.startswith("error: batch_sise=3 (")
    assert "did you mean batch_size?" in text


def test_data_that_its_loss_does_not_look_at(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    for row in rows:
        row["graded"] = 0.5
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[0]) + "\n")
    mapped = {"column_mapping": {"score": "graded"}}
    code, text = validate(rows, **mapped)
    assert code == 2
    assert text.startswith("error: loss_type=infonce: does not look at the scores of ")
    assert validate(rows, loss_type="cosent", **mapped)[0] == 0
    entries = [{"data_path": str(tmp_path / name)} for name in ("train.jsonl", "b.jsonl")]
    entries[1] |= mapped
    keys = {"data_path": None, "batching": "homogeneous", "batch_size": 1}
    code, text = validate(rows, datasets=entries, **keys)
    assert code == 2
    assert "does not look at the scores of " + str(tmp_path / "b.jsonl") in text
    entries[1]["loss"] = {"loss_type": "cosent"}
    assert validate(rows, datasets=entries, **keys)[0] == 0


def test_a_teachers_scores(
    validate: Callable[..., tuple[int, str]],
    rows: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [row | {"pos_scores": [0.5]} for row in rows[:3]]
    assert validate(rows, val_data_path=None)[0] == 0
    assert "train.jsonl: its pos_scores are not used without teacher_scores" in caplog.text
    code, text = validate(rows, column_mapping={"pos_scores": "pos_scores"})
    assert code == 2
    assert text.startswith(
        "error: column_mapping pos_scores='pos_scores': teacher_scores is not set"
    )
    code, text = validate(rows, teacher_scores=True)
    assert code == 2
    assert "distillation_loss_type=kl: compares a query's documents with each other" in text
    rows[1]["pos_scores"] = []
    follow = {"teacher_scores": True, "distillation_loss_type": "mse"}
    code, text = validate(rows, **follow)
    assert code == 1
    assert "record 1, column 'pos_scores': [] is no score; give one for each" in text
    code, text = validate([{"query": "a", "positive": "0.png"}], **follow)
    assert code == 1
    assert "no column holds the scores of the positives: looked for 'pos_scores'" in text


def test_data_that_fills_no_global_batch_is_noted(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    code, text = validate(rows, "--output", str(report), batch_size=301)
    assert code == 0
    note = (
        "on one rank, 300 records do not fill one global batch of 301 (batch_size x ranks); lower"
    )
    assert f"\nnote: {note}" in text
    (noted,) = json.loads(report.read_text())["notes"]
    assert noted.startswith(note)
    assert "note:" not in validate(rows, batch_size=300)[1]
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[0]) + "\n")
    entries = [{"data_path": str(tmp_path / name)} for name in ("train.jsonl", "b.jsonl")]
    assert "note:" not in validate(rows, data_path=None, datasets=entries, batch_size=301)[1]
    keys = {"data_path": None, "batching": "homogeneous", "batch_size": 2}
    _, text = validate(rows, datasets=entries, **keys)
    assert (
        f"note: on one rank, {tmp_path}/b.jsonl: 1 records do not fill one global batch of 2"
        in text
    )


def test_columns_that_are_missing(validate: Callable[..., tuple[int, str]]) -> None:
    code, text = validate([{"a": "b"}], column_mapping={"query": "text"})
    assert code == 1
    assert "column_mapping query='text' names a missing column; the columns are 'a'" in text


def test_thumbnails(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    rows[0]["positive"] = "gone.png"
    code, _ = validate(rows, "--thumbnails", str(tmp_path / "some.png"), "--images", "exists")
    assert code == 1
    with Image.open(tmp_path / "some.png") as picture:
        assert picture.size[0] > 300
        assert (0x1A, 0x98, 0x50) in {
            colour for _, colour in picture.convert("RGB").getcolors(10**6)
        }


def test_lines_are_only_named_when_they_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('query,positive\n"a\nb",c\nd,e\n')
    assert Lines([tmp_path / "a.csv"], num_records=2).find(1) == "record 1"
    assert Lines([tmp_path / "a.csv"], num_records=3).find(0) == f"{tmp_path}/a.csv:2"
    assert Lines([tmp_path / "a.parquet"], num_records=3).find(0) == "record 0"
    (tmp_path / "b.jsonl").write_text("{}\n\n{}\n")
    two = Lines([tmp_path / "b.jsonl", tmp_path / "b.jsonl"], num_records=4)
    assert [two.find(record)[-2:] for record in range(4)] == [":1", ":3", ":1", ":3"]
    assert two.find(None) == ""


@pytest.mark.parametrize("num_workers", [0, 3])
def test_threads_find_the_same(
    validate: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], num_workers: int
) -> None:
    for place in range(0, NUM_PAIRS, 7):
        rows[place]["positive"] = f"gone-{place}.png"
    _, text = validate(rows, num_workers=num_workers)
    assert "PROBLEMS (43 image)" in text
    assert text.index("gone-0.png") < text.index("gone-7.png") < text.index("gone-133.png")
