"""The mistakes a user can make."""


class UserError(ValueError):
    """Something only the user can mend: the message says what is wrong and the next move.

    Networks, optimizers and the spike library know no class of this project and raise a plain
    ValueError; so does torch. `core/telling.py` says when that is told in one sentence as well.
    """
