"""The files of `encode` are those of `Encoder`, on any number of ranks, also after any kill."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.encode_cases import encode_files, files_of
from tests.retrievers import save_text_model, sentence, write_jsonl
from tests.worlds import World
from vembed_ds import Encoder, run_lock
from vembed_ds.data.records import Item

Worlds = Callable[[int], World]
CASE = "tests.distributed.encode_cases:encode_files"
NUM_ROWS = 23
BLOCK_ROWS = 5  # 5 blocks, the last of 3 rows
INSTRUCTIONS = {"query_instruction": "find: ", "document_instruction": "about: "}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    save_text_model(base / "vectors", pooling={"": "mean"}, **INSTRUCTIONS)
    save_text_model(base / "tokens", pooling={"": "none"}, **INSTRUCTIONS)
    return base


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": f"d{n}", "document": sentence(n * 37)} for n in range(NUM_ROWS)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    given = {"--model": model, "--data": data, "--output": output, "--batch_size": 3}
    return [*(str(word) for pair in given.items() for word in pair), *more]


def rows_of(folder: Path) -> list[np.ndarray[Any, Any]]:
    """One array per row of the table, read as the docs say."""
    values = np.load(folder / "embeddings.npy", mmap_mode="r")
    if not (folder / "offsets.npy").exists():
        return [values[row : row + 1] for row in range(len(values))]
    offsets = np.load(folder / "offsets.npy")
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


def expected_rows(model: Path, data: Path, **options: Any) -> list[np.ndarray[Any, Any]]:
    """Row by row by `Encoder`, each alone."""
    encoder = Encoder(model, device="cpu")
    texts = [json.loads(line)["document"] for line in data.read_text().splitlines()]
    return [np.atleast_2d(encoder.encode_text(text, **options)[0]) for text in texts]


def run_on(world: Worlds, size: int, argv: list[str], **options: Any) -> list[dict[str, Any]]:
    if size == 1:
        return [encode_files(argv, block_rows=BLOCK_ROWS, **options)]
    return world(size).run(CASE, argv=argv, block_rows=BLOCK_ROWS, **options)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["vectors", "tokens"])
def test_the_files_are_what_the_encoder_gives(
    world: Worlds, models: Path, corpus: Path, tmp_path: Path, kind: str, size: int
) -> None:
    results = run_on(world, size, arguments(models / kind, corpus, tmp_path / "out"))
    assert not [result for result in results if "error" in result]
    assert [result["written"] for result in results] == (
        [[0, 5, 10, 15, 20]] if size == 1 else [[0, 10, 20], [5, 15]]
    )
    found = rows_of(tmp_path / "out")
    expected = expected_rows(models / kind, corpus, role="document")
    assert [rows.shape for rows in found] == [rows.shape for rows in expected]
    assert len({rows.shape for rows in found}) == (1 if kind == "vectors" else 4)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert np.abs(found[0][0] - found[1][0]).max() > 1e-2
    ids = pd.read_parquet(tmp_path / "out" / "ids.parquet")
    assert ids["row"].tolist() == list(range(NUM_ROWS))
    assert ids["id"].tolist() == [f"d{n}" for n in range(NUM_ROWS)]


@pytest.mark.parametrize("kind", ["vectors", "tokens"])
def test_a_full_disk_on_one_rank_ends_all_and_the_rest_is_done_later(
    world: Worlds, models: Path, corpus: Path, tmp_path: Path, kind: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_on(world, 1, arguments(models / kind, corpus, whole))
    argv = arguments(models / kind, corpus, broken)
    first, second = run_on(world, 2, argv, fails_at=1, fails_on=1)
    assert f"writing {broken}: [Errno 28] No space left" in second["error"]
    assert first["error"].startswith("DistributedError: rank 1 failed: writing")
    manifest = json.loads((broken / "manifest.json").read_text())
    assert (manifest["blocks_done"], manifest["complete"]) == ([[0, 2]], False)
    # Rank 0 had written a third block, which was not marked, because rank 1's was not there.
    results = run_on(world, 2, argv)
    assert [result["written"] for result in results] == [[10, 20], [15]]
    assert files_of(broken) == files_of(whole)
    # Nothing is left to do, also for another number of ranks.
    assert run_on(world, 1, argv) == [{"written": []}]


def killed_at(number: int, argv: list[str]) -> bool:
    """Run in a copy of this process, which kills itself before its n-th flush to the disk.

    Returns:
        Whether it was killed: there are no more flushes otherwise.
    """
    child = os.fork()
    if child == 0:
        flushes = 0
        real = os.fsync

        def fsync(descriptor: int) -> None:
            nonlocal flushes
            flushes += 1
            if flushes == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        with mock.patch.object(os, "fsync", fsync):
            result = encode_files(argv, block_rows=BLOCK_ROWS)
        os._exit(1 if "error" in result else 0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("kind", ["vectors", "tokens"])
def test_killed_anywhere_and_gone_on_with_it_is_the_uninterrupted_run(
    world: Worlds, models: Path, corpus: Path, tmp_path: Path, kind: str
) -> None:
    """One run, killed before its second flush, gone on with and killed before its fourth, and so on."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    encode_files(arguments(models / kind, corpus, whole), block_rows=BLOCK_ROWS)
    argv = arguments(models / kind, corpus, broken)
    kills = 0
    for number in (2, 4, 7, 11):
        if not killed_at(number, argv):
            break
        kills += 1
    assert kills >= 3
    encode_files(argv, block_rows=BLOCK_ROWS)
    assert files_of(broken) == files_of(whole)
    assert json.loads((broken / "manifest.json").read_text())["complete"]
    assert not list(broken.glob("unfinished*"))


