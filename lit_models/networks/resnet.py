"""Residual networks. Dimensions: B batch, C channels, H height, W width, K classes."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn


class ResNet(nn.Module):
    """A residual network for images of any size (He et al., arXiv:1512.03385).

    A convolution and max-pooling halve the image; then comes a stage of ``blocks`` residual blocks
    for every width, each but the first stage halving it again; the mean over what is left of height
    and width goes to a linear layer. 307,618 parameters for two classes as it stands.

    Args:
        num_classes: Number of classes K.
        widths: Channels of the stages; another one suits images of twice the size.
        blocks: Residual blocks of each stage.
        in_channels: Channels C of the images.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int = 1,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(in_channels, widths[0]), nn.ReLU(), nn.MaxPool2d(2))
        stages = [stage(ResidualBlock, widths[0], widths[0], 1, blocks)]
        stages += [stage(ResidualBlock, *pair, 2, blocks) for pair in pairwise(widths)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        x = self.stem(images)  # (B, widths[0], H / 2, W / 2)
        x = self.stages(x)  # (B, widths[-1], H / 8, W / 8) with three widths
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two convolutions that learn what is to be added to their input (arXiv:1512.03385, figure 2).

    Where the shape changes, a 1 x 1 convolution brings the input to it (section 3.3, option B). A
    block starts by adding nothing (Goyal et al., arXiv:1706.02677, section 5.1).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, outputs, stride=stride)
        self.conv2 = conv_norm(outputs, outputs, scale=0.0)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, H, W) -> (B, outputs, H / s, W / s)
        residual = self.conv2(self.conv1(x).relu())
        return (self.shortcut(x) + residual).relu()


def stage(
    block: Callable[..., nn.Module], inputs: int, outputs: int, stride: int, blocks: int
) -> nn.Sequential:
    """Residual blocks, of which the first may change the shape."""
    rest = [block(outputs, outputs) for _ in range(blocks - 1)]
    return nn.Sequential(block(inputs, outputs, stride), *rest)


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that divides the image's sides by the stride.

    The weights start as He et al. (arXiv:1502.01852) draw them for ReLU.
    """
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def conv_norm(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, scale: float = 1.0
) -> nn.Sequential:
    """A convolution and its batch normalisation, which starts with the factor ``scale``."""
    norm = nn.BatchNorm2d(outputs)
    nn.init.constant_(norm.weight, scale)
    return nn.Sequential(conv(inputs, outputs, size, stride), norm)
