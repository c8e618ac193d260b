"""Pairs of pictures of one emoji by two artists.

``python examples/emoji/prepare_i2i.py data/emoji_i2i`` writes ``train.parquet`` (pictures of noto,
openmoji and fluent3d, both ways) and ``val.parquet`` (twemoji, an artist that training never sees,
to noto). Every seventh emoji is held out of training altogether and is what ``val.parquet`` holds.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from pathlib import Path

import pandas as pd

SOURCE = Path(__file__).parent
TRAINED = ("noto", "openmoji", "fluent3d")
HELD_OUT_EVERY = 7


def main(target: str) -> None:
    """Write the two files."""
    pictures = {
        artist: pd.read_parquet(SOURCE / f"{artist}.parquet").set_index("codepoints")["image"]
        for artist in (*TRAINED, "twemoji")
    }
    held_out = {name for name in pictures["noto"].index if _held_out(name)}
    train = [
        {"query_image": pictures[one][name], "positive_image": pictures[other][name], "label": name}
        for one, other in itertools.permutations(TRAINED, 2)
        for name in pictures[one].index
        if name not in held_out
    ]
    val = [
        {
            "query_image": pictures["twemoji"][name],
            "positive_image": pictures["noto"][name],
            "label": name,
        }
        for name in sorted(held_out)
    ]
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("val", val)):
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
        print(f"{folder / split}.parquet: {len(rows)} pairs")


def _held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_EVERY == 0


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data/emoji_i2i")