def test_a_block_is_on_the_disk_before_it_is_marked(
    models: Path, corpus: Path, tmp_path: Path
) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        events.append(name)
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return real_replace(self, target)

    argv = arguments(models / "vectors", corpus, tmp_path / "out")
    with mock.patch.object(os, "fsync", fsync), mock.patch.object(Path, "replace", replace):
        encode_files(argv, block_rows=BLOCK_ROWS)
    events = [event for event in events if event != run_lock.LOCK_FILE]
    mark = [".manifest.json.partial", "rename manifest.json", "out"]
    ids = [".ids.parquet.partial", "rename ids.parquet", "out"]
    assert events == [*mark, "embeddings.npy", *(["embeddings.npy", *mark] * 5), *ids, *mark]


def test_dims_normalize_and_dtype(models: Path, corpus: Path, tmp_path: Path) -> None:
    model = models / "vectors"
    more = ["--dims", "5", "--dtype", "float16"]
    encode_files(arguments(model, corpus, tmp_path / "cut", *more), block_rows=BLOCK_ROWS)
    more = ["--no-normalize", "--role", "query", "--columns", "text=document"]
    encode_files(arguments(model, corpus, tmp_path / "raw", *more), block_rows=BLOCK_ROWS)
    cut, raw = (np.load(tmp_path / name / "embeddings.npy") for name in ("cut", "raw"))
    unit = np.concatenate(expected_rows(model, corpus, role="document"))
    expected = unit[:, :5] / np.linalg.norm(unit[:, :5], axis=1, keepdims=True)
    assert (cut.dtype, cut.shape) == (np.float16, (NUM_ROWS, 5))
    np.testing.assert_allclose(cut.astype(np.float32), expected, rtol=1e-3, atol=1e-6)
    asked = np.concatenate(expected_rows(model, corpus, role="query", normalize=False))
    np.testing.assert_allclose(raw, asked, rtol=1e-5, atol=1e-6)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1


def test_images_and_texts_of_a_clip(clip_folder: Path, pairs: Path, tmp_path: Path) -> None:
    root = ["--image_root", str(pairs.parent)]
    images = ["--role", "document", "--columns", "image=positive", *root]
    both = ["--columns", "text=query", "image=positive", *root]
    for name, more in (("images", images), ("both", both)):
        argv = arguments(clip_folder, pairs, tmp_path / name, *more)
        assert "error" not in encode_files(argv, block_rows=BLOCK_ROWS)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    encoder = Encoder(clip_folder, device="cpu")
    paths = [str(pairs.parent / row["positive"]) for row in rows]
    expected = encoder.encode_image(paths)
    found = np.load(tmp_path / "images" / "embeddings.npy")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    items = [Item(text=row["query"], image=path) for row, path in zip(rows, paths, strict=True)]
    expected = encoder.encode(items)
    found = np.load(tmp_path / "both" / "embeddings.npy")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert pd.read_parquet(tmp_path / "both" / "ids.parquet").columns.tolist() == ["row"]


