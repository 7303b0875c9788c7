"""Images as rows of a table: a column for each pixel, and perhaps a label or an id in front."""

import math
from pathlib import Path

import numpy as np

from core.errors import UserError

Size = tuple[int, int, int]  # (H, W, C)


def is_pixel_table(path: Path, size: Size) -> bool:
    try:
        with path.open() as file:
            return file.readline().count(",") + 1 in (math.prod(size), math.prod(size) + 1)
    except (OSError, UnicodeDecodeError):
        return False


def read_pixel_table(path: Path, size: Size) -> tuple[list[str] | None, np.ndarray]:
    """Values of the column before the pixels, if there is one, and images (N, H, W, C) uint8.

    Raises:
        UserError: It is no whole table of pixels from 0 to 255.
    """
    import pandas as pd  # a quarter of a second, for two competitions

    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole table ({reason}); download it again.") from error
    front = table.shape[1] - math.prod(size)
    pixels = table.iloc[:, front:].to_numpy()
    whole = pixels.size and pixels.dtype.kind in "iu" and pixels.min() >= 0 and pixels.max() <= 255
    if front not in (0, 1) or not whole:
        raise UserError(
            f"{path}: expected {math.prod(size)} pixels from 0 to 255 in each row, for images of "
            f"{' x '.join(map(str, size))}; download it again, or set --data.image_size."
        )
    names = table.iloc[:, 0].astype(str).tolist() if front else None
    return names, pixels.astype(np.uint8).reshape(-1, *size)
