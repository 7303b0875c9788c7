"""Decode image files to bytes on stdout; a program of its own, to run on every core.

    python decode_images.py exact|fit HEIGHT WIDTH FOLDER < names, each ended by a zero byte

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

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow clips the others to white
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # of their files
MOST_PIXELS = 64_000_000  # that are decoded, each in up to three copies of four bytes


def decode(path: Path, size: tuple[int, int]) -> bytes:
    """Pixels (H, W, 3) uint8 of an image of that size; grey, palette and transparency become RGB.

    Raises:
        ValueError: The image is missing, broken, or of another size or depth.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if (image.height, image.width) == size and image.mode in EIGHT_BIT_MODES:
                return image.convert("RGB").tobytes()
            found = f"{image.height} x {image.width} in mode {image.mode}"
    except Exception as error:  # Pillow raises many kinds at files that are not whole
        raise ValueError(f"{path} is not a whole image ({error})") from error
    raise ValueError(f"{path}: expected {size[0]} x {size[1]} pixels of 8 bits, found {found}")


def decode_photo(path: Path, size: tuple[int, int]) -> bytes:
    """Pixels (H, W, 3) uint8 of a photo of any size: its centre, upright, without its transparency.

    The largest part of the size's proportions is cut from the middle and scaled, so nothing is
    squashed. Scaling averages all pixels (antialiasing). Of an animation the first picture is read.

    Raises:
        ValueError: The file is missing, broken, of another format, or would fill the memory.
    """
    height, width = size
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft("RGB", (2 * width, 2 * height))  # a JPEG can be decoded at half, a quarter
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            return square(image, size).tobytes()
    except Exception as error:
        raise ValueError(reason(error)) from error


def square(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of an image in RGB, upright, scaled to height and width."""
    height, width = size
    return ImageOps.fit(opaque(upright(image)), (width, height))


def upright(image: Image.Image) -> Image.Image:
    """The image as its camera was held (EXIF); one whose EXIF data are damaged stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever damaged EXIF data raise; if the pixels are, reading them says so
        return image


def opaque(image: Image.Image) -> Image.Image:
    """RGB of any mode, on white where it is transparent, as a browser shows it."""
    if image.mode.startswith("I"):  # 16 bits
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def reason(error: Exception) -> str:
    """What is wrong with a photo, without its path."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    return getattr(error, "strerror", None) or str(error)


def main(how: str, height: str, width: str, folder: str) -> None:
    warnings.simplefilter("ignore")  # of large photos; too large ones raise an error
    size = (int(height), int(width))
    reader = {"exact": decode, "fit": decode_photo}[how]
    reasons = {}
    for position, name in enumerate(sys.stdin.buffer.read().split(b"\0")[:-1]):
        try:
            pixels = reader(Path(folder, os.fsdecode(name)), size)
        except ValueError as error:
            pixels, reasons[position] = bytes(3 * size[0] * size[1]), str(error)
        sys.stdout.buffer.write(pixels)
    sys.stdout.buffer.write(json.dumps(reasons).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
