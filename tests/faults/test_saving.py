"""F3, F6 to F10: killed while saving, damaged files, wrong pointers, full disks."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.checkpoints import verify
from tests.faults.checkpoint_cases import KILL_POINTS
from tests.worlds import World
from vembed_ds.checkpointing import manifest
from vembed_ds.checkpointing.manifest import MANIFEST, list_files, read_manifest
from vembed_ds.checkpointing.names import leftovers
from vembed_ds.checkpointing.rotation import by_age, remove_leftovers
from vembed_ds.checkpointing.store import find_checkpoint
from vembed_ds.durable import hash_file
from vembed_ds.errors import CheckpointError

CASES = "tests.faults.checkpoint_cases:"
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
WEIGHTS = "mp_rank_00_model_states.pt"

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]


@pytest.fixture(scope="session")
def saved(world: Callable[[int], World], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2, which two ranks wrote at ZeRO-2."""
    out = tmp_path_factory.mktemp("saved")
    world(2).run(f"{CASES}save_steps", out=str(out), stage=2, steps=2)
    return out


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What was warned of since the last call."""
    caplog.set_level(logging.WARNING)

    def read() -> str:
        text = "\n".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return text

    return read


@pytest.mark.parametrize(
    ("point", "background"),
    [(point, False) for point in KILL_POINTS]
    + [("shard of rank 1", True), ("before rename", True)],
)
@pytest.mark.one_in(2)
def test_f3_killed_while_saving(
    doomed_ranks: Callable[..., list[int | None]],
    tmp_path: Path,
    warned: Callable[[], str],
    point: str,
    background: bool,
) -> None:
    out = tmp_path / "out"
    codes = doomed_ranks(f"{CASES}save_and_die", out=str(out), point=point, background=background)
    killed = 1 if point == "shard of rank 1" else 0
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] not in (0, None)
    unfinished = [path.name for path, *_ in leftovers(out)]
    found = find_checkpoint("auto", out)
    assert found is not None
    verify(found)
    if point == "between the renames":
        assert unfinished == [".checkpoint-step-2.partial", ".checkpoint-step-2.replaced"]
        assert found.name == "checkpoint-step-2"
        assert "checkpoint-step-2: was being replaced when a run crashed" in warned()
    else:
        # After the rename the newer one is whole too, but nobody was told of it.
        assert found.name == "checkpoint-step-1"
        expected = [] if point.startswith("after") else [".checkpoint-step-2.partial"]
        assert unfinished == expected
        assert not warned()
    remove_leftovers(out)
    if not point.startswith("after"):
        assert "removed .checkpoint-step-2.partial (a checkpoint that a run had not " in warned()
    assert not leftovers(out)


def test_the_manifest_tells_every_file(saved: Path) -> None:
    folder = saved / "checkpoint-step-2"
    manifest = read_manifest(folder)
    assert set(manifest.files) == {
        WEIGHTS,
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        SHARD,
        "random_state_rank_0.pt",
        "random_state_rank_1.pt",
        "trainer_state.json",
        "model/config.json",
        "model/parameters.json",
    }
    assert set(list_files(folder)) == set(manifest.files)
    assert {name: hash_file(folder / name) for name in manifest.files} == manifest.files
    assert (manifest.step, manifest.world_size, manifest.zero_stage) == (2, 2, 2)
    assert manifest.config_digest == "0123"
    assert set(manifest.versions) == {"vembed_ds", "torch", "deepspeed", "transformers"}
    assert (saved / "latest").read_text() == "checkpoint-step-2"
    assert sorted(p.name for p in saved.iterdir()) == [
        "checkpoint-step-1",
        "checkpoint-step-2",
        "latest",
    ]


def damaged_copies(out: Path, damage: Callable[[Path], None]) -> Iterator[Path]:
    """One file after the other damaged, and mended again."""
    folder = out / "checkpoint-step-2"
    for name in [*read_manifest(folder).files, MANIFEST]:
        content = (folder / name).read_bytes()
        damage(folder / name)
        yield folder / name
        (folder / name).write_bytes(content)


def check_fallback(out: Path, finding: str, warned: Callable[[], str]) -> None:
    """An earlier checkpoint is taken and named; but not in the place of the one asked for."""
    assert find_checkpoint("auto", out) == out / "checkpoint-step-1"
    text = warned()
    assert finding in text
    assert f"going on from {out / 'checkpoint-step-1'}, the newest checkpoint that is whole" in text
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(str(out / "checkpoint-step-2"), out)
    assert finding in str(error.value)
    assert "this checkpoint is damaged: name another checkpoint-step-N, or the run's" in str(
        error.value
    )


def test_f6_truncated(out: Path, warned: Callable[[], str]) -> None:
    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    for path in damaged_copies(out, truncate):
        size = path.stat().st_size
        finding = f"{path}: has {size:,} bytes, and {size + 1:,} were written"
        check_fallback(out, f"{path}: damaged" if path.name == MANIFEST else finding, warned)
    assert find_checkpoint("auto", out) == out / "checkpoint-step-2"
    assert not warned()


def test_f7_flipped_byte(out: Path, warned: Callable[[], str]) -> None:
    files = read_manifest(out / "checkpoint-step-2").files

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    for path in damaged_copies(out, flip):
        name = path.relative_to(out / "checkpoint-step-2").as_posix()
        finding = f"{path}: damaged"
        if name != MANIFEST:
            was, now = files[name].xxh3_128, hash_file(path).xxh3_128
            finding = f"{path}: its checksum is {now}, and {was} was written"
        check_fallback(out, finding, warned)


def test_any_byte_of_the_manifest_counts(out: Path) -> None:
    path = out / "checkpoint-step-2" / MANIFEST
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(path.parent)


@pytest.mark.parametrize("damage", ["more", "less", "deep"])
def test_a_manifest_that_nobody_understands_is_damage(
    out: Path, warned: Callable[[], str], damage: str
) -> None:
    """Its own checksum is right, as a release with other fields would write it."""
    path = out / "checkpoint-step-2" / MANIFEST
    body = asdict(read_manifest(path.parent)) | {"new": 1}
    if damage == "less":
        del body["new"], body["step"]
    path.write_text("[" * 100_000 if damage == "deep" else manifest._render(body))
    check_fallback(out, f"{path}: {'damaged' if damage == 'deep' else 'not as this'}", warned)
    assert by_age(out.glob("checkpoint-*")) == [out / "checkpoint-step-1"]


def test_f8_missing_mixed_and_extra(out: Path, warned: Callable[[], str]) -> None:
    first, second = out / "checkpoint-step-1", out / "checkpoint-step-2"
    shard = second / SHARD
    for name in [*read_manifest(second).files, MANIFEST]:
        content = (second / name).read_bytes()
        (second / name).unlink()
        check_fallback(out, f"{second / name}: missing", warned)
        (second / name).write_bytes(content)
    content = shard.read_bytes()
    shutil.copyfile(first / SHARD, shard)
    assert shard.stat().st_size == len(content)
    check_fallback(out, f"{shard}: its checksum is ", warned)
    shard.write_bytes(content)
    shutil.copyfile(shard, second / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    assert find_checkpoint("auto", out) == second
    assert (
        "files that are no part of it and are not read: zero_pp_rank_2_mp_rank_00_optim" in warned()
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "latest: missing"),
        ("", "latest: empty"),
        ("checkpoint-step-7", "latest: names 'checkpoint-step-7', which is no folder beside it"),
        ("../out", "latest: names '../out', which is no folder beside it"),
        ("..", "latest: names '..', which is no folder beside it"),
        ("x" * 300, f"latest: names '{'x' * 100}', which is no folder beside it"),
    ],
)
def test_f9_latest(out: Path, warned: Callable[[], str], content: str | None, problem: str) -> None:
    if content is None:
        (out / "latest").unlink()
    else:
        (out / "latest").write_text(content)
    for resume in ("auto", str(out)):
        assert find_checkpoint(resume, out) == out / "checkpoint-step-2"
        text = warned()
        assert problem in text
        assert f"going on from {out / 'checkpoint-step-2'}" in text


def test_later_steps_of_a_run_that_was_given_up_come_last(
    out: Path, warned: Callable[[], str]
) -> None:
    shutil.copytree(out / "checkpoint-step-1", out / "checkpoint-step-0")
    (out / "latest").write_text("checkpoint-step-1")
    assert find_checkpoint("auto", out) == out / "checkpoint-step-1"
    (out / "checkpoint-step-1" / WEIGHTS).unlink()
    assert find_checkpoint("auto", out) == out / "checkpoint-step-0"
    (out / "checkpoint-step-0" / WEIGHTS).unlink()
    assert find_checkpoint("auto", out) == out / "checkpoint-step-2"
    assert warned().count("missing") == 3


def test_nothing_whole_is_an_error_and_no_fresh_start(out: Path) -> None:
    for folder in out.glob("checkpoint-step-*"):
        (folder / MANIFEST).unlink()
    for resume in ("auto", str(out)):
        with pytest.raises(CheckpointError) as error:
            find_checkpoint(resume, out)
        message = str(error.value)
        assert "no checkpoint is whole" in message
        assert "or was written before checkpoints had a manifest" in message
        assert "start afresh" in message
    shutil.rmtree(out / "checkpoint-step-1")
    shutil.rmtree(out / "checkpoint-step-2")
    with pytest.raises(CheckpointError, match="latest: names 'checkpoint-step-2', which is no"):
        find_checkpoint("auto", out)
    (out / "latest").unlink()
    assert find_checkpoint("auto", out) is None
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        find_checkpoint(str(out), out)


def test_a_first_checkpoint_that_was_never_finished_is_named(
    tmp_path: Path, warned: Callable[[], str]
) -> None:
    (tmp_path / ".checkpoint-step-4.partial").mkdir()
    assert find_checkpoint("auto", tmp_path) is None
    assert "no checkpoint was finished; .checkpoint-step-4.partial is left of a run" in warned()


def test_a_manifest_of_a_later_release(out: Path) -> None:
    path = out / "checkpoint-step-2" / MANIFEST
    content = json.loads(path.read_text()) | {"format_version": 2}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="format_version=2; this release of vembed_ds reads"):
        verify(path.parent)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_file_that_one_rank_cannot_write_fails_all(
    world: Callable[[int], World], tmp_path: Path, stage: int
) -> None:
    """By a limit on the size of files (RLIMIT_FSIZE) of rank 1, or at ZeRO-0 of the only writer."""
    rank = 1 if stage else 0
    answers = world(2).run(
        f"{CASES}full_disk", out=str(tmp_path / "out"), stage=stage, limited_rank=rank
    )
    for answer in answers:
        assert answer["error"] == answers[0]["error"]
        assert answer["error"].startswith(
            f"SaveError: checkpoint-step-2 was not saved: rank {rank}: "
        )
        assert "_states.pt: larger than a file may be here: " in answer["error"]
        assert answer["unchanged"]
        assert answer["left"] == ["checkpoint-step-1", "latest"]
    assert find_checkpoint("auto", tmp_path / "out") == tmp_path / "out" / "checkpoint-step-3"
    verify(tmp_path / "out" / "checkpoint-step-1")


def test_f10_disk_full(world: Callable[[int], World], small_disk: Path) -> None:
    out = small_disk / "out"
    answers = world(2).run(f"{CASES}full_disk", out=str(out), stage=2, limited_rank=None)
    for answer in answers:
        assert answer["error"] == answers[0]["error"]
        assert "SaveError: checkpoint-step-2 was not saved: rank " in answer["error"]
        assert "no space left on device: " in answer["error"]
        assert "bytes were to be written, " in answer["error"]
        assert answer["error"].endswith("untouched. Make room, or mend the folder")
        assert answer["unchanged"]
        assert answer["left"] == ["checkpoint-step-1", "latest"]
    assert find_checkpoint("auto", out) == out / "checkpoint-step-3"
    verify(out / "checkpoint-step-1")


def test_double_save_of_one_step(world: Callable[[int], World], tmp_path: Path) -> None:
    out = tmp_path / "out"
    world(2).run(f"{CASES}save_steps", out=str(out), stage=3, steps=2)
    was = read_manifest(out / "checkpoint-step-2")
    (out / "checkpoint-step-2" / "of the older one").write_text("x")
    world(2).run(f"{CASES}save_steps", out=str(out), stage=3, steps=2)
    now = verify(out / "checkpoint-step-2")
    assert now.written_at > was.written_at
    assert not (out / "checkpoint-step-2" / "of the older one").exists()
    assert not leftovers(out)
