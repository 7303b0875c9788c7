"""Convolutions above each other. Dimensions: B batch, C channels, H height and width, K classes."""

import math

from torch import Tensor, nn

from lit_models.networks.unrolled import State


class ConvStack(nn.Module):
    """L equal layers x[l+1] = relu(conv(x[l])), or x[l+1] = x[l] + relu(conv(x[l])) / sqrt(L).

    With the addition it is the residual network of He et al. ("Deep residual learning for image
    recognition", arXiv:1512.03385, equation 1) in its simplest form: the identity is a path along
    which the gradient passes every layer unchanged. Without the factor, or the batch normalisation
    that theirs has, states and gradients would grow from layer to layer instead of shrinking
    (Hayou et al., "Stable ResNet", arXiv:2010.12859). The layers work on patches of 4 x 4 pixels,
    and a linear layer reads the means of the channels.

    Args:
        depth: Number of layers L, that of the patches not counted.
        residual: Whether a layer adds its input.
        width: Channels C of every layer.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
    """

    def __init__(
        self,
        depth: int,
        residual: bool = False,
        width: int = 16,
        num_classes: int = 10,
        in_channels: int = 1,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}.")
        super().__init__()
        self.residual = residual
        self.patches = nn.Conv2d(in_channels, width, 4, stride=4)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.state = State()  # through which x[0] to x[depth] pass
        self.output = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.state(self.patches(images).relu())  # (B, C, H / 4, H / 4)
        for conv in self.layers:
            y = conv(x).relu()
            x = self.state(x + y / math.sqrt(len(self.layers)) if self.residual else y)
        return self.output(x.mean((2, 3)))
