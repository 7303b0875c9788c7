"""David Page's residual network of nine layers, and his changes of it step by step.

Dimensions: B batch, C channels, H height, W width, K classes, G images of a ghost batch.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from lit_models.networks.whitened_cnn import Residual
from lit_models.networks.whitening import Whitening

SCALE = 0.125  # of the logits


class ResNet9(nn.Module):
    """The network of "How to train your ResNet" (Page, 2018 and 2019), each step a switch.

    As it stands it is that of part 4: a first convolution, three that halve the image, residual
    pairs after the first and the last of those, and a linear layer on the maxima over what is left
    of height and width. Part 8, "Bag of tricks", adds the switches: in
    ``configs/studies/train_your_resnet.yaml`` one after the other, in
    ``configs/cifar10_resnet9.yaml`` all.

    Args:
        num_classes: Number of classes K.
        width: Channels of the first convolution; the others have 2, 4 and 8 times as many.
        in_channels: Channels C of the images.
        pool_first: Take the maxima before normalisation and activation instead of after them: the
            two have a quarter of the work.
        activation: ReLU, or CELU with alpha 0.3 (Barron, arXiv:1704.07483), which is smooth.
        ghost: Images G that are normalised together; 0 takes the whole batch of a process. Small
            groups are noisy, which regularises (Hoffer et al., arXiv:1705.08741).
        train_scales: Train the factor of each normalised channel. Frozen, the next layer's filters
            do its work, and the biases bear a far larger learning rate.
        whiten: Begin with fixed filters that whiten 3 x 3 patches, and a 1 x 1 convolution of them.

    Raises:
        ValueError: ``ghost`` is negative.
    """

    def __init__(
        self,
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        pool_first: bool = False,
        activation: Literal["relu", "celu"] = "relu",
        ghost: int = 0,
        train_scales: bool = True,
        whiten: bool = False,
    ) -> None:
        super().__init__()
        if ghost < 0:
            raise ValueError(f"ghost must not be negative, got {ghost}; 0 is the whole batch.")

        def normalize(channels: int) -> nn.Module:
            norm = GhostBatchNorm(channels, ghost) if ghost else nn.BatchNorm2d(channels)
            norm.weight.requires_grad_(train_scales)
            return norm

        def activate() -> nn.Module:
            return nn.CELU(0.3) if activation == "celu" else nn.ReLU()

        def convolve(inputs: int, outputs: int, size: int = 3) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
            return [conv, normalize(outputs), activate()]

        def halve(inputs: int, outputs: int) -> list[nn.Module]:
            layers = convolve(inputs, outputs)
            layers.insert(1 if pool_first else 3, nn.MaxPool2d(2))
            return layers

        def residual(channels: int) -> Residual:
            return Residual(*convolve(channels, channels), *convolve(channels, channels))

        if whiten:
            whitening = Whitening(in_channels, 3, mirrored=False, bias=False)
            first = [whitening, *convolve(whitening.out_channels, width, 1)]
        else:
            first = convolve(in_channels, width)
        self.layers = nn.Sequential(
            *first,  # (B, width, H, W); H - 2 and W - 2 after the whitening
            *halve(width, 2 * width),
            residual(2 * width),
            *halve(2 * width, 4 * width),
            *halve(4 * width, 8 * width),
            residual(8 * width),
        )
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        x = self.layers(images)  # (B, 8 * width, H / 8, W / 8)
        return self.head(x.amax((2, 3))) * SCALE


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of ``size`` images at a time, in training.

    The running averages weigh all groups nearly alike, and a batch nearly as they would otherwise.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        parts = x.split(self.size)
        self.momentum = 0.1 / len(parts)  # torch's default for the whole batch
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in parts])
