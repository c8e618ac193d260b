"""How many bytes a rank sends per step, from the model's size and the settings alone.

In a ring of N ranks, one rank sends (N - 1)/N of a tensor to gather or to scatter it, and twice
that to reduce it for all. What is left out is small: norms, the ranks' agreements, and the
embeddings, for which there is :func:`predict_embedding_bytes`.
"""

from __future__ import annotations

from typing import NamedTuple


class StepBytes(NamedTuple):
    """What one rank sends in one step.

    Attributes:
        gathered: Parameters of ZeRO-3, before they are used, from all ranks.
        gathered_nearby: The same from the ranks of a machine (hpZ).
        reduced: Gradients.
        published: Updated parameters of ZeRO-1 and 2, and the small ones of ZeRO-3.
    """

    gathered: float
    gathered_nearby: float
    reduced: float
    published: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def predict_step_bytes(
    *,
    world_size: int,
    zero_stage: int,
    parameters: int,
    trained: int,
    element_size: int,
    num_chunks: int,
    kept_chunks: int = 1,
    zero3_gather: str = "once",
    gradient_reduction: str = "once",
    persistent: int = 0,
    reused: float = 1.0,
    machine_ranks: int = 1,
    scatter_units: int = 1,
) -> StepBytes:
    """What a rank sends from embedding a batch to the updated parameters.

    Args:
        world_size: N.
        zero_stage: 0 to 3.
        parameters: Elements that the passes use, over all ranks.
        trained: Elements of them that are trained.
        element_size: Bytes of an element.
        num_chunks: Of a rank and step.
        kept_chunks: Those of them whose graph is kept, so that they are not replayed.
        zero3_gather: ``once``, ``cache_pass`` or ``per_module``.
        gradient_reduction: ``once`` or ``per_chunk``.
        persistent: Elements of the parameters that ZeRO-3 keeps gathered between passes, because
            they are small (``stage3_param_persistence_threshold``).
        reused: The share of the others that stays gathered from a chunk's forward to its backward
            pass, as :func:`reused_share` tells.
        machine_ranks: ``zero_hpz_partition_size``: those of a machine have a copy between them, from
            which all but the first gather of a step are.
        scatter_units: 2 with gloo, which scatters a reduced tensor by reducing it for all.
    """
    unit = element_size * (world_size - 1) / world_size
    reductions = num_chunks if gradient_reduction == "per_chunk" else 1
    if zero_stage < 3:
        published = trained * unit if zero_stage else 0.0
        return StepBytes(0.0, 0.0, 2 * reductions * trained * unit, published)
    gathers = _gathers(zero3_gather, num_chunks - kept_chunks, kept_chunks, reused)
    nearby = gathers - 1 if machine_ranks > 1 else 0.0
    gathered = (parameters - persistent) * element_size
    return StepBytes(
        gathered=(gathers - nearby) * gathered * (world_size - 1) / world_size,
        gathered_nearby=nearby * gathered * (machine_ranks - 1) / machine_ranks,
        reduced=scatter_units * reductions * trained * unit,
        published=persistent * unit,
    )


def reused_share(parameters: int, reuse_distance: int) -> float:
    """The share of a model that ZeRO-3 keeps gathered from its forward to its backward pass.

    A parameter is kept whose next use is less than so many elements away, and from its forward to
    its backward pass all that come behind it are used twice.

    Args:
        parameters: Elements that a pass uses.
        reuse_distance: ``stage3_max_reuse_distance``.
    """
    return min(1.0, reuse_distance / (2 * max(1, parameters)))


def predict_embedding_bytes(
    *, world_size: int, rows: int, width: int, scatter_units: int = 1
) -> float:
    """What a rank sends to gather the embeddings that are columns of the loss, and their gradient.

    Args:
        world_size: N.
        rows: Embeddings of all ranks that are gathered, in float32.
        width: Dimensions of one.
        scatter_units: As of :func:`predict_step_bytes`.
    """
    return (1 + scatter_units) * 4 * rows * width * (world_size - 1) / world_size


def _gathers(zero3_gather: str, replayed: int, kept: int, reused: float) -> float:
    """How often ZeRO-3 gathers a parameter in one step."""
    if zero3_gather == "once":
        return 1.0
    if zero3_gather == "cache_pass":
        return 1 + replayed * (2 - reused)
    # A pass without gradient leaves gathered what a backward pass would soon need, for the next one.
    # Where several graphs are kept, the order of modules is recorded anew behind them.
    anew = kept > 1 and replayed > 0
    return reused * (replayed + kept + anew) + (1 - reused) * (3 * replayed + 2 * kept)
