"""LeNet-type networks. Dimensions: B batch, C channels, H height and width, K classes."""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.networks._checks import check_choice

Pooling = Literal["max", "average", "none"]
Init = Literal["torch", "kaiming"]

PADDED_SIZE = 32  # pixels of a side, padding included


class LeNet5(nn.Module):
    """Two convolutions and three linear layers, with ReLU and max-pooling.

    The layer sizes of LeNet-5 (LeCun et al., "Gradient-based learning applied to document
    recognition", 1998, section II.B) with today's activation and pooling: 62,006 parameters for
    3 x 32 x 32 images, 61,706 for 1 x 28 x 28 images with ``padding=2``.

    Args:
        num_classes: Number of classes K.
        in_channels: Channels C of the images.
        padding: Zeros around the square images, whose side is then 32 pixels.
        channels: Filters of the first and of the second convolution.
        kernel_size: Side of the filters of both convolutions.
        stride: Step of both convolutions. It comes on top of pooling: 2 with ``pooling="none"``
            leaves as many pixels as 1 with pooling.
        pooling: Reduction of 2 x 2 pixels to one after each convolution; none leaves all of them.
        dropout: Share of the outputs of both hidden linear layers that is set to zero in training.
        batch_norm: Normalise over the batch between each hidden layer, the convolutions included,
            and its activation (Ioffe and Szegedy, arXiv:1502.03167).
        init: ``torch`` draws weights and biases from U(-1, 1) / sqrt(fan_in). ``kaiming`` draws
            weights from N(0, 2 / fan_in), which keeps the signal's size through ReLUs (He et al.,
            arXiv:1502.01852), the last layer's from N(0, 1 / fan_in); biases start at zero.

    Raises:
        ValueError: If an argument is out of range, no pixel is left for the linear layers, or an
            image has another size.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        padding: int = 0,
        channels: tuple[int, int] = (6, 16),
        kernel_size: int = 5,
        stride: int = 1,
        pooling: Pooling = "max",
        dropout: float = 0.0,
        batch_norm: bool = False,
        init: Init = "torch",
    ) -> None:
        super().__init__()
        for name, value in (("kernel_size", kernel_size), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        check_choice("pooling", pooling, get_args(Pooling))
        check_choice("init", init, get_args(Init))
        self.image_size = PADDED_SIZE - 2 * padding
        size = PADDED_SIZE
        for _ in channels:
            size = (size - kernel_size) // stride + 1
            size = size if pooling == "none" else size // 2
        if size < 1:
            raise ValueError(
                f"no pixel of {PADDED_SIZE} x {PADDED_SIZE} is left after the convolutions with "
                f"kernel_size {kernel_size}, stride {stride} and pooling {pooling}; lower "
                "kernel_size or stride."
            )

        first, second = channels
        self.conv1 = nn.Conv2d(in_channels, first, kernel_size, stride, padding)
        self.conv2 = nn.Conv2d(first, second, kernel_size, stride)
        self.fc1 = nn.Linear(second * size**2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

        self.norm1 = nn.BatchNorm2d(first) if batch_norm else nn.Identity()
        self.norm2 = nn.BatchNorm2d(second) if batch_norm else nn.Identity()
        self.norm3 = nn.BatchNorm1d(120) if batch_norm else nn.Identity()
        self.norm4 = nn.BatchNorm1d(84) if batch_norm else nn.Identity()
        pools = {"max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2), "none": nn.Identity()}
        self.pool = pools[pooling]
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

        if init == "kaiming":
            for name, parameter in self.named_parameters():
                if parameter.ndim > 1:
                    last = parameter is self.fc3.weight
                    nn.init.kaiming_normal_(parameter, nonlinearity="linear" if last else "relu")
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, H) -> (B, K)
        height, width = images.shape[2:]
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"this LeNet5 takes images of {self.image_size} x {self.image_size} pixels, got "
                f"{height} x {width}; choose padding so that both sides are {PADDED_SIZE} with it, "
                "or a ResNet, which takes any size."
            )
        x = self.activate(self.norm1(self.conv1(images)))  # (B, 6, 14, 14)
        x = self.activate(self.norm2(self.conv2(x)))  # (B, 16, 5, 5)
        x = self.dropout(F.relu(self.norm3(self.fc1(x.flatten(1)))))
        x = self.dropout(F.relu(self.norm4(self.fc2(x))))
        return self.fc3(x)

    def activate(self, x: Tensor) -> Tensor:
        """ReLU and pooling; a maximum is the same before ReLU, which then has a quarter to do."""
        if isinstance(self.pool, nn.MaxPool2d):
            return F.relu(self.pool(x))
        return self.pool(F.relu(x))
