"""Processes of their own, forked from one that has imported what they need."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from kaggle_server import KEY, USERNAME

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
    """Add 40 rows to the list of submissions, one by one."""
    os.chdir(folder)
    row = Record(*[""] * len(ledger.FIELDS))
    for ref in range(first, first + 40):
        ledger.append(replace(row, time="2026-01-02", ref=str(ref)))


def start(target: Callable[..., None], *args: object) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kaggle", __name__])
    settings = {  # the client reads its own when imported; Python 3.11 forgets where modules are
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_USERNAME": USERNAME,
        "KAGGLE_KEY": KEY,
        "KAGGLE_CONFIG_DIR": tempfile.gettempdir(),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        process = context.Process(target=target, args=args)
        process.start()
    return process
