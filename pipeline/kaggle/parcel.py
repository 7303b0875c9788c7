"""The parcel for Kaggle: code, files that arguments name, and the script that unpacks both.

Files of :data:`SUFFIXES` travel that git tracks, or without git those in the packages here: no
data, no runs, and no credentials, unless they stand in the code, which is refused.
"""

import base64
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from core import provenance
from core.errors import UserError
from core.files import sha256
from core.runs import is_file

ROOT = Path(__file__).absolute().parents[2]
HARDWARE = ROOT / "configs" / "hardware" / "kaggle_t4x2.yaml"
SUFFIXES = {".py", ".toml", ".yaml", ".yml", ".txt"}
LEFT_OUT = {"benchmarks", "data", "docs", "runs", "tests"}
SCRIPT = '''\
import base64, io, sys, tarfile, tempfile

place = tempfile.mkdtemp(prefix="steadyfit-")
code = """
{code}"""
with tarfile.open(fileobj=io.BytesIO(base64.b64decode(code)), mode="r:bz2") as archive:
    archive.extractall(place, filter="data")
sys.path.insert(0, place)
from pipeline.kaggle.kernel import main

main({job!r})
'''


def pack(args: list[str], secrets: Collection[str]) -> tuple[list[str], bytes]:
    """Pack code and files that arguments name (tar, bzip2); return them after the arguments there.

    Args:
        args: Those of train.py.
        secrets: Texts that must stay here, beside those of this program's environment.

    Raises:
        UserError: One of them stands in a file.
    """
    files = {path.as_posix(): (ROOT / path).read_bytes() for path in code_files()}
    args = [carry(arg, files) for arg in args]
    secrets = {*secrets, *provenance.secrets()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:bz2") as archive:
        for name, content in sorted(files.items()):
            if any(len(text) >= 8 and text.encode() in content for text in secrets):
                raise UserError(f"{name} holds a key or password of yours; take it out.")
            entry = tarfile.TarInfo(name)  # without times and owners: the same code, the same bytes
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return args, packed.getvalue()


def code_files() -> Iterator[Path]:
    """Yield paths below the root of the repository."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(command, capture_output=True).stdout
    except OSError:
        listed = b""
    paths = [Path(os.fsdecode(name)) for name in listed.split(b"\0") if name]
    if not paths:  # no git, or the repository is somebody else's
        rooms = [ROOT / "configs", *(path.parent for path in ROOT.glob("*/__init__.py"))]
        found = [*ROOT.glob("*.py"), ROOT / "requirements.txt"]
        found += [path for room in rooms for path in room.rglob("*")]
        paths = [path.relative_to(ROOT) for path in found]
    for path in paths:
        travels = path.suffix in SUFFIXES and path.parts[0] not in LEFT_OUT
        if travels and path.parts[0][0] != "." and (ROOT / path).is_file():
            yield path


def carry(arg: str, files: dict[str, bytes]) -> str:
    """Let a file that an argument names travel as well; returns the argument for there."""
    flag, equals, value = arg.partition("=") if arg.startswith("-") else ("", "", arg)
    path = Path(os.path.abspath(value))
    if not is_file(path):
        return arg
    if path.is_relative_to(ROOT):
        name = path.relative_to(ROOT)
    else:  # two may have one name; a config.yaml says by its folders what it was made from
        place = sha256(path)[:8]
        name = Path("given", place, path.parent.parent.name, path.parent.name, path.name)
    files[name.as_posix()] = path.read_bytes()
    return f"{flag}{equals}{name.as_posix()}"


def resolve(args: list[str], code: bytes) -> dict[str, Any]:
    """Return the configuration of the run, as the code that travels reads it, on this machine.

    Raises:
        SystemExit: It refuses the arguments; why is on stderr.
    """
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(fileobj=io.BytesIO(code), mode="r:bz2") as archive:
            archive.extractall(place, filter="data")
        command = [sys.executable, "train.py", *args, "--print_config"]
        done = subprocess.run(command, cwd=place, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    return dict(yaml.safe_load(done.stdout))


def competition_of(data: dict[str, Any]) -> str | None:
    """Return Kaggle's name of the competition whose data a configured data module trains on."""
    if "download" in data["init_args"]:
        return None  # it trains on a public set
    module, _, name = data["class_path"].rpartition(".")
    named = data["init_args"].get("competition")
    return named or getattr(getattr(import_module(module), name), "competition", None)


def script(job: dict[str, Any], code: bytes) -> str:
    """Return the text to push, for :func:`pipeline.kaggle.kernel.main`."""
    return SCRIPT.format(job=job, code=base64.encodebytes(code).decode())
