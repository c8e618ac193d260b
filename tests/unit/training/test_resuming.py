"""What may have changed between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import seal
from vembed_ds import train
from vembed_ds.checkpointing.manifest import deleting
from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import SECTION_OF
from vembed_ds.errors import CheckpointError, ConfigError
from vembed_ds.training import changes as changes_module
from vembed_ds.training import resuming
from vembed_ds.training.changes import (
    FIXED,
    Change,
    check_allowed,
    check_changes,
    describe_changes,
    flat_ds_config,
    flat_settings,
)
from vembed_ds.training.frozen_base import check_frozen
from vembed_ds.training.resuming import (
    FREE,
    Resumption,
    batch_per_rank,
    check_judges,
    check_resumption,
    chosen_checkpoint,
    earlier_parts,
)


def settings(**values: Any) -> dict[str, Any]:
    config = parse_config({"model_name": "a/b", "data_path": ".", "output_dir": "out", **values})
    return flat_settings(config.model_dump(mode="json"))


def find_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    return changes_module.find_changes(saved, now, free=FREE)


def resumption(saved: dict[str, Any], *allowed: str) -> Resumption:
    return Resumption(Path("out/checkpoint-step-7"), {"step": 7, "settings": saved}, allowed)


def refusal(changes: list[Change], *allowed: str) -> str:
    with pytest.raises(CheckpointError) as error:
        check_changes(changes, allowed=allowed, checkpoint="out/checkpoint-step-7")
    return str(error.value)


def test_the_rules_name_settings_that_exist() -> None:
    known = set(SECTION_OF) | {"optimizer.type"}
    assert known >= FREE
    assert known >= set(FIXED)
    assert not FREE & set(FIXED)


def test_every_setting_that_differs_is_found() -> None:
    before, after = settings(lr=1e-3, logging_steps=1), settings(lr=5e-6, logging_steps=2)
    changes = find_changes(before, after)
    assert [str(change) for change in changes] == ["lr: 0.001 -> 5e-06", "logging_steps: 1 -> 2"]
    assert [change.rule for change in changes] == ["named", "free"]
    assert find_changes(before, before) == []


def test_a_setting_that_the_checkpoint_does_not_know_had_its_default() -> None:
    saved = settings()
    del saved["eval_recall_k"], saved["warmup_ratio"]
    assert find_changes(saved, settings()) == []
    (change,) = find_changes(saved, settings(warmup_ratio=0.5))
    assert str(change) == "warmup_ratio: 0.1 -> 0.5"
    (change,) = find_changes(settings() | {"of_a_later_version": 3}, settings())
    assert str(change) == "of_a_later_version: 3 -> null"
    assert change.rule == "named"


def test_of_several_data_sets_those_that_moved_may() -> None:
    def of(root: str, weight: float) -> dict[str, Any]:
        a = {"name": "a", "data_path": f"{root}/a.jsonl", "weight": weight}
        b = {"name": None, "data_path": f"{root}/b.jsonl", "weight": 1.0}
        return flat_settings({"data": {"datasets": [a, b]}, "training": {"batch_size": 4}})

    changes = find_changes(of("old", 1.0), of("new", 2.0))
    assert {change.key: change.rule for change in changes} == {
        "datasets.a.data_path": "free",
        "datasets.a.weight": "named",
        "datasets.1.data_path": "free",
    }


def test_data_sets_in_another_order_number_their_records_anew() -> None:
    saved, now = ({"data_fingerprint": dict(pairs)} for pairs in (("a1", "b2"), ("b2", "a1")))
    (change,) = find_changes(saved, now)
    assert str(change) == 'data_fingerprint: ["a", "b"] -> ["b", "a"]'
    assert change.rule == "named"
    (change,) = find_changes(saved, {"data_fingerprint": {"a": "1", "b": "3"}})
    assert str(change) == 'data_fingerprint: {"b": "2"} -> {"b": "3"}'


def test_of_several_teachers_placement_may_change() -> None:
    def of(**entry: Any) -> dict[str, Any]:
        teachers = [{"name": "big", "weight": 1.0, "ds_config": None, **entry}]
        return flat_settings({"a": {"teachers": teachers}, "training": {"batch_size": 4}})

    (free,) = find_changes(of(), of(ds_config="other.json"))
    (named,) = find_changes(of(), of(weight=2.0))
    assert (free.key, free.rule) == ("teachers.big.ds_config", "free")
    assert (named.key, named.rule) == ("teachers.big.weight", "named")


@pytest.mark.parametrize(
    ("before", "after", "key", "rule"),
    [
        ({"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": 3}},
         "zero_optimization.stage", "free"),
        ({}, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
         "zero_optimization.offload_optimizer.device", "free"),
        ({"optimizer": {"params": {"torch_adam": True}}}, {"optimizer": {"params": {}}},
         "optimizer.params.torch_adam", "free"),
        ({"fp16": {"initial_scale_power": 16}}, {"fp16": {}}, "fp16.initial_scale_power", "named"),
        ({"optimizer": {"params": {"momentum": 0.9}}}, {"optimizer": {"params": {}}},
         "optimizer.params.momentum", "named"),
        ({"optimizer": {"type": "AdamW"}}, {"optimizer": {"type": "SGD"}},
         "optimizer.type", "fixed"),
    ],
)  # fmt: skip
def test_what_of_the_deepspeed_config_may_change(
    before: dict[str, Any], after: dict[str, Any], key: str, rule: str
) -> None:
    (change,) = find_changes(flat_ds_config(before), flat_ds_config(after))
    assert (change.key, change.rule) == (key, rule)


def test_what_our_keys_decide_is_not_compared_twice() -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 1.0, "betas": [0.9, 0.9], "weight_decay": 0}}
    found = flat_ds_config(
        {"optimizer": optimizer, "train_batch_size": 8, "fp16": {"enabled": False}}
    )
    assert found == {"optimizer.type": "AdamW"}


def test_the_refusal_lists_all_changes_and_the_flag() -> None:
    changes = find_changes(
        settings(lr=1e-3, seed=1) | {"data_fingerprint": "aa"},
        settings(lr=5e-6, seed=2, num_workers=1) | {"data_fingerprint": "bb"},
    )
    assert refusal(changes, "seed") == (
        "out/checkpoint-step-7: this is not the run that wrote it:\n"
        "  num_workers: 4 -> 1 (harmless)\n"
        "  lr: 0.001 -> 5e-06\n"
        "  seed: 1 -> 2 (by --allow_change)\n"
        '  data_fingerprint: "aa" -> "bb" (the contents or the order of the records)\n'
        "put back what is not meant to change; for what is, add\n"
        "  --allow_change data_fingerprint lr seed"
    )
    check_changes(changes, allowed=["seed", "lr", "data_fingerprint"], checkpoint="")
    assert describe_changes(changes[-1:], allowed=["data_fingerprint"]) == (
        '\n  data_fingerprint: "aa" -> "bb" (by --allow_change)'
    )


def test_what_follows_from_another_stage_is_one_line() -> None:
    before = {"stage": 2, "allgather_bucket_size": 50, "overlap_comm": True, "offload": {"pin": 1}}
    before["offload_param"] = {"device": "none"}
    after = {"stage": 3, "overlap_comm": False, "offload_param": {"device": "cpu"}}
    changes = find_changes(
        flat_ds_config({"zero_optimization": before}) | settings(),
        flat_ds_config({"zero_optimization": after}) | settings(lr=1.0),
    )
    told = (
        "\n  zero_optimization.stage: 2 -> 3 (harmless)"
        '\n  zero_optimization.offload_param.device: "none" -> "cpu" (harmless)'
        "\n  lr: 2e-05 -> 1.0"
        "\n  zero_optimization.*, where things lie: overlap_comm, allgather_bucket_size, offload.pin "
        "(harmless)"
    )
    assert describe_changes(changes, allowed=()) == told
    assert refusal(changes).startswith(
        f"out/checkpoint-step-7: this is not the run that wrote it:{told}\nput back"
    )
    (one,) = find_changes(
        flat_ds_config({"zero_optimization": {"overlap_comm": True}}),
        flat_ds_config({"zero_optimization": {"overlap_comm": False}}),
    )
    assert describe_changes([one], allowed=()) == (
        "\n  zero_optimization.overlap_comm: true -> false (harmless)"
    )


def test_where_the_epochs_count_is_said() -> None:
    (change,) = find_changes(settings(epochs=3), settings(epochs=4))
    assert describe_changes([change], allowed=()) == (
        "\n  epochs: 3 -> 4 (harmless by itself: what counts is num_steps)"
    )


def test_names_that_a_shell_would_split_are_quoted() -> None:
    assert refusal([Change("teacher.my own", "a", "b", "named")]).endswith(
        "--allow_change 'teacher.my own'"
    )


def test_of_several_data_sets_the_changed_one_is_named() -> None:
    change = Change("data_fingerprint", {"a": "11", "b": "22"}, {"a": "11", "b": "33"}, "named")
    assert str(change) == 'data_fingerprint: {"b": "22"} -> {"b": "33"}'


@pytest.mark.parametrize("key", sorted(FIXED))
def test_other_parameters_are_refused_even_if_named(key: str) -> None:
    text = refusal([Change(key, 1, 2, "fixed")], key)
    assert f"  {key}: 1 -> 2 (cannot change: the checkpoint holds " in text
    assert f"put back {key}, or begin a new run: convert the checkpoint" in text
    assert "--allow_change" not in text


def test_a_model_may_move_if_it_is_named() -> None:
    changes = find_changes(settings(model_name="a/b"), settings(model_name="c/b"))
    assert '"a/b" -> "c/b" (allow it where it is the same model in another place)' in refusal(
        changes
    )
    check_changes(changes, allowed=["model_name"], checkpoint="")


def test_an_allowed_name_must_exist() -> None:
    known = [*settings(), "data_fingerprint"]
    check_allowed(["lr", "data_fingerprint"], known=known)
    with pytest.raises(ConfigError) as error:
        check_allowed(["max_step", "fingerprint", "xyzzy"], known=known)
    assert error.value.problems == [
        "--allow_change max_step: there is no such setting; did you mean max_steps?",
        "--allow_change fingerprint: there is no such setting; did you mean data_fingerprint?",
        "--allow_change xyzzy: there is no such setting; remove it",
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that is found whole."""
    monkeypatch.setattr(resuming, "find_checkpoint", lambda *place, **options: tmp_path)
    return tmp_path


