from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vembed_ds.data.augment import ImageAugmentation
from vembed_ds.errors import ConfigError

pytest.importorskip("kornia")

Noise = Callable[..., Image.Image]
SPEC: list[dict[str, dict[str, Any]]] = [
    {
        "RandomAffine": {
            "degrees": [-10, 10],
            "translate": [0.1, 0.1],
            "scale": [0.8, 1.2],
            "p": 1.0,
        }
    },
    {"ColorJitter": {"brightness": [0.8, 1.2], "contrast": 0.2}},
    {"RandomHorizontalFlip": {"p": 0.5}},
]


def pixels(image: Image.Image) -> list[int]:
    assert image.mode == "RGB"
    return np.asarray(image).ravel().tolist()  # type: ignore[no-any-return]


def test_result_is_a_function_of_image_and_seed(noise: Noise) -> None:
    augmentation, image = ImageAugmentation(SPEC), noise()
    first = pixels(augmentation.apply(image, seed=5))
    torch.rand(7)
    np.random.default_rng().random()
    assert pixels(augmentation.apply(image, seed=5)) == first
    assert pixels(ImageAugmentation(SPEC).apply(image, seed=5)) == first
    assert pixels(augmentation.apply(image, seed=6)) != first
    assert pixels(augmentation.apply(noise(1), seed=5)) != first
    assert pixels(pickle.loads(pickle.dumps(augmentation)).apply(image, seed=5)) == first


@pytest.mark.parametrize(
    "name",
    [
        "RandomErasing",
        "RandomGaussianBlur",
        "RandomGaussianNoise",
        "RandomResizedCrop",
        "RandomSaltAndPepperNoise",
        "RandomRotation",
    ],
)
def test_common_classes_are_pure(name: str, noise: Noise) -> None:
    required: dict[str, dict[str, Any]] = {
        "RandomGaussianBlur": {"kernel_size": [3, 3], "sigma": [0.1, 2.0]},
        "RandomResizedCrop": {"size": [8, 8]},
        "RandomRotation": {"degrees": 20},
    }
    augmentation = ImageAugmentation([{name: required.get(name, {}) | {"p": 1.0}}])
    results = [pixels(augmentation.apply(noise(), seed=seed)) for seed in (2**64 - 1, 2**64 - 1, 3)]
    assert results[0] == results[1] != results[2]


def test_torch_random_state_is_untouched(noise: Noise) -> None:
    before = torch.get_rng_state()
    ImageAugmentation(SPEC).apply(noise(), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_size_may_change(noise: Noise) -> None:
    crop = ImageAugmentation([{"RandomCrop": {"size": [10, 12]}}])
    assert crop.apply(noise(), seed=0).size == (12, 10)


def test_empty_chain_gives_the_image_back(noise: Noise) -> None:
    assert pixels(ImageAugmentation([]).apply(noise(), seed=0)) == pixels(noise())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("RandomAfine", "RandomAffine"), ("RandomMixUp", "Random"), ("Sequential", "")],
)
def test_unknown_class_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"image_augmentation={name}: .*the nearest is {nearest}"):
        ImageAugmentation([{name: {}}])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"degrees": 10, "nope": 1}, "unexpected keyword argument 'nope'"),
        ({"degrees": -10}, "must be non negative"),
        ({}, "missing 1 required positional argument"),
        ({"degrees": "a"}, "invalid data type"),
    ],
)
def test_refused_arguments_quote_kornia(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"image_augmentation=\{{RandomAffine: .*{message}"):
        ImageAugmentation([{"RandomAffine": kwargs}])


def test_missing_kornia_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(ConfigError, match=r"pip install 'vembed-ds\[augment\]'"):
        ImageAugmentation(SPEC)
