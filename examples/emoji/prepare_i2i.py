"""Pairs of pictures of one emoji by two artists, with its name.

``python examples/emoji/prepare_i2i.py data/emoji_i2i`` writes ``train.parquet`` (pictures of noto,
openmoji and fluent3d, both ways) and ``val.parquet`` (twemoji, an artist that training never sees,
to noto). A seventh of the emoji is held out of training altogether and is what ``val.parquet`` holds.
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
    tables = {
        artist: pd.read_parquet(SOURCE / f"{artist}.parquet").set_index("codepoints")
        for artist in (*TRAINED, "twemoji")
    }
    train = [
        _pair(emoji, tables[one], tables[other])
        for one, other in itertools.permutations(TRAINED, 2)
        for emoji in tables[one].index
        if not _held_out(emoji)
    ]
    val = [
        _pair(emoji, tables["twemoji"], tables["noto"])
        for emoji in sorted(tables["noto"].index)
        if _held_out(emoji)
    ]
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("val", val)):
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
        print(f"{folder / split}.parquet: {len(rows)} pairs")


def _pair(emoji: str, query: pd.DataFrame, positive: pd.DataFrame) -> dict[str, str | bytes]:
    """The emoji by the query's artist and by the other; ``query`` is its name."""
    return {
        "query": query["name"][emoji],
        "query_image": query["image"][emoji],
        "positive_image": positive["image"][emoji],
        "label": emoji,
    }


def _held_out(emoji: str) -> bool:
    return hashlib.sha256(emoji.encode()).digest()[0] % HELD_OUT_EVERY == 0


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data/emoji_i2i")
