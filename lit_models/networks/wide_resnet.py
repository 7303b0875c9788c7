"""Wide residual networks. Dimensions: B batch, C channels, H height, W width, K classes."""

from itertools import pairwise

from torch import Tensor, nn

from lit_models.networks.resnet import conv, stage


class WideResNet(nn.Module):
    """A wide residual network, WRN-``depth``-``widen`` (Zagoruyko, Komodakis, arXiv:1605.07146).

    Three stages of residual blocks with normalisation and activation in front of each convolution
    (He et al., arXiv:1603.05027). WRN-28-10 has 36,479,194 parameters for ten classes of colour
    images.

    Args:
        num_classes: Number of classes K.
        depth: Convolutions in a row, 6 n + 4 for n blocks a stage.
        widen: Channels of the stages in units of 16, 32 and 64.
        in_channels: Channels C of the images.

    Raises:
        ValueError: ``depth`` is not 6 n + 4.
    """

    def __init__(
        self, num_classes: int = 10, depth: int = 28, widen: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 10, 16, 22, 28, ..., got {depth}.")
        blocks = (depth - 4) // 6
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.stem = conv(in_channels, widths[0])
        self.stages = nn.Sequential(
            *(
                stage(PreActivationBlock, *pair, stride, blocks)
                for pair, stride in zip(pairwise(widths), (1, 2, 2), strict=True)
            )
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        x = self.stages(self.stem(images))  # (B, widths[-1], H / 4, W / 4)
        return self.head(self.norm(x).relu().mean((2, 3)))


class PreActivationBlock(nn.Module):
    """Normalise, activate, convolve, twice; where the shape changes, so does the shortcut's."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, H, W) -> (B, outputs, H / s, W / s)
        active = self.norm1(x).relu()
        kept = x if self.shortcut is None else self.shortcut(active)
        return kept + self.conv2(self.norm2(self.conv1(active)).relu())
