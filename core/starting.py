"""Preparations before torch and Lightning are loaded, which takes seconds."""

import os
import sys
from types import ModuleType

SPINS = 20_000  # what it costs and gives: docs/speed.md


def start() -> None:
    """Say what takes so long, and load no more than is needed; before the first import of torch."""
    if sys.stderr.isatty():
        print("Loading PyTorch and Lightning ...", file=sys.stderr)
    else:  # a log, where a bar that is drawn ten times a second is thousands of lines
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    _limit_spinning()
    _load_torchmetrics()


def _limit_spinning() -> None:
    """Let OpenMP's threads go to sleep soon at a barrier.

    GNU's libgomp, which torch brings, reads this when it is loaded. As it comes, a thread spins
    300,000 rounds before it sleeps. That is right on idle cores; on shared virtual ones two threads
    then wait many times longer than they work. What the user has set stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def _load_torchmetrics() -> None:
    """Import torchmetrics, which Lightning does, without the half of scipy that it never uses.

    Of ``scipy.signal``, half as long as the import of torch, it asks for an old name alone, which
    it puts there for another package. Whoever imports the module later gets the real one.
    """
    name = "scipy.signal"
    if name in sys.modules:
        return
    placeholder = ModuleType(name)
    placeholder.__dict__["hamming"] = None
    sys.modules[name] = placeholder
    try:
        import torchmetrics  # noqa: F401
    finally:
        del sys.modules[name]
