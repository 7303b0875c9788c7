"""What a result came from."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:  # two seconds, and only the type
    import torch


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


def hardware(device: "torch.device", processes: int) -> str:
    """The processor and the devices of a training, in words.

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
    """What the comment above the configuration of a run says of its origin; empty without one."""
    lines = config.read_text(errors="replace").splitlines()
    try:
        origin = yaml.safe_load("\n".join(line[2:] for line in lines if line.startswith("# ")))
    except yaml.YAMLError:
        return {}
    return origin if isinstance(origin, dict) else {}