def test_what_is_gone_on_from_is_not_deleted_before_it_is_loaded(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "out" / "checkpoint-step-2"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"step": 2, "settings": {}}')
    seal(folder, step=2, world_size=1, zero_stage=0)
    with chosen_checkpoint(str(folder), output_dir=str(tmp_path / "other")) as found:
        assert found is not None
        assert found.folder == folder
        assert found.own_folder(str(tmp_path / "other")) is None
        with deleting(folder) as free:
            assert not free
    with deleting(folder) as free:
        assert free


@pytest.mark.parametrize("way", ["plain", "link to it", "moved and linked", "linked folder"])
def test_a_checkpoint_of_this_run_is_known_behind_links(tmp_path: Path, way: str) -> None:
    out, disk, name = tmp_path / "out", tmp_path / "disk", "checkpoint-step-2"
    disk.mkdir()
    (out / name).mkdir(parents=True)
    folder = out / name
    if way == "link to it":
        folder = tmp_path / "link"
        folder.symlink_to(out / name)
    elif way == "moved and linked":
        (out / name).rename(disk / name)
        (out / name).symlink_to(disk / name)
    elif way == "linked folder":
        (tmp_path / "linked").symlink_to(out)
        folder = tmp_path / "linked" / name
    found = Resumption(folder, {})
    assert found.belongs_to(str(out))
    (tmp_path / "other").mkdir()
    for other in ("other", "none"):
        assert not found.belongs_to(str(tmp_path / other))


