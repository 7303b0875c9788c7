"""The mistakes a user can make, and the one sentence that reports each."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any


class UserError(ValueError):
    """Something only the user can mend: the message says what is wrong and the next move.

    Networks, optimizers and the spike library know no class of this project and raise a plain
    ValueError; so does torch. :class:`ErrorScope` says when that is the user's mistake as well.
    """


@dataclass
class ErrorScope:
    """Decide which errors are a user's mistake; all others are bugs and keep their traceback.

    Attributes:
        setting_up: Arguments are read and classes are built: any ValueError, and a TypeError of a
            constructor, is the user's.
    """

    setting_up: bool = False

    def user_error(self, error: BaseException) -> BaseException | None:
        """Return the user's mistake among an error and its causes: jsonargparse wraps errors."""
        cause: BaseException | None = error
        seen: list[BaseException] = []  # a chain may close on itself
        while cause is not None and cause not in seen:
            if _is_user_error(cause):
                return cause
            seen.append(cause)
            cause = cause.__cause__ or cause.__context__
        if self.setting_up and (isinstance(error, ValueError) or is_constructor_error(error)):
            return error
        return None


def _is_user_error(error: BaseException) -> bool:
    # by name, because Lightning takes seconds to import, and submit.py does without it
    names = {cls.__name__ for cls in type(error).__mro__}
    return not names.isdisjoint({"UserError", "MisconfigurationException"})


def is_constructor_error(error: BaseException) -> bool:
    """Return true for a TypeError that a constructor raised, or the call of one."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    inside = traceback is not None and traceback.tb_frame.f_code.co_name == "__init__"
    return isinstance(error, TypeError) and (inside or "__init__()" in str(error))


@contextmanager
def exit_on_user_error(debug: bool = False) -> Iterator[ErrorScope]:
    """End the program with exit status 1 and the sentence of a user's mistake on stderr.

    Args:
        debug: Let the traceback through instead.
    """
    scope = ErrorScope()
    try:
        yield scope
    except Exception as error:
        if debug or (mistake := scope.user_error(error)) is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(1) from None


def visible(text: str) -> str:
    """Show the control characters of a stranger's text, which a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def needed(module: str, feature: str) -> Any:
    """Import a module that one feature alone needs.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{feature} needs {package}, which is missing: pip install {package}"
        ) from error
