"""A script for a launcher: ``torchrun --nproc_per_node 2 api_script.py CONFIG FOLDER``."""

import json
import sys
from pathlib import Path

from PIL import Image

from vembed_ds import TrainConfig, Trainer
from vembed_ds.data.readers import load_table
from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError

file, folder = Path(sys.argv[1]), Path(sys.argv[2])
config = TrainConfig.from_yaml(file)
trainer = Trainer(config, "ds_configs/zero2.json")
metrics = [trainer.train()]
# A second run in the same world, of the same pairs as a table with the pictures in it.
root = Path(config["image_root"])
rows = [
    {"query": row["query"], "positive": Image.open(root / row["positive"])}
    for row in load_table([config["data_path"]], key="data_path")
]
without = TrainConfig.from_yaml(
    file, data_path=None, val_data_path=None, output_dir=folder / "tables"
)
metrics.append(Trainer(without, train_data=rows, eval_data=rows).train())
trainer.export(folder / "model")
rows_of_text = trainer.encoder().encode_queries(["picture 3"]).tolist()

# A mistake that one rank alone finds is every rank's, and the world goes on.
try:
    Trainer(TrainConfig.from_yaml(file, batch_size=4 + comm.rank())).train()
except VembedError as error:
    problem = str(error)

found = {"metrics": metrics, "rows": rows_of_text, "problem": problem}
(folder / f"rank-{comm.rank()}.json").write_text(json.dumps(found))
