"""Published numbers come from a record of runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS

from benchmarks import results
from benchmarks.results import RESULTS, Results, table_of, told

STUDY = """
program: train.py
method: grid
metric: {name: test/accuracy}
parameters: {seed_everything: {values: [0, 1]}}
command:
- ${interpreter}
- ${program}
- fit
- --config=configs/demo.yaml
- --study=two.yaml
- --test=true
- --trainer.max_epochs=1
- --data.train_fraction=0.05
- --trainer.logger=MetricsCSV
- ${args}
"""


def line(seed: int, accuracy: float) -> dict[str, Any]:
    return {
        "run": {"point": {"task": "demo", "seed_everything": seed}},
        "measures": {"test/accuracy": accuracy, "test_samples": 400},
    }


def test_a_result_has_its_seeds_and_its_standard_error() -> None:
    of_two = told([line(0, 0.7), line(1, 0.9)])
    assert of_two == "80.00 ± 14.14 % (seeds 0 to 1; 400 test samples, standard error 2.00)"
    assert told([line(3, 0.5)]) == "50.00 % (seed 3; 400 test samples, standard error 2.50)"


def test_the_readme_says_what_the_record_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where settings have changed since: run ``python -m benchmarks.results --write``."""
    monkeypatch.chdir(CONFIGS.parent)
    published = Results(RESULTS, [], tmp_path)
    current = {job.point["task"] for job, _ in published.lines()}
    recorded = {
        each["run"]["point"]["task"] for each in published.record.lines if "point" in each["run"]
    }
    assert recorded <= current
    row = "| `demo.yaml` | a network | a result | a time |"
    assert re.fullmatch(
        r"\| `demo.yaml` \| a network \| [\d.]+ ± .*; an SVM .*% \| \d+ CPU s \|",
        table_of(row, published),
    )
    text = (CONFIGS.parent / "README.md").read_text()
    assert table_of(text, published) == text


@pytest.mark.slow
def test_what_the_record_has_is_reported_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.yaml").write_text(STUDY.replace("two.yaml", str(tmp_path / "two.yaml")))
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    command = [str(tmp_path / "two.yaml"), "--trainer.enable_progress_bar=false"]
    results.main([*command, "--where", "seed_everything=0"])
    [first] = map(json.loads, (tmp_path / "two.jsonl").read_text().splitlines())
    assert first["run"]["point"] == {"seed_everything": 0}
    assert first["measures"]["test_samples"] == 500
    assert "1 of 2 runs are not finished" in capfd.readouterr().out
    results.main([*command, "--minutes", "0"])
    assert (tmp_path / "two.jsonl").read_text().count("\n") == 1
    assert f"| {100 * first['measures']['test/accuracy']:.2f} |" in capfd.readouterr().out
