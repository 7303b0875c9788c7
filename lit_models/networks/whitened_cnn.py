"""A small convolutional network that learns CIFAR-10 in a few epochs.

Dimensions: B batch, C channels, H height, W width, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class WhitenedCNN(nn.Module):
    """Three groups of two 3 x 3 convolutions behind a fixed layer that whitens 2 x 2 patches.

    The shape of the airbench94 network (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU",
    arXiv:2404.00498, section 3); the whitening layer is Page's ("How to train your ResNet").
    The first layer's filters are the eigenvectors of the patch covariance and their negatives, so
    the network needs some training images before it starts: :meth:`init_from_data`.

    Args:
        num_classes: Number of classes K.
        widths: Channels of the three groups.
        in_channels: Channels C of the images.
        scale: Factor on the logits; small logits at the start suit a large learning rate.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: Sequence[int] = (32, 128, 128),
        in_channels: int = 3,
        scale: float = 1 / 9,
    ) -> None:
        super().__init__()
        patch = in_channels * 2 * 2
        self.whiten = nn.Conv2d(in_channels, 2 * patch, 2)
        self.whiten.weight.requires_grad_(False)
        self.whiten.bias = nn.Parameter(torch.zeros(2 * patch))
        sizes = [2 * patch, *widths]
        self.groups = nn.Sequential(*map(group, sizes, sizes[1:]))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:  # (B, C, 32, 32) -> (B, K)
        x = nn.functional.gelu(self.whiten(images))  # (B, 24, 31, 31)
        x = self.groups(x)  # (B, widths[-1], 3, 3)
        return self.head(x.amax((2, 3))) * self.scale

    @torch.no_grad()
    def init_from_data(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the first layer so that its outputs over ``images`` (B, C, H, W) are decorrelated.

        Args:
            images: Normalised training images without augmentation; a few thousand are enough.
            eps: Added to the eigenvalues, so that flat directions are not blown up.
        """
        patches = nn.functional.unfold(images, 2)  # (B, C * 4, P)
        patches = patches.transpose(1, 2).reshape(-1, patches.shape[1]).double()
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + eps).sqrt()).T.flip(0)  # strongest direction first
        # an eigenvector's sign is arbitrary: fix it, so that every machine gets the same filters
        filters *= filters.gather(1, filters.abs().argmax(1, keepdim=True)).sign()
        filters = filters.reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def group(inputs: int, outputs: int) -> nn.Sequential:
    """Halve the image, (B, inputs, H, W) -> (B, outputs, H / 2, W / 2), then convolve once more."""
    return nn.Sequential(
        identity_conv(inputs, outputs),
        nn.MaxPool2d(2),
        batch_norm(outputs),
        nn.GELU(),
        identity_conv(outputs, outputs),
        batch_norm(outputs),
        nn.GELU(),
    )


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
