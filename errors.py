"""The mistakes a user can make, told in one sentence."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something only the user can mend: the message says what is wrong and the next move.

    Lightning's MisconfigurationException is another; all else that is raised is a bug and keeps its
    traceback.
    """


@contextmanager
def told_in_one_sentence() -> Iterator[None]:
    """End the program with exit status 1 and the sentence of a user's mistake on stderr."""
    try:
        yield
    except Exception as error:
        if (mistake := mistake_behind(error)) is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(1) from None


def mistake_behind(error: BaseException) -> BaseException | None:
    """The user's mistake among an error and its causes: jsonargparse wraps what a class raises."""
    cause: BaseException | None = error
    while cause is not None and not is_mistake(cause):
        cause = cause.__cause__ or cause.__context__
    return cause


def is_mistake(error: BaseException) -> bool:
    # by name, because Lightning takes seconds to import, and submit.py does without it
    names = {cls.__name__ for cls in type(error).__mro__}
    return not names.isdisjoint({"UserError", "MisconfigurationException"})
