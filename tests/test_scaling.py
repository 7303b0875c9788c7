"""What several processes cost each other."""

import json
from pathlib import Path

import pytest
from processes import by_two

from benchmarks import scaling
from lit_models.networks import LeNet5


@pytest.mark.slow
def test_flags_cost_a_twentieth_of_lightnings(tmp_path: Path) -> None:
    """Both counted in two real processes: collectives, and the reads of what they bring."""
    args = ["--steps=1", "--rounds=1", "--result=result.json"]
    assert by_two("benchmarks.scaling", args, tmp_path) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    ours, theirs, usual = (scaling.Cost(*result["costs"][way]) for way in scaling.WAYS)
    assert usual.collectives == pytest.approx(1)  # the flag of every step, and nothing else
    # what else is exchanged, the metrics of log steps, is the same in both
    assert 0 < ours.collectives - (theirs.collectives - usual.collectives) <= 1 / 20
    assert 0 < ours.reads - (theirs.reads - usual.collectives) <= 1 / 20
    gradients = sum(p.nbytes for p in LeNet5().parameters())
    for cost in (ours, theirs, usual):
        assert (cost.gradient_bytes, cost.gradient_sums) == (gradients, 1)


def test_result_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cost = scaling.Cost(248_024, 1, 0.06, 0.04)
    result = {
        "seconds": {way: [0.003, 0.002, 0.004] for way in scaling.WAYS},
        "costs": dict.fromkeys(scaling.WAYS, cost),
    }
    monkeypatch.setattr(scaling, "measured", lambda *_: result)
    monkeypatch.setenv("COLUMNS", "200")
    scaling.main(["--quick", "--processes", "1", "2"])
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert "cores" in printed
    assert printed.count("2.000 to 4.000") == 2 * len(scaling.WAYS)
    assert "42,667" in printed  # two batches of 64 in 3 ms
