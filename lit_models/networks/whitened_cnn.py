"""A small convolutional network that learns CIFAR-10 in a few epochs.

Dimensions: B batch, C channels, H height, W width, K classes.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from lit_models.networks.whitening import Whitening

SCALE = 1 / 9  # of the logits; small ones at the start suit a large learning rate


class WhitenedCNN(nn.Module):
    """Three groups of 3 x 3 convolutions after a fixed layer that whitens 2 x 2 patches.

    The shape of the airbench networks (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU",
    arXiv:2404.00498, section 3): with two convolutions a group that of airbench94, with three, the
    last two of them residual, that of airbench96. :class:`Whitening` needs some training images
    before it starts.

    Args:
        num_classes: Number of classes K.
        widths: Channels of the three groups.
        in_channels: Channels C of the images.
        convolutions: Convolutions of a group.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: Sequence[int] = (32, 128, 128),
        in_channels: int = 3,
        convolutions: Literal[2, 3] = 2,
    ) -> None:
        super().__init__()
        self.whiten = Whitening(in_channels, 2)
        sizes = [self.whiten.out_channels, *widths]
        self.groups = nn.Sequential(
            *(group(*pair, residual=convolutions == 3) for pair in pairwise(sizes))
        )
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, 32, 32) -> (B, K)
        x = nn.functional.gelu(self.whiten(images))  # (B, 24, 31, 31)
        x = self.groups(x)  # (B, widths[-1], 3, 3)
        return self.head(x.amax((2, 3))) * SCALE


class Residual(nn.Sequential):
    """Layers that learn what is to be added to their input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def group(inputs: int, outputs: int, *, residual: bool) -> nn.Sequential:
    """Halve the image, (B, inputs, H, W) -> (B, outputs, H / 2, W / 2), then convolve further."""
    down = (identity_conv(inputs, outputs), nn.MaxPool2d(2), batch_norm(outputs), nn.GELU())
    second = (identity_conv(outputs, outputs), batch_norm(outputs))
    if not residual:
        return nn.Sequential(*down, *second, nn.GELU())
    third = (identity_conv(outputs, outputs), batch_norm(outputs))
    return nn.Sequential(*down, Residual(*second, nn.GELU(), *third), nn.GELU())


def identity_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3 x 3 convolution that starts by handing its inputs through (arXiv:2404.00498, 3.3)."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])
    return conv


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation without a scale of its own; the next layer's weights can learn it."""
    norm = nn.BatchNorm2d(channels, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
