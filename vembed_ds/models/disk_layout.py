"""How transformers writes a model's weights: which tensors, under which names.

The names in its files and the model's differ (fused experts, old spellings), and of tied weights
one is written. transformers' own functions say how; they are asked on the meta device, where
nothing takes memory, and what belongs together is then converted on its own.
``stored.py`` is the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    apply_converters,
    dot_natural_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from vembed_ds.errors import CheckpointError


@dataclass(frozen=True)
class Group:
    """Tensors of a model that become tensors of its files together.

    Attributes:
        sources: Names in the model.
        targets: What becomes of them, by name in the files, on the meta device.
        same: Whether it is one tensor, of which only the name may change.
    """

    sources: tuple[str, ...]
    targets: Mapping[str, Tensor]
    same: bool


class DiskLayout:
    """The weights that ``save_pretrained`` would write.

    Args:
        model: A Hugging Face model on the meta device, made from its config.

    Attributes:
        groups: All that is written.
        targets: All names in the files with shapes and formats, in transformers' order.
        tied: Name of every weight that is not written, with the one that is written for it.

    Raises:
        CheckpointError: This version of transformers converts in a way that is not known.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        written = _written(model)
        self.tied = _tied(model, written)
        rules = get_model_conversion_mapping(model, add_legacy=False)
        # As transformers does for a model that was not loaded from files.
        rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]
        model._weight_conversions = rules or None
        converters = [rule for rule in rules[::-1] if isinstance(rule, WeightConverter)]
        self._converters = [rule.reverse_transform() for rule in converters]
        self.targets: dict[str, Tensor] = dict(revert_weight_conversion(model, dict(written)))
        self.groups = [self._group(names, written) for names in self._together(written)]
        self._check()

    def convert(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the files.

        Args:
            group: One of :attr:`groups`.
            tensors: Its sources, by name in the model.
        """
        if group.same:
            ((target, _),) = group.targets.items()
            return {target: tensors[group.sources[0]]}
        converted = revert_weight_conversion(self._model, dict(tensors))
        return {name: tensor.contiguous() for name, tensor in converted.items()}

    def _group(self, names: list[str], written: Mapping[str, Tensor]) -> Group:
        tensors = {name: written[name] for name in names}
        targets = dict(revert_weight_conversion(self._model, dict(tensors)))
        return Group(tuple(names), targets, same=self._converted(names[0]) is None)

    def _together(self, written: Mapping[str, Tensor]) -> list[list[str]]:
        """Names that one conversion takes, each such list in transformers' order."""
        groups: dict[str, list[str]] = {}
        for name in sorted(written, key=dot_natural_key):
            groups.setdefault(self._converted(name) or f"{name} alone", []).append(name)
        return list(groups.values())

    def _converted(self, name: str) -> str | None:
        """What a conversion makes of a tensor first; ``None``: it is at most renamed."""
        made, pattern = apply_converters(name, self._converters)
        return made if pattern is not None else None

    def _check(self) -> None:
        """What is converted piece by piece is what transformers makes of the whole."""
        pieces = {n: t.shape for group in self.groups for n, t in group.targets.items()}
        if pieces != {name: tensor.shape for name, tensor in self.targets.items()}:
            differing = pieces.keys() ^ self.targets.keys() or pieces.keys()
            raise CheckpointError(
                f"{type(self._model).__name__}: transformers {transformers.__version__} combines "
                f"tensors in a way that is not known here (first: {min(differing)}); convert with "
                "the version that trained"
            )


def _written(model: Any) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    written: dict[str, Tensor] = remove_tied_weights_from_state_dict(state, model)
    return written


def _tied(model: Any, written: Mapping[str, Tensor]) -> dict[str, str]:
    values = model.state_dict(keep_vars=True)
    kept = {id(values[name]): name for name in written}
    return {
        name: kept[id(value)]
        for name, value in values.items()
        if name not in written and id(value) in kept
    }
