"""One random change of a random kind for each image of a batch.

Dimensions: B batch, C channels, H height, W width, N images. As in ``effects.py`` images are float
(B, C, H, W) with pixels in [0, 1], and nothing is drawn here.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.images.effects import adjust_contrast, adjust_saturation, blend

KINDS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "saturation", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
_MOVES = KINDS[1:6]
LARGEST = {  # the wide search space of the paper, table 6, as torchvision has it
    "shear_x": 0.99,
    "shear_y": 0.99,
    "translate_x": 32.0,
    "translate_y": 32.0,
    "rotate": 135.0,
    "brightness": 0.99,
    "saturation": 0.99,
    "contrast": 0.99,
    "sharpness": 0.99,
}
_LEVELS = 31  # strengths from none to the largest


class TrivialAugment:
    """TrivialAugment Wide (Müller and Hutter, arXiv:2103.10158, section 3).

    A kind of change and its strength are drawn evenly for each image; there is nothing to tune.
    """

    draws = 3  # uniform numbers that an image needs

    def parameters(self, draws: Tensor) -> Tensor:
        """Columns (N, 2) of kind and strength, from uniform numbers (N, 3) in [0, 1)."""
        kind = (draws[:, 0] * len(KINDS)).floor()
        level = (draws[:, 1] * _LEVELS).floor() / (_LEVELS - 1)
        sign = torch.where(draws[:, 2] < 0.5, -1.0, 1.0)
        largest = torch.tensor([LARGEST.get(name, 1.0) for name in KINDS])
        signed = torch.tensor([name in LARGEST for name in KINDS])
        strength = level * largest[kind.long()]
        return torch.stack([kind, torch.where(signed[kind.long()], sign * strength, strength)], 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Change images (B, C, H, W) by their rows of ``parameters``."""
        kind, strength = parameters.unbind(1)
        is_kind = {name: kind == number for number, name in enumerate(KINDS)}
        moved = torch.stack([is_kind[name] for name in _MOVES])
        images = changed(images, moved.any(0), move, *(strength * moved))
        for name, change in COLOURS.items():
            images = changed(images, is_kind[name], change, strength.view(-1, 1, 1, 1))
        return images


def changed(
    images: Tensor, mine: Tensor, change: Callable[..., Tensor], *amounts: Tensor
) -> Tensor:
    """Images (B, C, H, W) of which those that are ``mine`` (B,) are changed by their amounts.

    A CPU looks at these alone. The host of a GPU would have to wait to know which they are, so a
    GPU changes all and keeps these.
    """
    if images.device.type != "cpu":
        return torch.where(mine.view(-1, 1, 1, 1), change(images, *amounts), images)
    (places,) = mine.nonzero(as_tuple=True)
    if not len(places):  # affine_grid makes no grid of no images
        return images
    ours = change(images[places], *(amount[places] for amount in amounts))
    return images.index_copy(0, places, ours)


def move(
    images: Tensor,
    shear_x: Tensor,
    shear_y: Tensor,
    translate_x: Tensor,
    translate_y: Tensor,
    rotate: Tensor,
) -> Tensor:
    """Shear, translate and rotate images by amounts (B,), to the nearest pixel, black beyond.

    Args:
        images: Images (B, C, H, W).
        shear_x: Tangents, about the upper left corner; likewise ``shear_y``.
        translate_x: Pixels; likewise ``translate_y``.
        rotate: Degrees clockwise about the centre.
    """
    height, width = images.shape[2:]
    angle = rotate.deg2rad()
    # where a pixel of the result comes from, in pixels from the centre
    right = shear_x * height / 2 - translate_x
    down = shear_y * width / 2 - translate_y
    across = shear_x + angle.sin()
    along = shear_y - angle.sin()
    x = torch.stack([angle.cos(), across * (height / width), right * (2 / width)], 1)
    y = torch.stack([along * (width / height), angle.cos(), down * (2 / height)], 1)
    grid = F.affine_grid(torch.stack([x, y], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def brightness(images: Tensor, strength: Tensor) -> Tensor:
    return (images * (1 + strength)).clamp(0, 1)


def saturation(images: Tensor, strength: Tensor) -> Tensor:
    return adjust_saturation(images, 1 + strength)


def contrast(images: Tensor, strength: Tensor) -> Tensor:
    return adjust_contrast(images, 1 + strength)


def sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Away from a smoothed image or towards it; the outer pixels stay."""
    channels = images.shape[1]
    kernel = torch.ones(channels, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=channels)
    return blend(smooth, images, 1 + strength)


def posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Keep 8 bits of a pixel for a strength of 0 and 2 for 1."""
    step = 2 ** (6 * strength).round()
    levels = (images * 255 / step + 1e-3).floor()  # 1e-3: pixels are whole but for rounding
    return levels * step / 255


def solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Invert what is brighter than ``1 - strength``."""
    return torch.where(images >= 1 - strength, 1 - images, images)


def autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel from black to white."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Make the 256 values of each channel about equally frequent, as PIL does."""
    values = (images * 255).round().long().flatten(2)  # (B, C, H * W)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    below = counts.cumsum(2) - counts
    brightest = values.amax(2, keepdim=True)
    step = (values.shape[2] - counts.gather(2, brightest)) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equal = (table.gather(2, values) / 255).view_as(images)
    return torch.where(step[..., None] > 0, equal, images)


COLOURS = {
    change.__name__: change
    for change in (
        *(brightness, saturation, contrast, sharpness),
        *(posterize, solarize, autocontrast, equalize),
    )
}
