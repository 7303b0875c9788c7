"""The mistakes a user can make, told in one sentence."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something only the user can mend: the message says what is wrong and the next move.

    Everything else that is raised is a bug and keeps its traceback.
    """


@contextmanager
def told_in_one_sentence() -> Iterator[None]:
    """End the program with exit status 1 and the sentence of a :class:`UserError` on stderr."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__  # jsonargparse wraps what a class raises
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        raise SystemExit(1) from None
