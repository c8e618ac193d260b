"""Names that data and models share: the streams, and what goes into and comes out of them.

A stream is all items that are embedded in one way: ``text``, ``image``, or ``joint`` for items that
are both, on a model with a tower for each.
"""

from __future__ import annotations

JOINT = "joint"

IMAGE_INPUTS = frozenset({"pixel_values", "pixel_attention_mask", "spatial_shapes"})
"""Arguments of an image tower; they are stacked, where those of a text tower are padded."""

FEATURES = {"text": "features", "image": "image_features"}
"""Argument of each kind of item that takes the stored output of its frozen tower in the place of
the tower's inputs; of an item that is both, either may be stored."""


LOGIT_SCALE = "logit_scale"
LOGIT_BIAS = "logit_bias"
"""Outputs of a model that its loss learns; see :func:`is_learned`."""

_PROJECTION = "projection/"


def projection_name(number: int) -> str:
    """Name under which a model gives the learned projection to the space of a teacher."""
    return f"{_PROJECTION}{number}"


def is_learned(name: str) -> bool:
    """Whether an output of a model is no embedding, but something that the loss learns."""
    return name in (LOGIT_SCALE, LOGIT_BIAS) or name.startswith(_PROJECTION)


def mask_name(stream: str) -> str:
    """Name under which a model gives the mask of a stream's token embeddings."""
    return f"{stream}/mask"
