"""Text files read, files written whole or not at all, and digests of what was written."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from core.errors import UserError


@contextmanager
def atomic_write(path: Path, mode: str = "wb", **open_kwargs: Any) -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that takes its place when the block ends well.

    A crash leaves the old file or the new one, never a part.

    Raises:
        UserError: The folder cannot be written or the disk is full; ``path`` is as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the group
        with os.fdopen(handle, mode, **open_kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(
                f"{path} could not be written ({error.strerror or error}); "
                "free space or choose another folder. What was there before is unchanged."
            ) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(name: str) -> list[str]:
    """The lines of a text file, or of standard input for ``-``.

    Raises:
        UserError: It cannot be read, or is not UTF-8.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        place = "standard input" if name == "-" else name
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{place}, line {number}: not UTF-8; convert the text first.") from None
    lines = text.split("\n")  # splitlines() would also split at form feeds and the like
    return lines[:-1] if lines[-1] == "" else lines
