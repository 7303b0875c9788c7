"""Libraries as they would be if something private in them had another name."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType

import pytest


@contextmanager
def renamed(name: str, *packages: str) -> Iterator[None]:
    """Give a private name another one in the libraries that define and use it, as a release may.

    They work as ever, and whoever leans on the old name finds nothing. What has it as an attribute
    must not outlive the context.
    """
    prefixes = tuple(f"{package}." for package in packages)
    with pytest.MonkeyPatch.context() as patch:
        for thing in gc.get_objects():
            kind = type(thing)
            if kind is not FunctionType and not issubclass(kind, type):
                continue
            if not f"{thing.__module__}.".startswith(prefixes):
                continue
            if kind is FunctionType:
                if (code := rename(thing.__code__, name)) != thing.__code__:
                    patch.setattr(thing, "__code__", code)
            elif name in vars(thing):
                patch.setattr(thing, f"{name}_2", vars(thing)[name], raising=False)
                patch.delattr(thing, name)
        yield


def rename(code: CodeType, name: str) -> CodeType:
    """The same code with other names of attributes, in functions inside of it and strings too."""

    def other(value: object) -> object:
        if isinstance(value, CodeType):
            return rename(value, name)
        return f"{name}_2" if value == name and isinstance(value, str) else value

    names = tuple(f"{name}_2" if n == name else n for n in code.co_names)
    return code.replace(co_names=names, co_consts=tuple(map(other, code.co_consts)))
