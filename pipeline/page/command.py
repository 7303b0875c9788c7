"""The command ``study.py page``."""

import argparse
from pathlib import Path

from pipeline.page.facts import Facts
from pipeline.page.one import page_of_run
from pipeline.page.several import page_of_runs


def page(options: argparse.Namespace) -> None:
    """Write the page of a run, or of several side by side.

    Raises:
        UserError: A run is not there, or the file cannot be written.
    """
    runs = [Facts.find(name, Path(options.root)) for name in options.runs]
    if len(runs) == 1:
        page_of_run(runs[0]).write(options.output or runs[0].folder / "page.html")
    else:
        beside = runs[-1].folder / "comparison" / "page.html"
        page_of_runs(runs).write(options.output or beside)
