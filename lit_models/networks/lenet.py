"""LeNet-type networks. Dimensions: B batch, C channels, K classes."""

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet5(nn.Module):
    """Two convolutions and three linear layers, with ReLU and max-pooling.

    The layer sizes of LeNet-5 (LeCun et al., "Gradient-based learning applied to document
    recognition", 1998, section II.B) with today's activation and pooling: 62,006 parameters for
    3 x 32 x 32 images, 61,706 for 1 x 28 x 28 images with ``padding=2``.

    Args:
        num_classes: Number of classes K.
        in_channels: Channels C of the images.
        padding: Zeros around the image before the first convolution; the padded side must be 32.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, padding: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=padding)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, 32, 32) -> (B, K)
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)  # (B, 6, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 5, 5)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))