def test_other_spellings_of_a_key_are_known(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"step": 2, "settings": {}}')
    allowed = ["learning_rate", "seed"]
    with chosen_checkpoint("auto", output_dir="out", allowed=allowed) as found:
        assert found is not None
        assert found.allowed == ("lr", "seed")


def test_where_the_earlier_steps_were_made() -> None:
    two, one = ({"world_size": n, "zero_optimization.stage": 2} for n in (2, 1))
    part = {"until_step": 7, "world_size": 2, "zero_stage": 2}
    found = resumption(two)
    assert earlier_parts(None, two) == earlier_parts(found, two) == []
    assert earlier_parts(found, one) == [part]
    later = Resumption(found.folder, {**found.state, "settings": one, "earlier_parts": [part]})
    assert earlier_parts(later, one) == [part]
    assert earlier_parts(later, two) == [part, {**part, "world_size": 1}]


def test_what_has_changed_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = resumption(settings(), "lr", "seed")
    assert check_resumption(found, settings(lr=1.0, logging_steps=3), num_steps=20, evaluates=True)
    assert [record.getMessage() for record in caplog.records] == [
        "--allow_change seed: it has not changed",
        "resuming from out/checkpoint-step-7, step 7 of 20; changed since then: \n"
        "  lr: 2e-05 -> 1.0 (by --allow_change)\n"
        "  logging_steps: 10 -> 3 (harmless)",
    ]


