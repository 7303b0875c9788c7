"""The mistakes a user can make."""

from importlib import import_module
from typing import Any


class UserError(ValueError):
    """Something only the user can mend: the message says what is wrong and the next move.

    Networks, optimizers and the spike library know no class of this project and raise a plain
    ValueError; so does torch. `core/telling.py` says when that is told in one sentence as well.
    """


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
