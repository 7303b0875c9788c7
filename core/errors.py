"""The mistakes a user can make, told in one sentence."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class UserError(ValueError):
    """Something only the user can mend: the message says what is wrong and the next move.

    Lightning's MisconfigurationException is another. Networks, optimizers and the spike library
    know neither and raise a plain ValueError; so does torch. See :class:`Telling`.
    """


@dataclass
class Telling:
    """Which errors are told in one sentence; all others are bugs and keep their traceback.

    Attributes:
        values: Any ValueError is the user's. So it is while arguments are read and classes are
            built; from the first batch on it is more likely ours.
    """

    values: bool = False

    def is_mistake(self, error: BaseException) -> bool:
        # by name, because Lightning takes seconds to import, and submit.py does without it
        names = {cls.__name__ for cls in type(error).__mro__}
        return not names.isdisjoint({"UserError", "MisconfigurationException"})

    def mistake_behind(self, error: BaseException) -> BaseException | None:
        """The user's mistake among an error and its causes: jsonargparse wraps what is raised."""
        cause: BaseException | None = error
        while cause is not None and not self.is_mistake(cause):
            cause = cause.__cause__ or cause.__context__
        return error if cause is None and self.values and isinstance(error, ValueError) else cause


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


@contextmanager
def constructing(name: str) -> Iterator[None]:
    """A TypeError of a constructor is an argument that it does not take, or one that it lacks."""
    try:
        yield
    except TypeError as error:
        raise UserError(f"{name} cannot be made: {error}") from error
