"""The two commands as programs; what they write is in `tests/distributed`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.integration.launching import free_port, run_command
from tests.retrievers import save_text_model, sentence, write_jsonl
from vembed_ds import encode, mine

PAGE = (Path(__file__).parent.parent.parent / "docs" / "encode_and_mine.md").read_text()


@pytest.mark.parametrize("command", [encode, mine])
def test_help_has_examples_and_exit_codes(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    name = command.__name__.rpartition(".")[2]
    assert said.startswith(f"usage: vembed-ds {name} ")
    assert f"examples:\n  vembed-ds {name} --model output/model" in said
    assert f"vembed-ds {name} --num_gpus 8 " in said
    assert re.search(r"exit codes:\n  0 .*\n  1 .*\n  2 .*\n  130 ", said)
    assert "--dry_run" in said


@pytest.mark.parametrize("command", [encode, mine])
def test_the_page_names_every_flag(command: ModuleType) -> None:
    flags = {
        action.option_strings[0]
        for action in command.build_parser()._actions
        if action.option_strings[0] not in ("-h", "--local_rank")
    }
    assert len(flags) > 15
    assert not {flag for flag in flags if flag not in PAGE}


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (encode, ["--columns", "text"], "write KEY=COLUMN, for example text=caption"),
        (encode, ["--batch_size", "0"], "0: give a whole number from 1 on"),
        (encode, ["--num_workers", "-1"], "-1: give a whole number from 0 on"),
        (mine, ["--column_mapping", "query"], "write KEY=COLUMN, for example query=question"),
        (mine, ["--batch_size", "x"], "x: give a whole number from 1 on"),
        (mine, ["--relative_margin", "much"], "argument --relative_margin: invalid"),
    ],
)
def test_mistyped_flags(
    command: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["--model", "m", "--data", "d", "--output", "o", *argv])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [encode, mine])
def test_ctrl_c(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(prepare: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_on_ranks", interrupted)
    assert command.main(["--model", "m", "--data", "d", "--output", "o"]) == 130
    assert capsys.readouterr().err.startswith("stopped")


def test_a_plain_process_encodes(tmp_path: Path) -> None:
    model = save_text_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "t.jsonl", [{"text": sentence(n)} for n in range(9)])
    argv = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    done = run_command([sys.executable, "-m", "vembed_ds.encode", *argv], seconds=120)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'out'}: complete" in done.stdout
    assert np.load(tmp_path / "out" / "embeddings.npy").shape == (9, 16)


@pytest.mark.slow
def test_two_ranks_of_the_launcher_mine_and_say_what_is_wrong(tmp_path: Path) -> None:
    model = save_text_model(tmp_path / "model")
    rows = [{"query": sentence(n), "positive": sentence(n + 40)} for n in range(40)]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    launched = ["deepspeed", "--num_gpus", "2", "--master_port"]
    argv = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "out.jsonl")]
    argv += ["--relative_margin", "none", "--num_negatives", "2"]
    for more, code in (([], 2), (["--retrieval_mode", "t2t"], 0)):
        command = [*launched, str(free_port()), "--module", "vembed_ds.mine", *argv, *more]
        done = run_command(command, seconds=200)
        assert (done.returncode != 0) == bool(code), done.stderr
        if code:
            assert "rank 0: ConfigError: --retrieval_mode: " in done.stderr
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["negatives"]) for row in found] == [2] * 40
