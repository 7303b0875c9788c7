"""How flags on labelled series of real trainings are counted."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.real_logs import Series, count, main, read_series, summarize
from benchmarks.spike_detectors import Counts


class At:
    """Flags the given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.step = steps, -1

    def update(self, value: float) -> bool:
        self.step += 1
        return self.step in self.steps


def series(certain: list[list[int]], doubtful: list[list[int]]) -> Series:
    return Series("a", "loss", np.ones(100), certain, doubtful)


@pytest.mark.parametrize(
    ("flags", "hits", "false_alarms"),
    [((50, 51), 1, 0), ((53,), 1, 0), ((54, 60), 0, 0), ((61,), 0, 1), ((49,), 0, 1), ((5,), 0, 0)],
    ids=["within", "one after", "tail", "after the tail", "before", "the first values"],
)
def test_an_event_is_found_on_its_steps_and_the_one_after(
    flags: tuple[int, ...], hits: int, false_alarms: int
) -> None:
    counts = count(At(*flags), series([[50, 52, 60]], []))
    assert (counts.hits, counts.misses, counts.false_alarms) == (hits, 1 - hits, false_alarms)
    assert counts.steps == 100 - 30 - 11


def test_doubtful_events_and_those_of_the_first_values_are_passed_over() -> None:
    counts = count(At(10, 70, 71), series([[10, 10, 10]], [[70, 70, 70]]))
    assert counts == Counts(0, 0, 0, 100 - 30 - 2)


def test_sources_with_few_events_are_taken_together() -> None:
    summary = summarize(
        {
            "many": Counts(8, 0, 2, 1000),
            "one": Counts(1, 0, 0, 1000),
            "two": Counts(0, 0, 2, 1000),
            "quiet": Counts(0, 2, 0, 1000),
            "silent": Counts(0, 0, 0, 500),
        }
    )
    assert summary.f1 == {"many": 16 / 18, "the rest": 0.5}
    assert summary.worst == 0.5
    assert summary.quiet == 1.0


def test_a_folder_is_read_and_a_table_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.exp(0.1 * np.random.default_rng(0).standard_normal(400)).astype(np.float32)
    values[[200, 300]] *= 5
    np.savez(tmp_path / "a.npz", loss=values, norm=values[:200])
    rows = [("a/loss", "a", "a.npz", "loss", "loss"), ("a/norm", "a", "a.npz", "norm", "grad_norm")]
    pd.DataFrame(rows, columns=["id", "source", "file", "key", "kind"]).to_csv(
        tmp_path / "index.csv", index=False
    )
    events = [("a/loss", 200, 200, 202, "certain"), ("a/loss", 300, 300, 300, "certain")]
    pd.DataFrame(events, columns=["id", "start", "end", "tail_end", "sure"]).to_csv(
        tmp_path / "labels.csv", index=False
    )
    assert [len(one.certain) for one in read_series(tmp_path)] == [2, 0]
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 series of 1 sources"
    assert lines[3].split()[:4] == ["SpikeDetector", "(ours)", "1.000", "1.000"]
    assert lines[-1].split()[:6] == ["a", "535", "2", "1.000", "1.000", "0"]
