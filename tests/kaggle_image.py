"""An environment that lacks what Kaggle's image lacks, and wheels of that.

``KAGGLE_IMAGE`` and ``KAGGLE_WHEELS`` name folders of real ones, which ``make kaggle-image`` makes.
"""

import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

LACKING = (
    *("lightning", "jsonargparse", "docstring-parser", "typeshed-client"),
    *("py7zr", "texttable", "multivolumefile", "inflate64", "pyppmd", "pybcj", "lemminflect"),
)
# no network, and what is mounted is read-only, for the superuser as well
SITE = """
import os, socket
writable, resolve = os.access, socket.getaddrinfo
def access(path, mode, **options):
    mounted = "/input" in os.path.abspath(path) and mode == os.W_OK
    return not mounted and writable(path, mode, **options)
def getaddrinfo(host, *args, **options):
    if host not in ("localhost", "127.0.0.1"):
        raise OSError(f"no network: {host}")
    return resolve(host, *args, **options)
os.access, socket.getaddrinfo = access, getaddrinfo
"""


def make_image(place: Path) -> Path:
    """A virtual environment of links to what the image has; returns its interpreter."""
    image = os.environ.get("KAGGLE_IMAGE")
    python = str(Path(image, "bin/python").absolute()) if image else sys.executable
    source = Path(purelib(python))
    lacking = set() if image else {part for name in LACKING for part in parts_of(name)}
    subprocess.run([python, "-m", "venv", "--without-pip", place], check=True)
    site = Path(purelib(str(place / "bin/python")))
    for path in source.iterdir():
        if path.name not in lacking | {"__pycache__", "sitecustomize.py"}:
            (site / path.name).symlink_to(path)
    (site / "sitecustomize.py").write_text(SITE)
    return place / "bin/python"


def purelib(python: str) -> str:
    if python == sys.executable:
        return sysconfig.get_paths()["purelib"]
    command = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def parts_of(name: str) -> set[str]:
    """Files and folders of a package, at the top."""
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        return set()
    return {path.parts[0] for path in files} - {"..", "__pycache__"}


def make_wheels(folder: Path) -> None:
    """What the image lacks, as wheels of what is installed here."""
    folder.mkdir(parents=True)
    if given := os.environ.get("KAGGLE_WHEELS"):
        for path in Path(given).glob("*.whl"):
            (folder / path.name).symlink_to(path.absolute())
        return
    for name in LACKING:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        lines = (package.read_text("WHEEL") or "").splitlines()
        tags = zip(*(line[5:].split("-") for line in lines if line[:5] == "Tag: "), strict=True)
        tag = "-".join(".".join(sorted(set(part))) for part in tags)
        stem = f"{package.name.replace('-', '_').replace('.', '_')}-{package.version}"
        with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w") as wheel:
            for file in package.files or []:
                if file.parts[0] != ".." and "__pycache__" not in file.parts:
                    wheel.write(str(file.locate()), str(file))
