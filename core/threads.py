"""Threads that sleep while they wait."""

import os

SPINS = 20_000  # what it costs and gives: docs/speed.md, benchmarks/spinning_threads.py


def limit_spinning() -> None:
    """Let OpenMP's threads go to sleep soon at a barrier; to be called before torch is loaded.

    GNU's libgomp, which torch brings, reads this when it is loaded. As it comes, a thread spins
    300,000 rounds before it sleeps. That is right on idle cores; on shared virtual ones two threads
    then wait many times longer than they work. What the user has set stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
