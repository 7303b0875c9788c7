"""Which random changes training images get, and how strong. Dimensions: N images, B batch."""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from core.errors import UserError
from datamodules.images import effects
from datamodules.images.trivial_augment import TrivialAugment

Flip = Literal["none", "random", "alternating"]

POINTS = 4  # control points along a side in elastic distortion: nine pixels of MNIST apart
_SMALLEST_SIGMA = 0.1  # of blur, in pixels, as in torchvision's GaussianBlur
EFFECTS = (
    *("rotate", "scale", "shear", "elastic"),
    *("brightness", "contrast", "saturation", "hue", "blur"),
)
_LARGEST = {
    "rotate": 180.0,
    "scale": 0.9,
    "shear": 60.0,
    "brightness": 1.0,
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.5,
}


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, none by default.

    The nine from ``rotate`` to ``blur`` come between crop and cutout. Those that are switched on
    leave the parameters of the others as they were.

    Args:
        crop: Random crops from images padded by this many mirrored pixels, fewer than a side has.
        flip: Mirror left and right: never, at random, or at random once and then alternating.
        cutout: Side in pixels of a random square set to the mean; 0 leaves it out.
        rotate: Largest angle in degrees by which images are turned, either way; 10 to 15 is usual.
        scale: Largest relative change of size; 0.1 is usual.
        shear: Largest angle in degrees by which images are slanted; 5 to 10 is usual.
        elastic: Standard deviation in pixels of the displacements of 4 x 4 control points, between
            which images bend; 1 suits digits of 28 x 28, and 2 makes some of them hard to read.
        brightness: Largest relative change of all pixels; 0.2 to 0.4 is usual, as for the next two.
        contrast: Largest relative change of the distance from the image's mean grey.
        saturation: Largest relative change of the distance from grey.
        hue: Largest turn of the hue in HSV, either way, where 0.5 is half of the circle; 0.05 to
            0.1 is usual.
        blur: Largest standard deviation in pixels of a Gaussian blur; it is drawn from 0.1 up, and
            1 is usual.
        trivial: Change each image in one of 14 ways at random (:class:`TrivialAugment`), instead of
            the nine settings above.

    Raises:
        UserError: A strength is out of range.
    """

    crop: int = 0
    flip: Flip = "none"
    cutout: int = 0
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    elastic: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    blur: float = 0.0
    trivial: bool = False

    def __post_init__(self) -> None:
        for name in ("crop", "cutout", *EFFECTS):
            value, largest = getattr(self, name), _LARGEST.get(name, math.inf)
            if not 0 <= value <= largest or value == math.inf:
                limit = f" and at most {largest:g}" if name in _LARGEST else ""
                raise UserError(f"{name} must not be negative{limit}, got {value}; 0 is without.")
        if 0 < self.blur < _SMALLEST_SIGMA:
            raise UserError(
                f"blur must be at least {_SMALLEST_SIGMA} pixels, got {self.blur}; 0 is without."
            )
        if self.trivial and any(getattr(self, name) for name in EFFECTS):
            raise UserError("trivial takes the place of rotate to blur; leave one of them out.")

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) != field.default for field in fields(self))

    def check(self, height: int, width: int, channels: int) -> None:
        """Refuse what images of this size cannot have.

        Raises:
            UserError: The crop is too large, or grey images are to change their colours.
        """
        largest = min(height, width) - 1  # the edge itself is not mirrored
        if self.crop > largest:
            raise UserError(
                f"crop must be from 0 to {largest}, got {self.crop}; mirrored pixels can pad an "
                "image by at most its smaller side - 1."
            )
        if channels != 3 and (self.saturation or self.hue):
            raise UserError(
                f"saturation and hue need images of 3 channels, these have {channels}; leave them "
                "out."
            )

    @property
    def effects(self) -> "TrivialAugment | Effects | None":
        """The changes between crop and cutout, if any."""
        if self.trivial:
            return TrivialAugment()
        return Effects(self) if any(getattr(self, name) for name in EFFECTS) else None


class Effects:
    """The nine changes from ``rotate`` to ``blur``.

    Args:
        strength: How strong each is.
    """

    draws = 8 + 2 * POINTS**2  # uniform numbers that an image needs

    def __init__(self, strength: Augmentation) -> None:
        self.strength = strength

    def parameters(self, draws: Tensor) -> Tensor:
        """Parameters of images from uniform numbers (N, ``draws``) in [0, 1).

        Returns:
            Columns (N, 8) of rotate, scale, shear, brightness, contrast, saturation, hue and blur,
            in the units of ``effects.py``, then the displacements (N, 2 * POINTS ** 2), if any.
        """
        strength = self.strength
        sigma = (_SMALLEST_SIGMA + strength.blur) / 2
        middle = torch.tensor([0, 1, 0, 1, 1, 1, 0, sigma])
        geometry = [strength.rotate, strength.scale, strength.shear]
        colour = [strength.brightness, strength.contrast, strength.saturation, strength.hue]
        spread = torch.tensor([*geometry, *colour, sigma - _SMALLEST_SIGMA])
        parameters = middle + spread * (2 * draws[:, :8] - 1)
        if not strength.elastic:
            return parameters
        normal = torch.special.ndtri(draws[:, 8:].clamp(min=2**-25))  # of 0 it is infinite
        return torch.cat([parameters, strength.elastic * normal], 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Change images (B, C, H, W) with pixels in [0, 1] by their rows of ``parameters``."""
        strength = self.strength
        images = images.contiguous()  # channel by channel; colours are twice as fast then
        rotate, scale, shear, *colour, sigma = parameters[:, :8].unbind(1)
        brightness, contrast, saturation, hue = colour
        if strength.rotate or strength.scale or strength.shear or strength.elastic:
            bend = parameters[:, 8:].unflatten(1, (2, POINTS, POINTS)) if strength.elastic else None
            images = effects.distort(images, rotate, scale, shear, bend)
        if strength.brightness:
            images = effects.adjust_brightness(images, brightness)
        if strength.contrast:
            images = effects.adjust_contrast(images, contrast)
        if strength.saturation:
            images = effects.adjust_saturation(images, saturation)
        if strength.hue:
            images = effects.adjust_hue(images, hue)
        if strength.blur:
            images = effects.gaussian_blur(images, sigma, math.ceil(3 * strength.blur))
        return images
