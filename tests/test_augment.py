"""Rotation, bending, colours and blur: each image as torchvision would change it alone."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from core.errors import UserError
from datamodules import DigitsDataModule, MNISTDataModule
from datamodules.images.augmentation import POINTS, Augmentation, Effects
from datamodules.images.base import ImageDataModule
from datamodules.images.effects import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    bicubic,
    distort,
    gaussian_blur,
)
from datamodules.loaders.images import ImageLoader

ALL: dict[str, Any] = {
    "rotate": 20,
    "scale": 0.2,
    "shear": 10,
    "elastic": 1.5,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "blur": 1,
}


def some_images(channels: int = 3, count: int = 6, height: int = 17, width: int = 14) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.rand(count, channels, height, width, generator=generator)


def smooth_images() -> Tensor:
    """A hill in the middle of a black field, colour by colour."""
    y, x = torch.meshgrid(torch.linspace(-2, 2, 41), torch.linspace(-2, 2, 41), indexing="ij")
    hills = [(-((x - dx) ** 2) - 2 * (y - dx) ** 2).mul(5).exp() for dx in (-0.3, 0.0, 0.3)]
    return torch.stack(hills).expand(5, 3, 41, 41)


def each(values: list[float]) -> Tensor:
    return torch.tensor(values)


# --- distortion -----------------------------------------------------------------------------------

ONE, NONE = torch.ones(5), torch.zeros(5)


def test_affine_maps_are_those_of_torchvision() -> None:
    images = smooth_images()
    rotate = each([0, 30, -30, 90, 7])
    scale = each([1, 0.8, 1.2, 1, 1.05])
    shear = each([10, 0, -20, 0, 5])
    changed = distort(images, rotate, scale, shear)
    for image, got, *values in zip(images, changed, rotate, scale, shear, strict=True):
        angle, factor, slant = (float(v) for v in values)
        bilinear = tv.InterpolationMode.BILINEAR
        expected = tv.affine(image, angle, [0, 0], factor, [slant, 0.0], bilinear)
        middle = (..., slice(12, 29), slice(12, 29))  # torchvision has black beyond the edges
        torch.testing.assert_close(got[middle], expected[middle], atol=1e-5, rtol=0)


def test_rotation_is_that_of_torchvision_the_other_way_round() -> None:
    images = smooth_images()
    expected = tv.rotate(images, 25, tv.InterpolationMode.BILINEAR)
    torch.testing.assert_close(distort(images, -25 * ONE, ONE, NONE), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_changes_by_no_distortion(channels: int) -> None:
    images = some_images(channels, 5)
    no_displacement = torch.zeros(5, 2, POINTS, POINTS)
    for displacements in (None, no_displacement):
        same = distort(images, NONE, ONE, NONE, displacements)
        torch.testing.assert_close(same, images, atol=1e-5, rtol=0)


def test_equal_displacements_shift_and_mirror_at_the_edge() -> None:
    images = some_images(1, 5, 12, 10)
    displacements = torch.tensor([2.0, -3.0]).view(1, 2, 1, 1).expand(5, 2, POINTS, POINTS)
    moved = distort(images, NONE, ONE, NONE, displacements)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="reflect")
    expected = torch.from_numpy(padded[:, :, 0:12, 5:15])  # from three up and two to the right
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_distortion_equals_a_slow_reference() -> None:
    """Looks up every pixel of a brightness that is linear in its place, far from the edges."""
    y, x = torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij")
    images = torch.stack([x, y]).expand(3, 2, 41, 41)
    generator = torch.Generator().manual_seed(0)
    rotate, scale, shear = each([10, -20, 5]), each([1.1, 0.9, 1]), each([5, 0, -10])
    displacements = torch.randn(3, 2, POINTS, POINTS, generator=generator)
    changed = distort(images, rotate, scale, shear, displacements)
    fields = torch.nn.functional.interpolate(
        displacements, (41, 41), mode="bicubic", align_corners=True
    )
    for n in range(3):
        r, t = math.radians(rotate[n]), math.tan(math.radians(shear[n]))
        turn = np.array([[math.cos(r), -math.sin(r)], [math.sin(r), math.cos(r)]])
        forward = float(scale[n]) * turn @ np.array([[1, -t], [0, 1]])
        for row, column in ((20, 20), (12, 25), (30, 15), (22, 9)):
            place = np.linalg.solve(forward, np.array([column - 20, row - 20])) + 20
            expected = place + fields[n, :, row, column].numpy()
            np.testing.assert_allclose(changed[n, :, row, column], expected, atol=1e-4)


def test_displacement_is_smooth_and_met_at_the_control_points() -> None:
    weights = bicubic(4, 31, torch.device("cpu"))
    torch.testing.assert_close(weights.sum(1), torch.ones(31))
    torch.testing.assert_close(weights[::10], torch.eye(4), atol=1e-6, rtol=0)
    steps = weights.diff(dim=0)
    assert steps.abs().max() < 0.16
    assert steps.diff(dim=0).abs().max() < 0.06  # no kink, as linear interpolation has


# --- colours --------------------------------------------------------------------------------------

FACTORS = [0.0, 0.5, 1.0, 1.3, 2.0, 0.9]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (adjust_brightness, tv.adjust_brightness),
        (adjust_contrast, tv.adjust_contrast),
        (adjust_saturation, tv.adjust_saturation),
    ],
)
def test_colours_are_those_of_torchvision(channels: int, ours: Any, reference: Any) -> None:
    images = some_images(channels)
    changed = ours(images, each(FACTORS))
    for image, got, factor in zip(images, changed, FACTORS, strict=True):
        torch.testing.assert_close(got, reference(image, factor), atol=1e-5, rtol=0)


def test_hue_is_that_of_torchvision() -> None:
    images = some_images()
    images[:, :, 0] = images[:, :1, 0]  # grey has no hue
    images[:, :2, 1] = images[:, :1, 1]  # two channels may be the largest
    images[:, :, 2] = 0
    shifts = [0.0, 0.1, -0.2, 0.5, -0.5, 0.33]
    for image, got, shift in zip(images, adjust_hue(images, each(shifts)), shifts, strict=True):
        torch.testing.assert_close(got, tv.adjust_hue(image, shift), atol=1e-5, rtol=0)


@given(st.floats(-0.5, 0.5))
def test_a_turned_hue_turns_back(shift: float) -> None:
    images = some_images()
    turn = torch.full((6,), shift)
    there = adjust_hue(images, turn)
    torch.testing.assert_close(adjust_hue(there, -turn), images, atol=1e-4, rtol=0)
    torch.testing.assert_close(there.amax(1), images.amax(1))  # value
    torch.testing.assert_close(there.amin(1), images.amin(1), atol=1e-6, rtol=0)


# --- blur -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("radius", [3, 6])
def test_blur_is_that_of_torchvision(channels: int, radius: int) -> None:
    images = some_images(channels)
    sigmas = [0.1, 0.3, 0.7, 1.0, 1.5, 2.0]
    blurred = gaussian_blur(images, each(sigmas), radius)
    for image, got, sigma in zip(images, blurred, sigmas, strict=True):
        expected = tv.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_kernel_wider_than_the_image_is_cut() -> None:
    blurred = gaussian_blur(some_images(1, 6, 5, 4), torch.full((6,), 50.0), radius=150)
    assert blurred.shape == (6, 1, 5, 4)
    assert blurred.flatten(1).std(1).max() < 0.1


# --- strengths ------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(ALL)))
def test_an_effect_leaves_the_parameters_of_the_others(name: str) -> None:
    draws = torch.rand(50, Effects.draws, generator=torch.Generator().manual_seed(0))
    every = Effects(Augmentation(**ALL)).parameters(draws)
    single = Effects(Augmentation(**{name: ALL[name]})).parameters(draws)
    column = list(ALL).index(name) - (list(ALL).index(name) > 3)
    if name == "elastic":
        assert torch.equal(single[:, 8:], every[:, 8:])
    else:
        assert torch.equal(single[:, column], every[:, column])


def test_parameters_fill_the_range_that_is_named() -> None:
    draws = torch.rand(20_000, Effects.draws, generator=torch.Generator().manual_seed(0))
    draws[0] = 0.0
    parameters = Effects(Augmentation(**ALL)).parameters(draws)
    low = [-20, 0.8, -10, 0.6, 0.6, 0.6, -0.1, 0.1]
    high = [20, 1.2, 10, 1.4, 1.4, 1.4, 0.1, 1.0]
    torch.testing.assert_close(parameters[:, :8].amin(0), each(low), atol=2e-3, rtol=0)
    torch.testing.assert_close(parameters[:, :8].amax(0), each(high), atol=5e-3, rtol=0)
    displacements = parameters[1:, 8:]
    assert parameters.isfinite().all()
    assert displacements.std().item() == pytest.approx(1.5, rel=0.01)
    assert displacements.mean().item() == pytest.approx(0, abs=0.01)
    within = (displacements.abs() < 1.5).float().mean().item()
    assert within == pytest.approx(0.6827, abs=0.005)  # the normal distribution within one sd


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rotate", -1.0), ("scale", 1.0), ("hue", 0.6), ("elastic", -0.1)),
        *(("elastic", math.inf), ("blur", math.nan), ("blur", 0.05)),
    ],
)
def test_impossible_strengths_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name}.*, got {value}"):
        Augmentation(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["saturation", "hue"])
def test_grey_images_have_no_colours_to_change(name: str) -> None:
    with pytest.raises(UserError, match=name):
        MNISTDataModule(augmentation=Augmentation(**{name: 0.1}))  # type: ignore[arg-type]


# --- in the loader --------------------------------------------------------------------------------


def loader(rank: int = 0, world: int = 1, **options: Any) -> ImageLoader:
    chosen = Augmentation(**options)
    data = ImageDataModule(val_size=0, batch_size=12 // world, augmentation=chosen)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (24, 20, 20, 3), dtype=torch.uint8, generator=generator)
    arguments = data.loader_arguments("train") | {"rank": rank, "world_size": world, "seed": 4}
    return ImageLoader(images, torch.arange(24), **arguments)


def test_effects_come_after_crop_and_flip_and_before_cutout() -> None:
    options: dict[str, Any] = {"crop": 2, "flip": "random"}
    plain, changed = loader(**options), loader(cutout=6, **options, **ALL)
    effects = changed.effects
    assert effects
    for (before, numbers), (after, same) in zip(plain, changed, strict=True):
        assert torch.equal(numbers, same)
        pixels = before * plain_std() + plain_mean()
        expected = (effects(pixels, changed.parameters[numbers]) - plain_mean()) / plain_std()
        inside = after != 0
        assert 0.8 < inside.float().mean() < 1
        torch.testing.assert_close(after[inside], expected[inside], atol=1e-4, rtol=0)
        assert after.is_contiguous(memory_format=torch.channels_last)


def plain_mean() -> Tensor:
    return ImageDataModule().mean.view(3, 1, 1)


def plain_std() -> Tensor:
    return ImageDataModule().std.view(3, 1, 1)


def test_crop_flip_and_cutout_are_those_of_a_run_without_effects() -> None:
    """The first table is drawn first: an effect that hardly shows changes hardly anything."""
    options: dict[str, Any] = {"crop": 2, "flip": "random", "cutout": 6}
    for (before, _), (after, _) in zip(loader(**options), loader(hue=1e-6, **options), strict=True):
        torch.testing.assert_close(before, after, atol=1e-3, rtol=0)


def test_without_effects_nothing_is_computed_for_them() -> None:
    assert loader(crop=2).effects is None
    assert not hasattr(loader(crop=2), "parameters")


def test_two_processes_change_images_as_one_does() -> None:
    alone, *pair = loader(**ALL), loader(0, 2, **ALL), loader(1, 2, **ALL)
    for (whole, numbers), *parts in zip(alone, *pair, strict=True):
        for rank, (part, its) in enumerate(parts):
            assert torch.equal(numbers[rank::2], its)
            torch.testing.assert_close(whole[rank::2], part, atol=1e-5, rtol=0)


def test_a_resumed_epoch_goes_on_where_it_stopped() -> None:
    whole = list(loader(**ALL))
    first = loader(**ALL)
    next(iter(first))
    second = loader(**ALL)
    second.load_state_dict(first.state_dict())
    [(images, numbers)] = second
    assert torch.equal(images, whole[1][0])
    assert torch.equal(numbers, whole[1][1])


def test_only_training_images_are_changed() -> None:
    data = DigitsDataModule(augmentation=Augmentation(rotate=20, elastic=2, blur=1))
    data.setup("fit")
    images, _ = next(iter(data.val_dataloader()))
    assert torch.equal(data.denormalize(images), data.splits["val"][0])
    changed, _ = next(iter(data.train_dataloader()))
    stored = {image.numpy().tobytes() for image in data.splits["train"][0]}
    assert not stored & {image.numpy().tobytes() for image in data.denormalize(changed)}


def test_distorted_digits_keep_their_ink() -> None:
    data = DigitsDataModule(batch_size=1000, augmentation=Augmentation(rotate=15, elastic=1))
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    stored = data.splits["train"][0].float().mean()
    assert data.denormalize(images).float().mean() == pytest.approx(stored.item(), rel=0.05)
