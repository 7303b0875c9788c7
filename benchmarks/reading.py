"""Count what a reader of a config has to hold:  python -m benchmarks.reading mnist_lenet

The files of this project that the config's classes come from, and all that these import, inside
functions too; packages' ``__init__`` files, which list names alone, are left out.
"""

import argparse
import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def class_paths(config: Any) -> Iterator[str]:
    """All classes that a configuration names."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "class_path" or (key == "optimizer" and isinstance(value, str)):
                yield value
            yield from class_paths(value)
    elif isinstance(config, list):
        for value in config:
            yield from class_paths(value)


def module_of(path: str) -> ModuleType | None:
    """The module that holds a class; short names are those of the two packages that have them."""
    package, _, name = path.rpartition(".")
    for place in [package] if package else ["lit_models", "datamodules"]:
        found = getattr(importlib.import_module(place), name, None)
        if found is not None:
            return sys.modules[found.__module__]
    return None


def imports(module: ModuleType) -> Iterator[ModuleType]:
    """The modules that a file imports, wherever in it; a name counts as the module it is from."""
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        if isinstance(node, ast.Import):
            yield from (importlib.import_module(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            source = importlib.import_module(name, module.__package__)
            for alias in node.names:
                found = getattr(source, alias.name, None)
                if isinstance(found, ModuleType):
                    yield found
                elif hasattr(source, "__path__") and getattr(found, "__module__", None):
                    yield sys.modules[found.__module__]
                else:
                    yield source


def is_ours(module: ModuleType) -> bool:
    file = Path(getattr(module, "__file__", None) or "/").resolve()
    inside = file.is_relative_to(ROOT) and "site-packages" not in file.parts
    return inside and file.name != "__init__.py"


def files_behind(config: Path) -> dict[Path, int]:
    """Lines of each file behind a config."""
    paths = class_paths(yaml.safe_load(config.read_text()))
    waiting = [module for module in map(module_of, paths) if module is not None]
    found: dict[Path, int] = {}
    while waiting:
        module = waiting.pop()
        path = Path(getattr(module, "__file__", None) or "/").resolve()
        if is_ours(module) and path not in found:
            found[path] = len(path.read_text().splitlines())
            waiting += imports(module)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="name or path of a config")
    parser.add_argument("--files", action="store_true", help="list the files as well")
    options = parser.parse_args()
    for name in options.configs:
        path = Path(name) if name.endswith(".yaml") else ROOT / "configs" / f"{name}.yaml"
        found = files_behind(path)
        print(f"{path.stem}: {len(found)} files, {sum(found.values()):,} lines")
        for file, lines in sorted(found.items()) if options.files else []:
            print(f"  {lines:5,}  {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
