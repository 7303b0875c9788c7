"""Pickles of arrays, read without letting them run code."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError


def _number_dtype(name: str, *_flags: object) -> np.dtype:
    """A type of plain numbers; numpy warns of the flags that old pickles pass."""
    dtype = np.dtype(name, copy=True)  # a copy, because the pickle goes on to set its state
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"an array of {name!r} instead of numbers")
    return dtype


_reconstruct: Any = np.zeros(0).__reduce__()[0]  # numpy moves this private function

_ADMITTED: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": _reconstruct,  # numpy 1, and so the official CIFAR-10
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": _number_dtype,
    "_codecs.encode": str.encode,  # how Python 3 writes bytes for Python 2; text codecs only
}


class ArrayUnpickler(pickle.Unpickler):
    """Builds arrays of numbers and built-in containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        admitted = _ADMITTED.get(f"{module}.{name}")
        if admitted is None:
            raise pickle.UnpicklingError(f"a call of {module}.{name}, which could run any code")
        return admitted


def load_arrays(path: Path) -> Any:
    """Read a pickle of arrays and built-in containers, written by Python 2 or 3.

    Raises:
        UserError: The file is missing, broken, or asks for anything else to be built.
    """
    try:
        with path.open("rb") as file:
            return ArrayUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except Exception as error:  # a broken pickle can fail in any way
        raise UserError(
            f"{path}: expected a pickle of arrays and built-in containers, "
            f"found {error} ({path.stat().st_size:,} bytes in all); fetch the file again."
        ) from error
