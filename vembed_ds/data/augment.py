"""Random image changes for training: a pure function of (image, seed)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from PIL import Image

from vembed_ds.errors import ConfigError


class ImageAugmentation:
    """A chain of kornia augmentations, described by plain data.

    Args:
        spec: One-key mappings of kornia class name to its keyword arguments, in order:
            ``[{"RandomAffine": {"degrees": 10}}, {"ColorJitter": {"brightness": 0.2}}]``.

    Raises:
        ConfigError: When kornia is missing, a class is unknown or refuses its arguments.
    """

    def __init__(self, spec: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
        self.spec = [{name: dict(kwargs) for name, kwargs in entry.items()} for entry in spec]
        self._modules = [
            _build(name, kwargs) for entry in self.spec for name, kwargs in entry.items()
        ]

    def apply(self, image: Image.Image, *, seed: int) -> Image.Image:
        """Changes one image; the default random state of torch is left as it was.

        Args:
            image: RGB.
            seed: 64-bit seed; equal seeds give equal results.

        Returns:
            RGB; of another size when an augmentation crops or resizes.
        """
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        # Kornia makes a hundred tiny tensors an image; nothing is noted of them.
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the accelerator.
            torch.default_generator.manual_seed(seed)
            for module in self._modules:
                pixels = module(pixels)
            changed = (pixels[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        return Image.fromarray(changed.contiguous().numpy())

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuilds the chain in the other process."""
        return (type(self), (self.spec,))


def _build(name: str, kwargs: Mapping[str, Any]) -> torch.nn.Module:
    """Builds one augmentation and tries it once, because kornia checks some values late."""
    kornia = _import_kornia()
    known = _class_names(kornia)
    if name not in known:
        nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"image_augmentation={name}: kornia.augmentation has no such 2D class; "
            f"the nearest is {nearest}"
        )
    try:
        module: torch.nn.Module = getattr(kornia, name)(
            **{key: _tupled(value) for key, value in kwargs.items()}
        )
        with torch.random.fork_rng(devices=[]):
            module(torch.full((1, 3, 64, 64), 0.5))
    except Exception as error:  # kornia's own checks raise plain Exception
        raise ConfigError(
            f"image_augmentation={{{name}: {dict(kwargs)}}}: kornia refuses it ({error}); "
            f"see the documentation of kornia.augmentation.{name}"
        ) from error
    return module


def _import_kornia() -> Any:
    try:
        return importlib.import_module("kornia.augmentation")
    except ImportError as error:
        raise ConfigError(
            f"image_augmentation needs kornia, which cannot be imported ({error}); "
            "pip install 'vembed-ds[augment]'"
        ) from error


def _class_names(kornia: Any) -> list[str]:
    return [
        name
        for name, value in vars(kornia).items()
        if isinstance(value, type)
        and issubclass(value, kornia.AugmentationBase2D)
        and not name.endswith("Base2D")
    ]


def _tupled(value: Any) -> Any:
    """YAML has lists where kornia wants tuples."""
    return tuple(_tupled(entry) for entry in value) if isinstance(value, list | tuple) else value
