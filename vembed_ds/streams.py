"""Names that data and models share: the streams, and what goes into and comes out of them.

A stream is all items that are embedded in one way: ``text``, ``image``, or ``joint`` for items that
are both, on a model with a tower for each.
"""

from __future__ import annotations

JOINT = "joint"

IMAGE_INPUTS = frozenset({"pixel_values", "pixel_attention_mask", "spatial_shapes"})
"""Arguments of an image tower; they are stacked, where those of a text tower are padded."""

FEATURES = "features"
"""Argument that takes the stored output of a frozen backbone in the place of its inputs."""


def mask_name(stream: str) -> str:
    """Name under which a model gives the mask of a stream's token embeddings."""
    return f"{stream}/mask"
