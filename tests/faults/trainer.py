"""A rank of ``vembed_ds.train`` to which something happens in the middle of a step.

``python -m tests.faults.trainer FAULT RANK STEP CHUNK ARGUMENT ...``, with the arguments of the command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from tests.faults.ranks import FAULTS


def install(fault: str, victim: int, place: str) -> None:
    """Let the fault happen to the rank as soon as it embeds a chunk at a place in the run."""
    from vembed_ds.distributed import phases
    from vembed_ds.engine.train_engine import TrainEngine

    embed = TrainEngine.embed

    def embed_or_fail(self: TrainEngine, inputs: Mapping[str, Mapping[str, Any]]) -> Any:
        if str(phases.current()).startswith(place):
            sys.stdout.write(f"{place}\n")
            sys.stdout.flush()
            if int(os.environ["RANK"]) == victim:
                FAULTS[fault]()
        return embed(self, inputs)

    TrainEngine.embed = embed_or_fail  # type: ignore[method-assign]


def main() -> int:
    # The DeepSpeed launcher puts its own flag before everything else.
    own = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    fault, victim, step, chunk, *arguments = [word for word in sys.argv[1:] if word not in own]
    install(fault, int(victim), f"step {step}: embedding chunk {chunk} ")
    from vembed_ds import train

    return train.main([*own, *arguments])


if __name__ == "__main__":
    raise SystemExit(main())
