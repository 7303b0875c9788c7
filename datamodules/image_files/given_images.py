"""Images that somebody has at hand. Dimensions: N images, H height, W width, C channels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.errors import UserError
from datamodules.image_files.decode_images import decode, square


def read_images(given: Any, size: tuple[int, int, int]) -> Tensor:
    """Images of one size as uint8 (N, H, W, C).

    Args:
        given: An array or a tensor of that kind, or paths, Pillow's images, arrays (H, W, C) or (H,
            W) and tensors (C, H, W), of any size.
        size: (H, W, C).

    Raises:
        UserError: There are none, one cannot be read, or it is of another kind.
    """
    if isinstance(given, np.ndarray | Tensor) and given.shape[1:] == size:
        if given.dtype not in (np.uint8, torch.uint8):
            raise UserError(f"images must be uint8 from 0 to 255, got {given.dtype}.")
        return given.cpu() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    if isinstance(given, str | Path | Image.Image):
        raise UserError("predict takes several images at once; put one into a list.")
    pixels = list(_in_size(given, size))
    if not pixels:
        raise UserError("there are no images to predict.")
    return torch.from_numpy(np.stack(pixels))


def _in_size(given: Any, size: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Each image as uint8 (H, W, C)."""
    height, width, channels = size
    for item in given:
        try:
            if isinstance(item, str | Path):
                pixels = decode(Path(item), (height, width))
                image = Image.frombytes("RGB", (width, height), pixels)
            else:
                found = item if isinstance(item, Image.Image) else Image.fromarray(_as_array(item))
                image = square(found, (height, width))
        except (TypeError, ValueError) as error:
            name = item if isinstance(item, str | Path) else f"a {type(item).__name__}"
            raise UserError(f"{name} is no image that can be read: {error}") from error
        yield np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(size)


def _as_array(item: Any) -> np.ndarray:
    """An array as Pillow takes it, of a tensor (C, H, W) as well: grey without an axis for it."""
    if isinstance(item, Tensor):
        if item.is_floating_point():
            if not 0 <= item.min() <= item.max() <= 1:
                raise ValueError("its values are not from 0 to 1; leave out what normalizes them")
            item = (item * 255).round().byte()
        item = item.permute(1, 2, 0) if item.ndim == 3 and item.shape[0] in (1, 3) else item
    array = np.asarray(item)
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
