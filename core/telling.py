"""Which errors are told in one sentence, and how."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Telling:
    """Which errors are told in one sentence; all others are bugs and keep their traceback.

    Attributes:
        values: Any ValueError is the user's, and a TypeError of a constructor. So it is while
            arguments are read and classes are built; from the first batch on both are ours.
    """

    values: bool = False

    def is_mistake(self, error: BaseException) -> bool:
        # by name, because Lightning takes seconds to import, and submit.py does without it
        names = {cls.__name__ for cls in type(error).__mro__}
        return not names.isdisjoint({"UserError", "MisconfigurationException"})

    def mistake_behind(self, error: BaseException) -> BaseException | None:
        """The user's mistake among an error and its causes: jsonargparse wraps what is raised."""
        cause: BaseException | None = error
        seen: set[BaseException] = set()  # a chain may close on itself
        while cause is not None and not self.is_mistake(cause):
            seen.add(cause)
            cause = cause.__cause__ or cause.__context__
            cause = None if cause in seen else cause
        if cause is None and self.values:
            return error if isinstance(error, ValueError) or of_constructor(error) else None
        return cause


def of_constructor(error: BaseException) -> bool:
    """Whether it is a TypeError that a constructor raised, or the call of one."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    inside = traceback is not None and traceback.tb_frame.f_code.co_name == "__init__"
    return isinstance(error, TypeError) and (inside or "__init__()" in str(error))


def visible(text: str) -> str:
    """A stranger's text, with its control characters shown: a terminal would obey them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def told_in_one_sentence(debug: bool = False) -> Iterator[Telling]:
    """End the program with exit status 1 and the sentence of a user's mistake on stderr.

    Args:
        debug: Let the traceback through instead.
    """
    telling = Telling()
    try:
        yield telling
    except Exception as error:
        if debug or (mistake := telling.mistake_behind(error)) is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(1) from None