def test_dry_run_writes_nothing(
    models: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(models / "vectors", corpus, tmp_path / "out", "--dry_run")
    assert encode_files(argv, block_rows=BLOCK_ROWS) == {"written": []}
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "23 rows, text from 'document' (document, instruction 'about: '), id from 'id'" in said
    assert (
        "[23, 16] float32, 5,568 bytes; 0 rows are done, 23 are left\nnothing was written" in said
    )


def test_another_model_data_or_setting_is_refused_by_name(
    world: Worlds, models: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    encode_files(arguments(models / "vectors", corpus, out), block_rows=BLOCK_ROWS)
    before = files_of(out)
    other = write_jsonl(tmp_path / "other.jsonl", [{"id": "x", "document": "one text"}])
    save_text_model(tmp_path / "model", seed=1, pooling={"": "mean"}, **INSTRUCTIONS)
    cases = [
        (arguments(tmp_path / "model", corpus, out), r"model was '\w+', is '\w+'; give another"),
        (
            arguments(models / "vectors", other, out),
            r"data was '\w+', is '\w+'; count was 23, is 1",
        ),
        (arguments(models / "vectors", corpus, out, "--dims", "3"), "dims was 16, is 3"),
        (
            arguments(models / "vectors", corpus, out, "--no-normalize"),
            "normalize was True, is False",
        ),
    ]
    for argv, message in cases:
        (result,) = run_on(world, 1, argv)
        assert result["error"].startswith(f"ConfigError: --output {out}: holds other embeddings: ")
        assert re.search(message, result["error"]), result["error"]
    for result in run_on(world, 2, cases[2][0]):
        assert "dims was 16, is 3" in result["error"]
    assert files_of(out) == before
    (result,) = run_on(world, 1, [*cases[2][0], "--overwrite"])
    assert "error" not in result
    assert np.load(out / "embeddings.npy").shape == (NUM_ROWS, 3)


@pytest.mark.parametrize("kind", ["vectors", "tokens"])
def test_a_complete_folder_is_looked_at(
    world: Worlds, models: Path, corpus: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    argv = arguments(models / kind, corpus, out)
    encode_files(argv, block_rows=BLOCK_ROWS)
    if kind == "tokens":  # killed while it deleted the blocks that the files are made of
        (out / "unfinished-tokens").mkdir()
    assert encode_files(argv, block_rows=BLOCK_ROWS) == {"written": []}
    assert not (out / "unfinished-tokens").exists()
    files = files_of(out)
    assert len(files) == (2 if kind == "vectors" else 3)
    for name, content in files.items():
        for left in (None, b"", content[:-4]):
            if left is None:
                (out / name).unlink()
            elif name == "ids.parquet":
                continue
            else:
                (out / name).write_bytes(left)
            result = encode_files(argv, block_rows=BLOCK_ROWS)
            assert result["error"] == (
                f"DataError: {out / name}: is missing or cut short, though manifest.json says that it "
                "was written; begin again with --overwrite"
            )
        (out / name).write_bytes(content)
    (out / "embeddings.npy").unlink()
    for result in run_on(world, 2, argv):
        assert f"{out / 'embeddings.npy'}: is missing or cut short" in result["error"]
    assert encode_files([*argv, "--overwrite"], block_rows=BLOCK_ROWS)["written"]
    assert files_of(out) == files


def test_a_folder_of_something_else_is_left_alone(
    models: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    for more in ([], ["--overwrite"]):
        argv = arguments(models / "vectors", corpus, tmp_path, *more)
        result = encode_files(argv, block_rows=BLOCK_ROWS)
        assert f"--output {tmp_path}: holds other files (no manifest.json)" in result["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", [1, 2])
def test_a_bad_record_stops_every_rank(
    world: Worlds, models: Path, tmp_path: Path, size: int
) -> None:
    rows = [{"document": sentence(n) if n != 7 else " "} for n in range(12)]
    data = write_jsonl(tmp_path / "bad.jsonl", rows)
    results = run_on(world, size, arguments(models / "vectors", data, tmp_path / "out"))
    message = f"{data}, record 7, column 'document': ' ' is a blank text"
    assert all(message in result["error"] for result in results)


@pytest.mark.parametrize("size", [1, 2])
def test_embeddings_that_are_not_finite_stop_every_rank(
    world: Worlds, corpus: Path, tmp_path: Path, size: int
) -> None:
    folder = save_text_model(tmp_path / "nan", pooling={"": "mean"})
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][:] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    results = run_on(world, size, arguments(folder, corpus, tmp_path / "out"))
    assert (
        f"{corpus}, record 0: the embedding is NaN or infinite (5 records of 0 to 4)"
        in (results[0]["error"])
    )
    assert all("is NaN or infinite" in result["error"] for result in results)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["blocks_done"] == []


def test_values_that_float16_does_not_hold(models: Path, corpus: Path, tmp_path: Path) -> None:
    folder = save_text_model(tmp_path / "large", pooling={"": "mean"})
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.LayerNorm.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    argv = arguments(folder, corpus, tmp_path / "out", "--dtype", "float16", "--no-normalize")
    result = encode_files(argv, block_rows=BLOCK_ROWS)
    assert (
        "values above 65504, which --dtype float16 does not hold; give --dtype float32"
        in (result["error"])
    )


def test_more_dims_than_there_are(models: Path, corpus: Path, tmp_path: Path) -> None:
    argv = arguments(models / "vectors", corpus, tmp_path / "out", "--dims", "17")
    result = encode_files(argv, block_rows=BLOCK_ROWS)
    assert result["error"] == (
        "ConfigError: --dims 17: the model's embeddings have 16 dimensions; give at most 16"
    )


def test_data_without_rows(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    argv = arguments(models / "vectors", tmp_path / "empty.jsonl", tmp_path / "out")
    result = encode_files(argv, block_rows=BLOCK_ROWS)
    assert f"--data={tmp_path / 'empty.jsonl'}: holds no records" in result["error"]


def test_a_folder_takes_one_call_at_a_time(
    models: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "ENDING_SECONDS", 0.1)
    out = tmp_path / "out"
    argv = arguments(models / "vectors", corpus, out)
    out.mkdir()
    other = run_lock.RunLock(out)
    result = encode_files(argv, block_rows=BLOCK_ROWS)
    assert result["error"].startswith(
        f"ConfigError: --output={str(out)!r}: another run is using it: "
    )
    assert result["written"] == []
    other.release()
    assert encode_files(argv, block_rows=BLOCK_ROWS)["written"]
    assert not (out / run_lock.LOCK_FILE).exists()
