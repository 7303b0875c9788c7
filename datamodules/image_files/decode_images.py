"""Decode image files to bytes on stdout; a program of its own, to run on every core.

    python decode_images.py HEIGHT WIDTH FOLDER < names, each ended by a zero byte

The pixels of all files come first, zeros where one cannot be read, then JSON: why, by position.

Threads would be slower than none (Pillow needs the interpreter half the time), and processes of
multiprocessing would first import the whole training program again. Pillow, because torchvision's
decoder ends the program (SIGSEGV) at some broken files.
"""

import json
import os
import sys
import warnings
from pathlib import Path

from PIL import Image, ImageOps

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # of their files
_MOST_PIXELS = 64_000_000  # that are decoded, each in up to three copies of four bytes


def decode(path: Path, size: tuple[int, int]) -> bytes:
    """Pixels (H, W, 3) uint8 of a photo of any size: its centre, upright, without its transparency.

    The largest part of the size's proportions is cut from the middle and scaled, so nothing is
    squashed. Scaling averages all pixels (antialiasing). Of an animation the first picture is read.

    Raises:
        ValueError: The file is missing, broken, of another format, or would fill the memory.
    """
    height, width = size
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.draft("RGB", (2 * width, 2 * height))  # a JPEG can be decoded at half, a quarter
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            image.load()  # here, since the reading of EXIF data passes over what is broken
            return square(image, size).tobytes()
    except Exception as error:
        raise ValueError(reason(error)) from error


def square(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of an image in RGB, upright, scaled to height and width."""
    height, width = size
    return ImageOps.fit(_opaque(upright(image)), (width, height))


def upright(image: Image.Image) -> Image.Image:
    """The image as its camera was held (EXIF); one whose EXIF data are damaged stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever damaged EXIF data raise; if the pixels are, reading them says so
        return image


def _opaque(image: Image.Image) -> Image.Image:
    """RGB of any mode, on white where it is transparent, as a browser shows it."""
    if image.mode.startswith("I"):  # 16 bits
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def reason(error: Exception) -> str:
    """The fault of a photo, without its path."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image"
    return getattr(error, "strerror", None) or str(error)


def main(height: str, width: str, folder: str) -> None:
    warnings.simplefilter("ignore")  # of large photos; too large ones raise an error
    size = (int(height), int(width))
    reasons = {}
    for position, name in enumerate(sys.stdin.buffer.read().split(b"\0")[:-1]):
        try:
            pixels = decode(Path(folder, os.fsdecode(name)), size)
        except ValueError as error:
            pixels, reasons[position] = bytes(3 * size[0] * size[1]), str(error)
        sys.stdout.buffer.write(pixels)
    sys.stdout.buffer.write(json.dumps(reasons).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
