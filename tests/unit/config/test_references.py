"""The check in config.validation and the resolver in models.references agree on every form."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vembed_ds.config.loading import parse_config
from vembed_ds.errors import ConfigError
from vembed_ds.references import resolve_model_reference

NO_FOLDER = "no such folder; check the path, or give a hub name or package:NAME/folder"
BAD = {
    "./none": NO_FOLDER,
    "/none/here": NO_FOLDER,
    "../none": NO_FOLDER,
    "~/none": NO_FOLDER,
    "~nobody_here/none": NO_FOLDER,
    "a/b/c": NO_FOLDER,
    "a b": NO_FOLDER,
    "package:": "expected package:IMPORT_NAME or package:IMPORT_NAME/folder",
    "package:a.b/c": "expected package:IMPORT_NAME or package:IMPORT_NAME/folder",
    "package:not_there/model": "the Python package not_there is not installed; "
    "try: pip install not-there",
    "package:shipped/none": "the Python package shipped has no folder none",
    "package:single_module": "the Python package single_module has no folder single_module",
}


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder, a home, and a package whose import would fail."""
    for name in ("work/local/deep/er", "home/mine", "site/shipped/model/sub"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "site/shipped/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "site/single_module.py").touch()
    (tmp_path / "work/train.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(tmp_path / "site")


def validate(reference: object) -> None:
    parse_config({"model_name": reference, "data_path": "train.jsonl"})


@pytest.mark.parametrize(
    ("reference", "resolved"),
    [
        ("bert-base-uncased", "bert-base-uncased"),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("local", "work/local"),
        ("./local", "work/local"),
        ("local/deep/er", "work/local/deep/er"),
        ("~/mine", "home/mine"),
        ("package:shipped", "site/shipped"),
        ("package:shipped/model/sub", "site/shipped/model/sub"),
    ],
)
def test_good_references(tmp_path, reference, resolved):
    validate(reference)
    is_hub_name = resolved == reference
    expected = resolved if is_hub_name else str(tmp_path / resolved)
    assert resolve_model_reference(reference) == expected
    assert "shipped" not in sys.modules


@pytest.mark.parametrize(("reference", "message"), BAD.items())
def test_bad_references(reference, message):
    with pytest.raises(ConfigError) as caught:
        validate(reference)
    assert caught.value.problems == [f"model_name={reference!r}: {message}"]
    with pytest.raises(ConfigError) as caught:
        resolve_model_reference(reference)
    assert caught.value.problems == [f"{reference!r}: {message}"]


def test_the_processor_of_a_scratch_model_is_checked_too():
    with pytest.raises(ConfigError) as caught:
        validate({"config": {"model_type": "resnet"}, "processor": "./none"})
    assert caught.value.problems == [f"model_name.processor='./none': {NO_FOLDER}"]