def test_a_run_that_is_complete(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = resumption(settings())
    assert not check_resumption(found, settings(), num_steps=7, evaluates=True)
    assert "step 7 of 7; changed since then: nothing" in caplog.text
    assert (
        "the run is complete, nothing is left to train; to train longer, raise epochs or max_steps "
        "and add --allow_change num_steps"
    ) in caplog.text


def test_an_evaluation_that_a_signal_left_is_still_to_be_made() -> None:
    found = resumption(settings())
    left = Resumption(found.folder, {**found.state, "evaluation_left": True})
    assert check_resumption(left, settings(), num_steps=7, evaluates=True)
    assert not check_resumption(left, settings(), num_steps=7, evaluates=False)


def test_another_judge() -> None:
    saved = settings() | {"teacher.big": "aa"}
    check_judges(resumption(saved), {"teacher.big": "aa", "teacher.new": "cc"})
    check_judges(resumption(saved, "teacher.big"), {"teacher.big": "bb"})
    with pytest.raises(CheckpointError, match=r'teacher\.big: "aa" -> "bb"'):
        check_judges(resumption(saved), {"teacher.big": "bb"})
    # It is known before the teacher is loaded, and then still unchanged.
    assert check_resumption(
        resumption(saved, "teacher.big"), settings(), num_steps=20, evaluates=True
    )


@pytest.mark.parametrize(
    ("given", "world_size", "total", "configured", "expected"),
    [
        (4, 2, 8, 4, 4),  # as ever
        (4, 1, 8, 4, 8),  # fewer ranks, the same file; however often
        (4, 4, 8, 4, 2),
        (8, 1, 8, 4, 8),  # set by hand
        (3, 2, 8, 4, 3),  # another global batch: refused elsewhere
        (4, 8, 8, 4, 1),
    ],
)
def test_the_global_batch_stays(
    given: int, world_size: int, total: int, configured: int, expected: int
) -> None:
    found = batch_per_rank(
        given, world_size=world_size, total=total, configured=configured, may_change=False
    )
    assert found == expected


def test_ranks_that_do_not_divide_the_global_batch() -> None:
    options = {"world_size": 3, "total": 8, "configured": 4}
    with pytest.raises(CheckpointError) as error:
        batch_per_rank(4, **options, may_change=False)
    assert str(error.value) == (
        "batch_size=4: the checkpoint's global batch of 8 does not divide by 3 ranks; start 1, 2 or "
        "4 ranks, or set batch_size and add --allow_change global_batch_size"
    )
    assert batch_per_rank(4, **options, may_change=True) == 4


def test_changes_are_allowed_only_when_something_is_resumed() -> None:
    expected = r"--allow_change lr seed: only with --resume; remove it"
    allowed = ["lr", "seed"]
    with (
        pytest.raises(ConfigError, match=expected),
        chosen_checkpoint(None, output_dir="out", allowed=allowed),
    ):
        pass
    with chosen_checkpoint(None, output_dir="out") as found:
        assert found is None


def test_the_flag_may_be_given_several_times() -> None:
    needed = ["--config", "a.yaml", "--ds_config", "b.json", "--resume", "auto"]
    parse = train.build_parser().parse_args
    arguments = parse([*needed, "--allow_change", "lr", "seed", "--allow_change", "epochs"])
    assert arguments.allow_change == ["lr", "seed", "epochs"]
    assert parse(needed).allow_change == []


def test_a_checkpoint_of_an_earlier_version(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"step": 2}')
    with (
        pytest.raises(CheckpointError, match="an earlier version wrote it"),
        chosen_checkpoint("auto", output_dir="out"),
    ):
        pass


def test_a_checkpoint_without_checksums_of_frozen_weights(folder: Path) -> None:
    found = Resumption(folder, {"step": 2})
    with pytest.raises(CheckpointError, match="an earlier version wrote it, so that nobody knows"):
        check_frozen(found, {"w": "1"}, model_name="a/b")
