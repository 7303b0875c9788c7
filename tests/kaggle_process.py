"""What a process of its own does with ``submit.py`` and its list."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import submit
from core import kaggle_client
from pipeline.kaggle import ledger, sending
from pipeline.kaggle.ledger import Record


def submit_once(args: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    """Be one start of ``submit.py`` in ``folder``; what it says goes into ``said.txt`` there."""
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("KAGGLE_")]:
        del os.environ[name]
    os.environ.update(environment)
    sending.POLL_SECONDS, sending.SETTLE_SECONDS = 0.02, 0.4
    kaggle_client.FIRST_PAUSE, kaggle_client.UPLOAD_SECONDS = 0.01, 0.05
    kaggle_client.TIMEOUT = (5.0, 0.15)
    with open("said.txt", "a", buffering=1) as said:
        sys.stdout = sys.stderr = said
        with suppress(SystemExit):
            submit.main(list(args))


def append_rows(folder: Path, first: int) -> None:
    """Add 20 rows to the list of submissions, one by one."""
    os.chdir(folder)
    row = Record(*[""] * len(ledger.FIELDS))
    for ref in range(first, first + 20):
        ledger.append(replace(row, time="2026-01-02", ref=str(ref)))
