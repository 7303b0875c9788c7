"""The origin of a result: commit, versions, hardware, command."""

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:  # two seconds, and only the type
    import torch

_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # ends of the names of variables
HERE = Path(__file__).parents[1]
LONGEST_PATCH = 1_000_000  # bytes; code is smaller, and a table that git tracks is no code


def provenance() -> dict[str, Any]:
    """Return the commit of this project and the versions of its libraries."""
    try:
        commit = _git("rev-parse", "--verify", "--quiet", "HEAD").decode().strip()
        origin = {"commit": commit, "clean": not _git("status", "--porcelain")} if commit else None
    except OSError:  # no git; a copy without its history has no commit
        origin = None
    libraries = ("torch", "torchvision", "lightning", "torchmetrics")
    versions = {name: version(name) for name in libraries}
    return {"git": origin, "versions": {"python": platform.python_version(), **versions}}


def _git(*args: str) -> bytes:
    """Return what git prints, up to a little more than the longest patch; nothing if it fails."""
    command = ["git", "-C", str(HERE), *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        return process.stdout.read(LONGEST_PATCH + 1)


def hardware(device: "torch.device", processes: int) -> str:
    """Name the processor and the devices of a training.

    Args:
        device: That of this process.
        processes: How many train together, each on a device of its own.
    """
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    where = f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores"
    if device.type == "cuda":
        where = f"{processes} x {torch.cuda.get_device_name(device)}; {where}"
    return where


def recorded(config: Path) -> dict[str, Any]:
    """Read the origin of a run from the comment above its configuration; empty without one."""
    lines = config.read_text(errors="replace").splitlines()
    try:
        origin = yaml.safe_load("\n".join(line[2:] for line in lines if line.startswith("# ")))
    except yaml.YAMLError:
        return {}
    return origin if isinstance(origin, dict) else {}


def secrets() -> set[str]:
    """Return keys, tokens and passwords in the environment."""
    named = (text.strip() for name, text in os.environ.items() if name.endswith(_SECRET))
    return {text for text in named if len(text) >= 8}


def masked(text: str) -> str:
    """Return the text without the secrets of the environment."""
    for secret in sorted(secrets(), key=len, reverse=True):  # one may be the start of another
        text = text.replace(secret, "***")
    return text


def command() -> str:
    """Return the command that was typed, without secrets and passwords in addresses."""
    typed = [re.sub(r"(?<=://)[^/\s@]+@", "***@", masked(arg)) for arg in sys.argv]
    return shlex.join(["python", *typed])


def code_patch() -> str:
    """Return what ``git apply`` adds to the commit of :func:`provenance`; empty if nothing.

    Without secrets of the environment, and without files that git does not track, which may be
    anything: the first line names them.
    """
    try:
        # so that it can be applied, whatever git is set to, and with pictures
        plain = ("--binary", "--src-prefix=a/", "--dst-prefix=b/", "--no-color", "--no-ext-diff")
        patch = _git("diff", "HEAD", "--relative", "--no-textconv", *plain)
        untracked = _git("ls-files", "--others", "--exclude-standard", "--", "*.py", "*.yaml")
    except OSError:
        return ""
    text = patch[:LONGEST_PATCH].decode(errors="replace")
    if names := untracked.decode(errors="replace").split("\n")[:-1]:
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        text = (
            f"# not in here, since git does not track them: {', '.join(names[:20])}{more}\n{text}"
        )
    if len(patch) > LONGEST_PATCH:
        text = f"# cut after {LONGEST_PATCH:,} bytes: it cannot be applied\n{text}\n"
    return masked(text)
