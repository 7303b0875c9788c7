"""A run with a submission, and what the list of submissions says of it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.kaggle import ledger

RUN = "runs/digits/first"
SAMPLE = "id,label\n1,cat\n2,cat\n3,cat\n4,cat\n"
GOOD = "id,label\n1,cat\n2,dog\n3,dog\n4,dog\n"
CONFIG = """
trainer:
  logger:
  - class_path: callbacks.MetricsCSV
  - class_path: lightning.pytorch.loggers.WandbLogger
    init_args: {project: steadyfit}
"""

Refusal = Callable[..., str]


def make_run(text: str = GOOD, folder: str = RUN, **changes: Any) -> str:
    """A run folder as ``train.py`` and ``predict.py`` leave it; returns its name."""
    path = Path(folder, "submission.csv")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (path.parent / "config.yaml").write_text(CONFIG)
    made = {
        "csv": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "competition": "cifar-10",
        "sample": "sample.csv",
        "labels": ["bird", "cat", "dog"],
        "runs": [{"run": folder, "validation_accuracy": 0.91, "validation_samples": 5000}],
    }
    path.with_suffix(".json").write_text(json.dumps(made | changes))
    return folder


def records() -> list[dict[str, str]]:
    return [asdict(record) for record in ledger.read()]
