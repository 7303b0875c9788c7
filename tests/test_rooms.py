"""The contracts between the rooms; those of import-linter are in `pyproject.toml`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"train", "predict", "submit", "study", "spikes"}
ROOMS = ("core", "pipeline", "callbacks", "lit_models", "datamodules", "metrics", "steadyfit")


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_the_contracts_of_import_linter_are_kept() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_command_is_imported() -> None:
    rooms = [path for room in (*ROOMS, "benchmarks") for path in ROOT.glob(f"{room}/**/*.py")]
    found = {
        f"{path.name}: {name}"
        for path in [*ROOT.glob("*.py"), *rooms]
        for name in imported(path)
        if name in COMMANDS
    }
    assert found == set()


@pytest.mark.parametrize(
    ("room", "allowed"),
    [("lit_models/networks", {"torch", "lit_models.networks"}), ("steadyfit", {"torch", "numpy"})],
)
def test_these_need_torch_and_the_standard_library_alone(room: str, allowed: set[str]) -> None:
    named = {"lightning", "pytorch_lightning", "panels", "pictures"}  # after what they import
    for path in (ROOT / room).glob("*.py"):
        for name in imported(path):
            root = name.partition(".")[0]
            known = name.startswith(".") or root in sys.stdlib_module_names
            known = known or root in allowed or any(name.startswith(own) for own in allowed)
            types_alone = root == "pandas" and "if TYPE_CHECKING" in path.read_text()
            assert known or types_alone or path.stem in named, f"{path.name} imports {name}"


def test_files_fit_into_a_head_and_folders_onto_a_page() -> None:
    for room in ROOMS:
        for path in ROOT.glob(f"{room}/**/*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
    folders = {path.parent for room in ROOMS for path in ROOT.glob(f"{room}/**/*.py")}
    crowded = {folder for folder in folders if len(list(folder.glob("[!_]*.py"))) > 13}
    assert crowded == {ROOT / "lit_models" / "networks"}
