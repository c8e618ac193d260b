"""``TrainConfig`` is the YAML file as an object: same keys, same errors."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from vembed_ds import TrainConfig
from vembed_ds.config import keyword_text, keywords
from vembed_ds.config.loading import load_config
from vembed_ds.config.schema import ALIASES, SECTION_OF, SECTIONS
from vembed_ds.errors import ConfigError

VALUES: dict[str, Any] = {
    "model_name": "some/model",
    "data_path": ["a.jsonl", "b.jsonl"],
    "batch_size": 64,
    "learning_rate": 1e-4,
    "use_mrl": True,
    "mrl_dims": [64, 32],
    "column_mapping": {"query": "caption"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data that the configurations name."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text("{}")


def problems_of(error: pytest.ExceptionInfo[ConfigError], place: str) -> list[str]:
    return [problem.replace(f"({place})", "(it)") for problem in error.value.problems]


def test_keywords_are_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    config = TrainConfig(**VALUES)
    assert config.resolved == load_config(file)
    assert config == TrainConfig.from_yaml(file)
    assert hash(config) == hash(TrainConfig.from_yaml(file))
    assert config != TrainConfig(**VALUES | {"batch_size": 65})
    assert config["lr"] == config["learning_rate"] == config.resolved.optimizer.lr == 1e-4
    assert "batch_size=64" in repr(config)


def test_the_same_problems_as_in_a_file(tmp_path: Path) -> None:
    wrong = {**VALUES, "graident_cache": True, "lr": "fast", "optimizer": {"batch_size": 3}}
    del wrong["learning_rate"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(wrong))
    with pytest.raises(ConfigError) as of_file:
        load_config(file)
    with pytest.raises(ConfigError) as of_keywords:
        TrainConfig(**wrong)
    found = problems_of(of_keywords, "TrainConfig")
    assert found == problems_of(of_file, str(file))
    assert found[0].startswith("graident_cache=True (it): unknown key; did you mean")


def test_sections_tuples_and_paths() -> None:
    config = TrainConfig(
        model_name=Path("some/model"),
        data_path=(Path("a.jsonl"), "b.jsonl"),
        optimizer={"lr": 1e-4},
        batch_size=64,
        use_mrl=True,
        mrl_dims=(64, 32),
        column_mapping={"query": "caption"},
    )
    assert config == TrainConfig(**VALUES)


def test_keywords_and_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    config = TrainConfig.from_yaml(file, ["epochs=7"], lr=3e-4, batch_size=8)
    assert (config["lr"], config["batch_size"], config["epochs"]) == (3e-4, 8, 7)
    assert TrainConfig.from_yaml(file, ["lr=2e-4"], lr=3e-4)["lr"] == 2e-4
    with pytest.raises(ConfigError, match=r"lr='fast' \(TrainConfig\): expected a number > 0"):
        TrainConfig.from_yaml(file, lr="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no such config file"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    config = TrainConfig(**VALUES, num_workers=0)
    text = config.to_yaml(tmp_path / "written.yaml")
    assert (tmp_path / "written.yaml").read_text() == text
    assert TrainConfig.from_yaml(tmp_path / "written.yaml") == config
    later = TrainConfig(model_name="some/model")
    later.to_yaml(tmp_path / "later.yaml")
    assert TrainConfig.from_yaml(tmp_path / "later.yaml") == later


def test_data_may_come_later() -> None:
    config = TrainConfig(model_name="some/model", best_metric="recall@10")
    assert config["data_path"] is None
    assert config["val_data_path"] is None
    data = {"data_path": Path("a.jsonl"), "val_data_path": "b.jsonl"}
    complete, origins = config.complete(data, origin="Trainer")
    assert (complete.data.data_path, complete.data.val_data_path) == ("a.jsonl", "b.jsonl")
    assert (origins["data_path"], origins["model_name"]) == ("Trainer", "TrainConfig")
    with pytest.raises(ConfigError, match="data_path: required, but not given") as error:
        config.complete({}, origin="Trainer")
    assert any("best_metric='recall@10'" in problem for problem in error.value.problems)
    assert TrainConfig(model_name="m", datasets=[{"data_path": "a.jsonl"}])["data_path"] is None
    with pytest.raises(ConfigError, match="stands beside datasets"):
        TrainConfig(model_name="m", data_path="b.jsonl", datasets=[{"data_path": "a.jsonl"}])


def test_keys_of_vembed_factory_are_told_of() -> None:
    config = TrainConfig(
        model_name="some/model", data_path="a.jsonl", fp16=True, torch_dtype="bfloat16"
    )  # type: ignore[call-arg]
    assert config["precision"] == "bf16"
    assert len(config.notices) == 1
    assert config.notices[0].startswith("fp16=True (TrainConfig): vembed-factory never read")


def test_editors_know_every_key() -> None:
    written = Path(keywords.__file__).read_text()
    command = "write it anew: python -m vembed_ds.config.keyword_text, then ruff format"
    same = ast.dump(ast.parse(written)) == ast.dump(ast.parse(keyword_text.keyword_text()))
    assert same, f"{keywords.__file__} is not the schema's; {command}"
    known = set(keywords.Settings.__annotations__)
    assert known == {*SECTION_OF, *SECTIONS, *ALIASES, "torch_dtype"}
