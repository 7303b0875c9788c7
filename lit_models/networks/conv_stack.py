"""Convolutions above each other. Dimensions: B batch, C channels, H height and width, K classes."""

import math
from typing import get_args

from torch import Tensor, nn

from lit_models.networks._checks import check_choice
from lit_models.networks.lenet import Init
from lit_models.networks.unrolled import State


class ConvStack(nn.Module):
    """L equal layers x[l+1] = relu(conv(x[l])), or x[l+1] = x[l] + relu(conv(x[l])) / sqrt(L).

    With the addition it is the residual network of He et al. ("Deep residual learning for image
    recognition", arXiv:1512.03385, equation 1) in its simplest form: the identity is a path along
    which the gradient passes every layer unchanged. Without the factor, or the batch normalisation
    that theirs has, states and gradients would grow from layer to layer instead of shrinking
    (Hayou et al., "Stable ResNet", arXiv:2010.12859). The layers work on patches of 4 x 4 pixels,
    and a linear layer reads the means of the channels.

    Two cures of the plain stack can be tried alone: He's initialisation keeps the gradient, batch
    normalisation makes it grow, in a wide dense network sqrt(pi / (pi - 1)) = 1.21 times a layer
    (Yang et al., arXiv:1902.08129).

    Args:
        depth: Number of layers L, that of the patches not counted.
        residual: Let each layer add its input.
        width: Channels C of every layer.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        batch_norm: Normalise over the batch between each convolution and its ReLU.
        init: ``torch`` or ``kaiming`` (He et al., arXiv:1502.01852), as for :class:`LeNet5`.
    """

    def __init__(
        self,
        depth: int,
        residual: bool = False,
        width: int = 16,
        num_classes: int = 10,
        in_channels: int = 1,
        batch_norm: bool = False,
        init: Init = "torch",
    ) -> None:
        check_choice("init", init, get_args(Init))
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}.")
        super().__init__()
        self.residual = residual
        self.patches = nn.Conv2d(in_channels, width, 4, stride=4)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.norms = nn.ModuleList(norm(width) for _ in range(depth + 1))  # the patches' is first
        if init == "kaiming":
            for conv in (self.patches, *self.layers):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)
        self.state = State()  # through which x[0] to x[depth] pass
        self.output = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        first, *norms = self.norms
        x = self.state(first(self.patches(images)).relu())  # (B, C, H / 4, H / 4)
        for conv, norm in zip(self.layers, norms, strict=True):
            y = norm(conv(x)).relu()
            x = self.state(x + y / math.sqrt(len(self.layers)) if self.residual else y)
        return self.output(x.mean((2, 3)))
