"""A run that goes on must have the frozen weights that it began with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor, nn

from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError
from vembed_ds.training.resuming import Resumption

FROZEN = "frozen_weights"
_SHOWN = 3


def digest_frozen(model: nn.Module) -> dict[str, str]:
    """Checksums of the frozen parameters, by name. Collective; rank 0 reads its copy.

    Args:
        model: On the host, in float32; whatever the precision of the run, nothing is rounded yet.
    """

    def digest() -> dict[str, str]:
        state = model.state_dict()  # has what a 4-bit weight stands for
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        return {name: _digest(state[name]) for name in frozen}

    return comm.run_on_main(digest, doing="reading the model")


def check_frozen(resumption: Resumption, digests: Mapping[str, str], *, model_name: object) -> None:
    """Refuse a base model that has other weights now, under whatever name.

    The engine would get the checkpoint's, but features that were stored beforehand, adapters that
    are converted alone, and whoever reads the base again would have the new ones.

    Args:
        resumption: The checkpoint.
        digests: From :func:`digest_frozen`. Which parameters there are is compared when they are loaded.
        model_name: As configured, for the message.

    Raises:
        CheckpointError: Names the weights that differ; or an earlier version wrote the checkpoint.
    """
    saved = resumption.state.get(FROZEN)
    if saved is None:
        raise CheckpointError(
            f"{resumption.folder}: has no checksums of the frozen weights, because an earlier version "
            "wrote it, so that nobody knows whether the base model is the same; begin a new run from "
            "the converted model: vembed-ds convert"
        )
    changed = [name for name, digest in digests.items() if saved.get(name, digest) != digest]
    if changed:
        shown = ", ".join(changed[:_SHOWN]) + ", ..." * (len(changed) > _SHOWN)
        raise CheckpointError(
            f"{resumption.folder}: the base model is not the one that this was trained on: "
            f"model_name={model_name!r} has other weights now in {len(changed)} of {len(digests)} "
            f"frozen parameters ({shown}); give the model as it was (its files, its revision), or "
            "begin a new run from the converted model: vembed-ds convert"
        )


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().float().cpu().contiguous()
    found = xxhash.xxh3_128(str(tuple(values.shape)).encode())
    found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
