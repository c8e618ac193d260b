"""What `mine` writes is what plain loops find, on any number of ranks, and training reads it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.distributed.mine_cases import mine_files
from tests.mining_reference import mine_plainly, scorer
from tests.retrievers import save_text_model, sentence, write_jsonl
from tests.worlds import World
from vembed_ds import Encoder, validate

Worlds = Callable[[int], World]
CASE = "tests.distributed.mine_cases:mine_files"
INSTRUCTIONS = {"query_instruction": "find: ", "document_instruction": "about: "}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    stored = {"retrieval_mode": "t2t", **INSTRUCTIONS}
    save_text_model(base / "vectors", pooling={"": "mean"}, **stored)
    save_text_model(base / "guide", seed=3, pooling={"": "mean"})
    save_text_model(base / "tokens", pooling={"": "none"}, **stored)
    return base


def pairs_of(number: int) -> list[dict[str, str]]:
    """Records of which some share a query, some a document; one query is a document, too."""
    asked = [sentence(n * 53 + 7) for n in range(23)]
    rows = [
        {"query": asked[n % 19], "positive": f"{asked[n % 23]} sofa", "note": str(n)}
        for n in range(number)
    ]
    rows[3]["query"] = rows[5]["positive"]
    return rows


PAIRS = pairs_of(30)
CORPUS = [sentence(n * 41 + 1000) for n in range(20)] + [PAIRS[0]["positive"], PAIRS[1]["query"]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in CORPUS])


def arguments(model: Path, data: Path, output: Path, **more: Any) -> list[str]:
    given = {"model": model, "data": data, "output": output, "batch_size": 4, **more}
    words = [(f"--{key}", *([] if value is True else [str(value)])) for key, value in given.items()]
    return [word for pair in words for word in pair]


def run_on(world: Worlds, size: int, argv: list[str]) -> list[str | None]:
    return [mine_files(argv)] if size == 1 else world(size).run(CASE, argv=argv)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_scorer(model: Path, rows: Sequence[Mapping[str, str]] = PAIRS) -> Any:
    encoder = Encoder(model, device="cpu")
    sides = []
    for role, texts in (
        ("query", [row["query"] for row in rows]),
        ("document", [*(row["positive"] for row in rows), *CORPUS]),
    ):
        told = role if "query_instruction" in encoder.settings else None
        found = encoder.encode_text(texts, role=told)  # type: ignore[arg-type]
        sides.append(dict(zip(texts, found, strict=True)))
    return scorer(*sides)


SETTINGS: list[dict[str, Any]] = [
    {"num_negatives": 3, "range_max": 8, "relative_margin": None},
    {"num_negatives": 4, "range_min": 2, "range_max": 30, "relative_margin": 0.02},
    {"num_negatives": 2, "range_max": 41, "margin": 0.1, "max_score": 0.9, "min_score": 0.2},
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_plain_loops(
    world: Worlds,
    models: Path,
    data: Path,
    corpus: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    size: int,
) -> None:
    out = tmp_path / "out.jsonl"
    settings = {"relative_margin": 0.05, **settings}
    given = {k: "none" if v is None else v for k, v in settings.items()}
    argv = arguments(models / "vectors", data, out, corpus=corpus, **given)
    assert run_on(world, size, argv) == [None] * size
    found = read(out)
    assert [{k: row[k] for k in PAIRS[0]} for row in found] == PAIRS
    expected = mine_plainly(PAIRS, CORPUS, text_scorer(models / "vectors"), **settings)
    assert [row["negatives"] for row in found] == expected
    assert len({tuple(row["negatives"]) for row in found}) > 10
    for row in found:
        own = {r["positive"] for r in PAIRS if r["query"] == row["query"]}
        assert not {row["query"], *own} & {*row["negatives"]}
        assert len(set(row["negatives"])) == len(row["negatives"])


@pytest.mark.parametrize("size", [1, 2])
def test_a_guide_and_a_late_interaction_model(
    world: Worlds, models: Path, data: Path, corpus: Path, tmp_path: Path, size: int
) -> None:
    rules = {"num_negatives": 3, "range_max": 20, "relative_margin": 0.01, "guide_margin": 0.02}
    out = tmp_path / "out.jsonl"
    argv = arguments(
        models / "tokens", data, out, corpus=corpus, guide_model=models / "guide", **rules
    )
    assert run_on(world, size, argv) == [None] * size
    score, guide = text_scorer(models / "tokens"), text_scorer(models / "guide")
    expected = mine_plainly(PAIRS, CORPUS, score, guide=guide, **rules)
    assert [row["negatives"] for row in read(out)] == expected
    del rules["guide_margin"]
    assert mine_plainly(PAIRS, CORPUS, score, **rules) != expected


def test_labels_make_positives(models: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": n % 4} for n, row in enumerate(PAIRS)]
    out, data = tmp_path / "out.jsonl", write_jsonl(tmp_path / "labelled.jsonl", rows)
    rules = {"num_negatives": 4, "range_max": 9, "relative_margin": 0.01}
    assert mine_files(arguments(models / "vectors", data, out, **rules)) is None
    score = text_scorer(models / "vectors")
    assert [row["negatives"] for row in read(out)] == mine_plainly(rows, [], score, **rules)
    assert [row["negatives"] for row in read(out)] != mine_plainly(PAIRS, [], score, **rules)


def test_random_ones_are_the_same_on_any_number_of_ranks(
    world: Worlds, models: Path, data: Path, tmp_path: Path
) -> None:
    found = []
    for size, seed in ((1, 1), (2, 1), (1, 2)):
        out = tmp_path / f"{size}-{seed}.jsonl"
        argv = arguments(models / "vectors", data, out, sampling="random", seed=seed, range_max=15)
        assert run_on(world, size, argv) == [None] * size
        found.append([row["negatives"] for row in read(out)])
    assert found[0] == found[1] != found[2]


def test_negatives_that_are_there_are_replaced_only_when_asked(
    models: Path, data: Path, tmp_path: Path
) -> None:
    rows = [
        {**row, "negatives": [CORPUS[n % 20]], "neg_scores": [0.5]} for n, row in enumerate(PAIRS)
    ]
    mined, out = write_jsonl(tmp_path / "mined.jsonl", rows), tmp_path / "out.jsonl"
    argv = arguments(models / "vectors", mined, out, num_negatives=3, range_max=9)
    assert mine_files(argv) == (
        f"ConfigError: {mined}: has negatives (column 'negatives'); give --replace_negatives to find "
        "others in their place, or remove the column"
    )
    assert mine_files([*argv, "--replace_negatives"]) is None
    found = read(out)
    assert list(found[0]) == ["query", "positive", "note", "negatives"]
    expected = mine_plainly(
        PAIRS,
        CORPUS[:20],
        text_scorer(models / "vectors"),
        num_negatives=3,
        range_max=9,
        relative_margin=0.05,
    )
    assert [row["negatives"] for row in found] == expected


def test_other_column_names_and_parquet(models: Path, tmp_path: Path) -> None:
    rows = [{"q": row["query"], "d": row["positive"], "n": n} for n, row in enumerate(PAIRS)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    out = tmp_path / "out.parquet"
    argv = arguments(models / "vectors", tmp_path / "pairs.parquet", out, num_negatives=2)
    argv += ["--column_mapping", "query=q", "positive=d", "negatives=hard"]
    assert mine_files(argv) is None
    found = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))
    assert found.column_names == ["q", "d", "n", "hard"]
    assert found["n"][:] == list(range(30))
    expected = mine_plainly(
        PAIRS,
        [],
        text_scorer(models / "vectors"),
        num_negatives=2,
        range_max=20,
        relative_margin=0.05,
    )
    assert found["hard"][:] == expected


def check_by_training(tmp_path: Path, model: Path, data: Path, **changes: Any) -> None:
    """What training says of the data."""
    values = {"model_name": str(model), "data_path": str(data), "num_workers": 0, **changes}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert validate.main(["--config", str(tmp_path / "run.yaml")]) == 0


@pytest.mark.parametrize("embedded", [False, True])
def test_images_stay_as_they_were(
    clip_folder: Path,
    pairs: Path,
    tmp_path: Path,
    embedded: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = read(pairs)
    (pairs.parent / "copy.png").write_bytes((pairs.parent / "3.png").read_bytes())
    rows.append({"query": rows[3]["query"], "positive": "copy.png"})  # by content no other document
    rows.append({"query": "one more", "positive": "copy.png"})
    out = tmp_path / ("out.parquet" if embedded else "out.jsonl")
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    if embedded:
        data = tmp_path / "pairs.parquet"
        images = [(pairs.parent / row["positive"]).read_bytes() for row in rows]
        table = datasets.Dataset.from_dict(
            {
                "query": [row["query"] for row in rows],
                "image": [{"bytes": image, "path": None} for image in images],
            },
            features=datasets.Features(
                {"query": datasets.Value("string"), "image": datasets.Image()}
            ),
        )
        table.to_parquet(data)
    root = {} if embedded else {"image_root": pairs.parent}
    argv = arguments(
        clip_folder, data, out, retrieval_mode="t2i", num_negatives=3, range_max=20, **root
    )
    assert mine_files([*argv, "--relative_margin", "0.01"]) is None
    encoder = Encoder(clip_folder, device="cpu")
    names = [row["positive"].replace("copy.png", "3.png") for row in rows]
    image_emb = dict(
        zip(names, encoder.encode_image([str(pairs.parent / n) for n in names]), strict=True)
    )
    texts = [row["query"] for row in rows]
    text_emb = dict(zip(texts, encoder.encode_text(texts), strict=True))
    expected = mine_plainly(
        [{"query": t, "positive": n} for t, n in zip(texts, names, strict=True)],
        [],
        scorer(text_emb, image_emb),
        num_negatives=3,
        range_max=20,
        relative_margin=0.01,
    )
    assert sum(map(len, expected)) > 30
    if embedded:
        loaded = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))
        assert isinstance(loaded.features["image"], datasets.Image)
        cells = loaded["negative_images"][:]
        found = [[image["bytes"] for image in row] for row in cells]
        assert found == [[(pairs.parent / n).read_bytes() for n in row] for row in expected]
    else:
        assert [row["negative_images"] for row in read(out)] == expected
    check_by_training(
        tmp_path,
        clip_folder,
        out,
        retrieval_mode="t2i",
        loss_type="infonce",
        batch_size=4,
        **{k: str(v) for k, v in root.items()},
    )
    assert "26 of 26 records read, all can be used" in capsys.readouterr().out


def test_records_with_too_few_are_told_of_and_dropped_when_asked(
    models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = {"num_negatives": 4, "range_max": 6, "relative_margin": 0.05}
    argv = arguments(models / "vectors", data, tmp_path / "all.jsonl", **rules)
    assert mine_files(argv) is None
    said = capsys.readouterr().out
    expected = mine_plainly(PAIRS, [], text_scorer(models / "vectors"), **rules)
    whole = [n for n, found in enumerate(expected) if len(found) == 4]
    none = sum(not found for found in expected)
    assert 0 < len(whole) < 30
    assert f"{30 - len(whole)} records, kept, {none} of them with none" in said
    assert (
        f"written                     30 records with {sum(map(len, expected))} negatives" in said
    )
    argv = arguments(models / "vectors", data, tmp_path / "whole.jsonl", **rules)
    assert mine_files([*argv, "--drop_incomplete"]) is None
    assert [row["note"] for row in read(tmp_path / "whole.jsonl")] == [str(n) for n in whole]
    assert f"{30 - len(whole)} records, left out" in capsys.readouterr().out
    argv = arguments(models / "vectors", data, tmp_path / "none.jsonl", min_score=0.9999)
    assert str(mine_files([*argv, "--drop_incomplete"])).startswith(
        "DataError: --drop_incomplete: no record has 5 negatives, so that nothing is left to write"
    )
    assert not (tmp_path / "none.jsonl").exists()


def test_the_summary_counts_what_every_rule_dropped(
    models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = {"num_negatives": 2, "range_max": 12, "relative_margin": 0.02, "range_min": 1}
    assert mine_files(arguments(models / "vectors", data, tmp_path / "o.jsonl", **rules)) is None
    said = capsys.readouterr().out
    score = text_scorer(models / "vectors")
    first = {row["query"]: row for row in reversed(PAIRS)}  # every distinct query once
    dropped = 0
    for query in first:
        own = [r["positive"] for r in PAIRS if r["query"] == query]
        others = {r["positive"] for r in PAIRS} - {*own, query}
        best = min(score(query, d) for d in own)
        close = sorted((score(query, d) for d in others), reverse=True)[:12]
        dropped += sum(value > best - abs(best) * 0.02 for value in close)
    total = 12 * len(first)
    share = f"{100 * dropped / total:.1f} %"
    words = " ".join(said.split())
    assert f"dropped: relative_margin {dropped} ({share}): closer than the positive - its" in words
    assert f"candidates {total} of the distinct queries" in words
    pairs_found = {(r["query"], r["positive"]) for r in PAIRS}
    similar = [score(*pair) for pair in pairs_found]
    line = next(line for line in said.splitlines() if line.startswith("positives")).split()
    assert int(line[1]) == len(pairs_found)
    assert float(line[2]) == pytest.approx(np.mean(similar), abs=1e-4)
    assert [float(line[3]), float(line[-1])] == pytest.approx(
        [min(similar), max(similar)], abs=1e-4
    )


def test_dry_run_writes_nothing(
    models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.jsonl"
    assert mine_files([*arguments(models / "vectors", data, out), "--dry_run"]) is None
    assert not out.parent.exists()
    said = capsys.readouterr().out
    assert f"output: {out}: the columns of the data, and 'negatives' (texts)\nnothing was" in said
    assert "30 records, 20 distinct queries, 23 distinct documents" in said


@pytest.mark.parametrize("size", [1, 2])
def test_what_cannot_be_mined_is_said_on_every_rank(
    world: Worlds, models: Path, data: Path, corpus: Path, tmp_path: Path, size: int
) -> None:
    model, out = models / "vectors", tmp_path / "out.jsonl"
    (tmp_path / "there.jsonl").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    bad = write_jsonl(tmp_path / "bad.jsonl", [*PAIRS[:20], {"query": " ", "positive": "a"}])
    nan = tmp_path / "nan"
    if not nan.exists():
        save_text_model(nan, pooling={"": "mean"}, retrieval_mode="t2t")
        weights = load_file(nan / "model.safetensors")
        weights["encoder.layer.0.output.dense.bias"][:] = torch.nan
        save_file(weights, nan / "model.safetensors", metadata={"format": "pt"})
    cases = [
        (
            arguments(model, data, tmp_path / "there.jsonl"),
            "there.jsonl: exists; give another name",
        ),
        (
            arguments(model, data, tmp_path / "a.csv"),
            "suffix '.csv' is not one of .parquet, .jsonl",
        ),
        (arguments(model, tmp_path / "empty.jsonl", out), "empty.jsonl: holds no records"),
        (
            arguments(model, data, out, corpus=tmp_path / "empty.jsonl"),
            f"--corpus={tmp_path / 'empty.jsonl'}: holds no records",
        ),
        (arguments(model, bad, out), "record 20, column 'query': ' ' is a blank text"),
        (arguments(nan, data, out), "model's query embeddings are NaN or infinite"),
        (
            arguments(model, data, out, guide_model=nan),
            "20 guide's query embeddings are NaN or infinite" if size == 1 else "guide's query emb",
        ),
        (arguments(models / "guide", data, out), "--retrieval_mode: " + str(models / "guide")),
        (
            arguments(model, data, out, guide_margin=0.1),
            "--guide_margin 0.1: there is no --guide_m",
        ),
        (arguments(model, data, out, retrieval_mode="t2i"), "the positive is image, but the model"),
        (
            arguments(model, data, out, corpus=corpus, corpus_columns="text=body"),
            "--corpus_columns text=body: no such column; the columns are 'text'",
        ),
    ]
    for argv, message in cases:
        for error in run_on(world, size, argv):
            assert error is not None
            assert message in error
    assert not out.exists()


def test_json_does_not_hold_embedded_images(clip_folder: Path, pairs: Path, tmp_path: Path) -> None:
    image = {"bytes": (pairs.parent / "0.png").read_bytes(), "path": None}
    features = datasets.Features({"query": datasets.Value("string"), "image": datasets.Image()})
    table = datasets.Dataset.from_dict({"query": ["a"], "image": [image]}, features=features)
    table.to_parquet(tmp_path / "pairs.parquet")
    argv = arguments(
        clip_folder, tmp_path / "pairs.parquet", tmp_path / "out.jsonl", retrieval_mode="t2i"
    )
    assert (
        "column 'image' holds bytes, which JSON does not; give a name that ends in .parquet"
        in str(mine_files(argv))
    )


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (datetime.date(2020, 1, 2), "values of the type date32"),
        (datetime.datetime(2020, 1, 2, 3), "values of the type timestamp[us]"),
        (float("nan"), "NaN"),
    ],
)
def test_what_json_does_not_hold_is_said_at_once(
    models: Path, tmp_path: Path, column: Any, what: str
) -> None:
    columns = {"query": ["a", "b"], "positive": ["c", "d"], "more": [None, column]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "pairs.parquet")
    data, out = tmp_path / "pairs.parquet", tmp_path / "out.jsonl"
    error = mine_files(arguments(models / "vectors", data, out))
    assert error == (
        f"ConfigError: --output {out}: column 'more' holds {what}, which JSON does not; give a name that "
        "ends in .parquet"
    )
    out = tmp_path / "out.parquet"
    assert mine_files(arguments(models / "vectors", data, out)) is None
    assert len(datasets.Dataset.from_parquet(str(out))) == 2


def test_an_image_that_is_missing_is_named_with_its_record(
    clip_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    rows = [*read(pairs)[:3], {"query": "a", "positive": "none.png"}]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    argv = arguments(
        clip_folder, data, tmp_path / "o.jsonl", retrieval_mode="t2i", image_root=pairs.parent
    )
    assert str(mine_files(argv)).startswith(
        f"DataError: {data}, record 3, positive: image {pairs.parent / 'none.png'} does not exist"
    )


def test_paths_among_embedded_images(clip_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """A column of paths does not hold the bytes of a corpus; one of embedded images holds paths."""
    rows = read(pairs)[:6]
    image = (pairs.parent / "9.png").read_bytes()
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": image, "path": None}]}, features=features
    )
    table.to_parquet(tmp_path / "corpus.parquet")
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    argv = arguments(
        clip_folder,
        data,
        tmp_path / "out.jsonl",
        corpus=tmp_path / "corpus.parquet",
        retrieval_mode="t2i",
        relative_margin="none",
        range_max=6,
        image_root=pairs.parent,
    )
    error = mine_files(argv)
    assert error is not None
    assert (
        "corpus.parquet, record 0: the image is embedded, but those of the positives are not"
        in (error)
    )
    assert not list(tmp_path.glob(".out*"))
