"""The Python API on 2 ranks of a launcher: the command's run, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_train import losses_of, run
from tests.faults.checkpoints_alike import require_same_checkpoints
from tests.integration.launching import PROGRAMS, free_port, run_command
from tests.worlds import World
from vembed_ds import Encoder

SCRIPT = Path(__file__).with_name("api_script.py")
SECONDS = 240

pytestmark = pytest.mark.distributed(2)


@pytest.mark.slow
def test_under_a_launcher_it_is_the_commands_run(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    world(2).run("tests.distributed.train_cases:use_torch_linear")
    commands = run(world(2), make_config("command.yaml", output_dir=str(tmp_path / "command")), 2)
    config = make_config()
    torchrun = [str(PROGRAMS / "torchrun"), "--nproc_per_node", "2"]
    port = ["--master_port", str(free_port())]
    done = run_command([*torchrun, *port, str(SCRIPT), config, str(tmp_path)], seconds=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]

    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["metrics"] == [commands[0]["metrics"]] * 2
    for out in ("out", "tables"):
        assert losses_of(tmp_path / out) == losses_of(tmp_path / "command")
        require_same_checkpoints(
            tmp_path / out / "checkpoint-step-4", tmp_path / "command" / "checkpoint-step-4"
        )
    assert "the configuration: rank 0 has" in ranks[0]["problem"]
    expected = Encoder(tmp_path / "model").encode_queries(["picture 3"])
    np.testing.assert_array_equal(np.array(ranks[0]["rows"], dtype=np.float32), expected)
