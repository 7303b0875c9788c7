"""Text files read, files written whole or not at all, and digests of what was written."""

import errno
import glob
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".tmp"  # of what is not whole yet


@contextmanager
def atomic_write(path: Path, mode: str = "wb", **open_kwargs: Any) -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that takes its place when the block ends well.

    A crash leaves the old file or the new one, never a part.

    Raises:
        UserError: The folder cannot be written or the disk is full; ``path`` is as it was.
    """
    try:
        with temporary(path) as name:
            os.chmod(name, 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the group
            with open(name, mode, **open_kwargs) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}); "
            "free space or choose another folder. What was there before is unchanged."
        ) from error


@contextmanager
def temporary(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside ``path``, for what is going to take its place.

    Its writer holds a lock on it. What has none was left by writers that were killed, and goes when
    the same ``path`` is written again. Where there are no locks (Windows, some NFS) it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????{SUFFIX}"):
        with suppress(OSError), _locked(left):
            _remove(left)
    with ExitStack() as held:
        while not (name := _create(path, folder, held)).exists():
            pass  # another writer has just taken it for an old one
        try:
            yield name
        finally:
            _remove(name)


def _create(path: Path, folder: bool, held: ExitStack) -> Path:
    place = SUFFIX, f".{path.name}.", path.parent
    if folder:
        name = tempfile.mkdtemp(*place)
    else:
        handle, name = tempfile.mkstemp(*place)
        os.close(handle)
    with suppress(OSError):
        held.enter_context(_locked(Path(name), wait=True))
    return Path(name)


@contextmanager
def _locked(name: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a temporary file or folder.

    Raises:
        OSError: Another process holds it, or there are no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    handle = os.open(name, os.O_RDONLY if name.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove(name: Path) -> None:
    if name.is_dir():
        shutil.rmtree(name)
    else:
        name.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder where there is none, and those above it.

    Raises:
        UserError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        place = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        why = f"cannot be written to ({error.strerror})"
        if not place.is_dir():
            why = f"is a link to {place.readlink()}" if place.is_symlink() else "is a file"
            why += ", where a folder should be"
        raise UserError(
            f"the folder {path} cannot be made: {place} {why}; mend that, or run the command in "
            "another folder."
        ) from None


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
