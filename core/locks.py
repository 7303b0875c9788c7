"""One program at a time."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from core.errors import UserError
from core.files import make_folder


@contextmanager
def locked(path: Path, what: Path, busy: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file; a program that dies lets go by itself.

    Where the file system has no locks (some NFS and Lustre) it goes on without, after a warning.

    Args:
        path: The lock file, which stays.
        what: The file or folder that it guards.
        busy: The sentence that says what another program does to it.
        wait: Seconds until another program's lock is an error.

    Raises:
        UserError: Another program holds the lock, or its folder cannot be made.
    """
    lock = FileLock(path, fallback_to_soft=False)
    make_folder(path.parent)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise UserError(busy) from None
    except OSError as error:
        warnings.warn(
            f"{what} cannot be locked ({error}); do not use it from two programs at once.",
            stacklevel=3,
        )
    try:
        yield
    finally:
        lock.release()
