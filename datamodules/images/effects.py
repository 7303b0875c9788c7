"""Changes of whole batches of images, each image by parameters of its own.

Dimensions: B batch, C channels, H height, W width, P control points along a side. Images are float
(B, C, H, W) with pixels in [0, 1]. Nothing is drawn here, so the same parameters give the same
images on any device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601), as in torchvision


def distort(
    images: Tensor,
    rotate: Tensor,
    scale: Tensor,
    shear: Tensor,
    displacements: Tensor | None = None,
) -> Tensor:
    """Rotate, scale, shear and bend images around their centre in one bilinear interpolation.

    Beyond an edge lies the mirrored image. The elastic part is U-Net's (arXiv:1505.04597, section
    3.1): displacements of a coarse grid of control points, here from corner to corner, with bicubic
    interpolation between them. It was brought to MNIST by Simard, Steinkraus and Platt ("Best
    practices for convolutional neural networks", ICDAR 2003).

    Args:
        images: Images (B, C, H, W).
        rotate: Angles (B,) in degrees, clockwise.
        scale: Factors (B,); above 1 enlarges.
        shear: Angles (B,) in degrees along the rows, as in torchvision's ``affine``.
        displacements: Pixels (B, 2, P, P) by which the place that is looked at moves, x then y.
    """
    height, width = images.shape[2:]
    x = torch.linspace(1 - width, width - 1, width, device=images.device) / 2  # from the centre
    y = torch.linspace(1 - height, height - 1, height, device=images.device)[:, None] / 2
    rotate, scale, shear = (t.view(-1, 1, 1) for t in (rotate.deg2rad(), scale, shear.deg2rad()))
    cos, sin, tan = rotate.cos() / scale, rotate.sin() / scale, shear.tan()
    # where a pixel of the result comes from: rotation undone, then shear
    x, y = (cos - tan * sin) * x + (sin + tan * cos) * y, cos * y - sin * x  # (B, H, W)
    if displacements is not None:
        points = displacements.shape[2]
        rows, columns = (bicubic(points, size, images.device) for size in (height, width))
        right, down = (rows @ displacements @ columns.T).unbind(1)
        x, y = x + right, y + down
    grid = torch.stack([x * (2 / (width - 1)), y * (2 / (height - 1))], 3)  # to [-1, 1]
    # align_corners mirrors at the outer pixels, as reflect_pad does
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=True)


def bicubic(points: int, size: int, device: torch.device) -> Tensor:
    """Weights (size, points) of bicubic interpolation; the outer points lie on the outer pixels."""
    unit = torch.eye(points, device=device)[None, None]
    return F.interpolate(unit, (size, points), mode="bicubic", align_corners=True)[0, 0]


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor (B,)."""
    return blend(torch.zeros_like(images), images, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move each image away from its mean grey, for factors (B,) above 1, or towards it."""
    return blend(grey(images).mean((1, 2, 3), keepdim=True).expand_as(images), images, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Move each image away from its grey version, for factors (B,) above 1, or towards it."""
    return blend(grey(images).expand_as(images), images, factor)


def blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Move each image away from another, for factors (B,) above 1, or towards it."""
    return other.lerp(images, factor.view(-1, 1, 1, 1)).clamp(0, 1)


def grey(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of colour images; others are averaged over their channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of colour images in HSV by ``shift`` (B,), of which 1 is the whole circle."""
    value, channel = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    difference = images.roll(-1, 1) - images.roll(-2, 1)  # G - B, B - R, R - G
    hue = 2 * channel + difference.gather(1, channel) / chroma.clamp(min=1e-8)  # in sixths
    hue = hue + 6 * shift.view(-1, 1, 1, 1)
    red_green_blue = torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)
    place = (red_green_blue + hue) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image with its own ``sigma`` (B,) in pixels; the edges are mirrored.

    Args:
        images: Images (B, C, H, W).
        sigma: Standard deviations (B,) of the kernels.
        radius: Pixels on either side of a kernel's centre; those beyond the image are left out.
    """
    batch, channels, height, width = images.shape
    radius = min(radius, height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = (-0.5 * (offsets / sigma[:, None]) ** 2).softmax(1).repeat_interleave(channels, 0)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    planes = padded.reshape(1, batch * channels, *padded.shape[2:])  # one group for each
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=batch * channels)
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=batch * channels)
    return planes.view(images.shape)
