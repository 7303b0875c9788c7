"""A fixed first layer that decorrelates the pixels of a patch.

Dimensions: B batch, C channels, H height, W width, P patches, K kernel size.
"""

import torch
from torch import Tensor, nn


class Whitening(nn.Conv2d):
    """A convolution whose filters are the principal components of patches, scaled to unit variance.

    Page, "How to train your ResNet 8: Bag of tricks". With ``mirrored`` the negatives of all
    filters come after them, so that nothing is lost that an activation cuts off (hlb-CIFAR10). The
    filters come from images, by :meth:`init_from_data`, and are not trained; a bias is.

    Args:
        in_channels: Channels C of the images.
        size: Height and width of a patch.
        mirrored: Also have the negative filters: 2 * C * K * K outputs instead of C * K * K.
        bias: Add a trained bias, zero at first.
    """

    def __init__(
        self, in_channels: int, size: int, *, mirrored: bool = True, bias: bool = True
    ) -> None:
        directions = in_channels * size**2
        super().__init__(in_channels, directions * (1 + mirrored), size, bias=bias)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.mirrored = mirrored

    @torch.no_grad()
    def init_from_data(self, images: Tensor) -> None:
        """Set the filters so that their outputs over ``images`` (B, C, H, W) are decorrelated.

        Args:
            images: Normalised training images without augmentation; a few thousand are enough.
        """
        patches = nn.functional.unfold(images, self.kernel_size)  # (B, C * K * K, P)
        patches = patches.transpose(1, 2).reshape(-1, patches.shape[1]).double()
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        # the constant keeps flat directions from being blown up
        filters = (directions / (variances + 5e-4).sqrt()).T.flip(0)  # strongest direction first
        # an eigenvector's sign is arbitrary: fix it, so that every machine gets the same filters
        filters *= filters.gather(1, filters.abs().argmax(1, keepdim=True)).sign()
        filters = filters.reshape(-1, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]) if self.mirrored else filters)
