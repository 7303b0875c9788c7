"""What a result came from."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """What a result came from: the commit of this project and the versions of its libraries."""
    here = Path(__file__).parents[1]

    def git(*args: str) -> str:
        command = ["git", "-C", str(here), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        origin = {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        origin = None
    libraries = ("torch", "torchvision", "lightning", "torchmetrics")
    versions = {name: version(name) for name in libraries}
    return {"git": origin, "versions": {"python": platform.python_version(), **versions}}
