"""A script as a user writes it, without a guard around its statements, that trains many times.

``python api_script.py CONFIG FOLDER``: writes what it saw as JSON.
"""

import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path

import vembed_ds

imported = sorted({"torch", "deepspeed", "transformers"} & sys.modules.keys())

from vembed_ds import TrainConfig, Trainer  # noqa: E402 (what the package imports by itself was asked)
from vembed_ds.errors import VembedError  # noqa: E402

file, folder = Path(sys.argv[1]), Path(sys.argv[2])
seen = {"imported": imported}


def config(name, **settings):
    return TrainConfig.from_yaml(file, output_dir=folder / name, **settings)


def state():
    """What a training must leave as it was."""
    import torch

    from vembed_ds.distributed import comm
    from vembed_ds.engine import release

    return {
        "variables": sorted(k for k in os.environ if k in ("RANK", "WORLD_SIZE", "MASTER_PORT")),
        "joined": comm.is_joined(),
        "torch threads": torch.get_num_threads(),
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "threads": sorted(t.name for t in threading.enumerate() if "tqdm" not in t.name),
        "engines": len(release._made),
    }


import torch  # noqa: E402

# A run takes a thread for each core it may use; one, so that every sum has one order.
del os.environ["OMP_NUM_THREADS"]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
torch.set_num_threads(3)  # a number that no run chooses
logged = []
first = Trainer(config("first", num_workers=1), on_log=lambda m, step: logged.append([step, m]))
seen["first"] = first.train()
seen["logged"] = logged
seen["before"] = state() | {"threads": ["MainThread"], "engines": 0, "joined": False}
seen["states"] = {"first": state()}

seen["again"] = Trainer(config("again"), "ds_configs/zero2.json").train()
seen["states"]["again"] = state()

sharded = json.loads(Path("ds_configs/zero3.json").read_text())
seen["zero3"] = Trainer(config("zero3"), sharded).train()
seen["states"]["zero3"] = state()


def press_ctrl_c(metrics, step):
    if step == 2:
        signal.raise_signal(signal.SIGINT)


stopped = Trainer(config("stopped"), on_log=press_ctrl_c)
try:
    stopped.train()
except VembedError as error:
    kept = error  # as a notebook keeps the last one
    seen["stopped"] = f"{type(error).__name__}: {error}"
    seen["states"]["stopped"] = state()
seen["resumed"] = Trainer(config("stopped")).train(resume="auto")
seen["complete"] = Trainer(config("stopped")).train(resume="auto")

try:
    (folder / "bad.jsonl").write_text('{"query": "a text without its picture"}')
    Trainer(config("broken", data_path=folder / "bad.jsonl")).train()
except VembedError as error:
    seen["broken"] = f"{type(error).__name__}: {error}"
    seen["states"]["broken"] = state()


def raise_error(metrics, step):
    raise ValueError("a mistake in the callback")


async def cell():
    """As in a notebook, whose cells run inside of a loop."""
    return Trainer(config("loop"), on_log=raise_error).train()


seen["loop"] = asyncio.run(cell())


def beside(metrics, step):
    if step == 1:
        try:
            Trainer(config("beside")).train()
        except VembedError as error:
            seen["beside"] = f"{type(error).__name__}: {error}"


def in_thread():
    seen["thread"] = Trainer(config("thread"), on_log=beside).train()


thread = threading.Thread(target=in_thread)
thread.start()
thread.join()
seen["states"]["thread"] = state()

queries = ["picture 3 blue bright", "picture 1 green very bright"]
encoder = first.encoder()
exported = vembed_ds.Encoder(first.export(folder / "model"))
seen["rows"] = [e.encode_queries(queries).tolist() for e in (encoder, exported)]
seen["left"] = sorted(path.name for path in (folder / "first").iterdir())
sys.stdout.write(json.dumps(seen) + "\n")
