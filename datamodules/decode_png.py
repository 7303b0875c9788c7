"""Decode numbered PNG files to bytes on stdout; a program of its own, to run on every core.

    python decode_png.py FOLDER HEIGHT WIDTH < ids, one a line

Threads would be slower than none (Pillow needs the interpreter half the time), and processes of
multiprocessing would first import the whole training program again. Pillow, because torchvision's
decoder ends the program (SIGSEGV) at some broken files.
"""

import sys
from pathlib import Path

from PIL import Image

BAD_IMAGE = 3  # exit status: stdout tells what is wrong instead of holding pixels
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow clips the others to white


def decode(path: Path, size: tuple[int, int]) -> bytes:
    """Pixels (H, W, 3) uint8; grey, palette and transparency become RGB.

    Raises:
        ValueError: The image is missing, broken, or of another size or depth.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if (image.height, image.width) == size and image.mode in EIGHT_BIT_MODES:
                return image.convert("RGB").tobytes()
            found = f"{image.height} x {image.width} in mode {image.mode}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a whole PNG image ({error})") from error
    raise ValueError(f"{path}: expected {size[0]} x {size[1]} pixels of 8 bits, found {found}")


def main(folder: str, height: str, width: str) -> None:
    size = (int(height), int(width))
    try:
        output = b"".join(decode(Path(folder, f"{int(line)}.png"), size) for line in sys.stdin)
        status = 0
    except ValueError as error:
        output, status = str(error).encode(), BAD_IMAGE
    sys.stdout.buffer.write(output)
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
