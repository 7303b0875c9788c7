"""Each kind of change is torchvision's, and each image gets its own."""

import math
from collections.abc import Callable

import pytest
import torch
from test_networks import smooth_images
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from core.errors import UserError
from datamodules.images.augmentation import Augmentation
from datamodules.images.trivial_augment import COLOURS, KINDS, TrivialAugment

change = TrivialAugment()


def pixels(count: int = 3) -> Tensor:
    """Images (count, 3, 32, 32) uint8 that use no more than half of all values."""
    images = smooth_images(count)
    return ((images - images.min()) / (images.max() - images.min()) * 128 + 60).to(torch.uint8)


def changed(images: Tensor, name: str, strength: float) -> Tensor:
    parameters = torch.tensor([KINDS.index(name), strength]).expand(len(images), 2)
    return change(images / 255, parameters)


def affine(images: Tensor, move: list[float], slant: list[float], centre: list[float]) -> Tensor:
    return tv.affine(images, 0.0, move, 1.0, slant, center=centre)


def degrees(tangent: float) -> float:
    return math.degrees(math.atan(tangent))


KNOWN: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, s: x,
    "shear_x": lambda x, s: affine(x, [0, 0], [degrees(s), 0.0], [0, 0]),
    "shear_y": lambda x, s: affine(x, [0, 0], [0.0, degrees(s)], [0, 0]),
    "translate_x": lambda x, s: affine(x, [int(10 * s), 0], [0.0, 0.0], [0, 0]),
    "translate_y": lambda x, s: affine(x, [0, int(10 * s)], [0.0, 0.0], [0, 0]),
    "rotate": lambda x, s: tv.rotate(x, -100 * s),
    "brightness": lambda x, s: tv.adjust_brightness(x, 1 + s),
    "saturation": lambda x, s: tv.adjust_saturation(x, 1 + s),
    "contrast": lambda x, s: tv.adjust_contrast(x, 1 + s),
    "sharpness": lambda x, s: tv.adjust_sharpness(x, 1 + s),
}


@pytest.mark.parametrize("strength", [-0.9, -0.3, 0.3, 0.9])
@pytest.mark.parametrize("name", KNOWN)
def test_signed_kinds_are_those_of_torchvision(name: str, strength: float) -> None:
    unit = {"translate_x": 10, "translate_y": 10, "rotate": 100}.get(name, 1)
    amount = float(int(10 * strength)) if unit == 10 else unit * strength
    expected = KNOWN[name](pixels() / 255, strength)
    torch.testing.assert_close(changed(pixels(), name, amount), expected)


@pytest.mark.parametrize("level", [0, 1, 7, 15, 30])
def test_posterize_and_solarize_are_those_of_torchvision(level: int) -> None:
    images, strength = pixels(), level / 30
    bits = 8 - round(6 * strength)
    torch.testing.assert_close(
        changed(images, "posterize", strength) * 255, tv.posterize(images, bits).float()
    )
    solarized = tv.solarize(images, 255 * (1 - strength))
    torch.testing.assert_close(changed(images, "solarize", strength) * 255, solarized.float())


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_stretching_is_that_of_torchvision(name: str) -> None:
    images = pixels()
    expected = getattr(tv, name)(images).float()
    assert expected.max() - expected.min() > 250  # from half of all values
    difference = changed(images, name, 0.0) * 255 - expected
    assert difference.abs().max() <= 1.001  # torchvision cuts fractions off


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_an_even_image_stays(name: str) -> None:
    images = torch.full((1, 3, 32, 32), 51, dtype=torch.uint8)
    torch.testing.assert_close(changed(images, name, 0.0) * 255, images.float())


def test_each_image_gets_its_own_change() -> None:
    images = pixels(len(KINDS))
    strengths = torch.linspace(0.2, 0.9, len(KINDS))
    parameters = torch.stack([torch.arange(len(KINDS)).float(), strengths], 1)
    together = change(images / 255, parameters)
    for name, strength, image, result in zip(KINDS, strengths, images, together, strict=True):
        torch.testing.assert_close(result[None], changed(image[None], name, strength.item()))


def test_kinds_and_strengths_are_drawn_evenly() -> None:
    draws = torch.rand(140_000, 3, generator=torch.Generator().manual_seed(0))
    kind, strength = change.parameters(draws).unbind(1)
    counts = kind.long().bincount(minlength=len(KINDS))
    assert counts.sub(10_000).abs().max() < 500
    shears = strength[kind == KINDS.index("shear_x")]
    assert len(shears.unique()) == 61  # 31 levels of each sign, of which nothing is one
    assert shears.abs().max().item() == pytest.approx(0.99)
    assert shears.mean().abs() < 0.02
    assert strength[kind == KINDS.index("solarize")].min() == 0


def test_pixels_stay_in_their_range() -> None:
    draws = torch.rand(200, 3, generator=torch.Generator().manual_seed(1))
    result = change(torch.rand(200, 3, 32, 32), change.parameters(draws))
    assert result.min() >= 0
    assert result.max() <= 1


def test_beside_other_effects_it_is_refused() -> None:
    with pytest.raises(UserError, match="trivial takes the place of rotate to blur"):
        Augmentation(trivial=True, blur=1.0)


def test_a_cpu_makes_a_change_of_those_that_drew_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All eight changes of colour were made of all images, at ten times the cost of a rotation."""
    seen = []

    def equalize(images: Tensor, strength: Tensor) -> Tensor:
        seen.append(len(images))
        return images

    monkeypatch.setitem(COLOURS, "equalize", equalize)
    parameters = change.parameters(torch.rand(64, 3, generator=torch.Generator().manual_seed(0)))
    change(smooth_images(64).clamp(0, 1), parameters)
    assert seen == [int((parameters[:, 0] == KINDS.index("equalize")).sum())]
    assert 0 < seen[0] < 12
