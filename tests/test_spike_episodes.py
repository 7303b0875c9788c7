"""Excursions that a monitor saw, and what it said of the steps before."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.spike_episodes import main, merged, recall


def test_spans_that_are_close_are_one() -> None:
    assert merged([(0, 2), (12, 13), (24, 30)]) == [(0, 13), (24, 30)]


def test_recall_and_false_alarms() -> None:
    loss, flagged = np.full(400, 0.1), np.zeros(400, bool)
    loss[[150, 200, 201, 300]] = 2.0
    flagged[[147, 202, 204, 250, 251, 300]] = True  # ahead, behind, twice for nothing, on time
    assert recall(loss, flagged) == (2, 3, 1)


def test_what_is_printed_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = np.full(300, 0.1)
    loss[[150, 200]] = 2.0
    pd.DataFrame({"step": range(300), "train/loss": loss}).to_csv(tmp_path / "metrics.csv")
    records = [
        {"step": step, "spiked": ["loss"], "before": {"step": before, "parameter": name}}
        for step, before, name in ((150, 149, "a"), (152, 149, "a"), (200, 195, "b"))
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "spikes.jsonl").write_text(text)
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "2 of 2 excursions seen, 0.00 false alarms per 1000",
        "2 episodes; in 1 the largest update of 10 steps came one before",
        "largest gradient of that step in: 1 a, 1 b",
    ]
