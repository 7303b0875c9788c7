"""The benchmark that kills runs sees what is not as it was."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.soak import KINDS, TASKS, Soak, cases, differences, show_slopes


def write_run(folder: Path, loss: float) -> None:
    folder.mkdir()
    torch.save({"state": [torch.tensor([0.5, loss])], "epoch": 1}, folder / "last.ckpt")
    (folder / "metrics.csv").write_text(f"step,loss\n0,{loss}\n")
    (folder / "config.yaml").write_text(f"# command: {folder}\nseed_everything: 0\n")


def test_differences_are_those_of_names_and_contents(tmp_path: Path) -> None:
    for name, loss in (("whole", 1.0), ("equal", 1.0), ("other", 2.0)):
        write_run(tmp_path / name, loss)
    (tmp_path / "other" / ".metrics.csv.12345678.tmp").touch()
    assert differences(tmp_path / "equal", tmp_path / "whole") == []
    assert differences(tmp_path / "other", tmp_path / "whole") == [
        ".metrics.csv.12345678.tmp",
        "last.ckpt state 0",
        "metrics.csv",
    ]


def test_every_task_is_killed_in_every_way() -> None:
    drawn = {(case["kind"], case["task"]) for case in cases(100)}
    assert drawn == {(kind, task) for kind in KINDS for task in TASKS}


def test_a_slope_is_that_of_the_second_half(capsys: pytest.CaptureFixture[str]) -> None:
    steps = range(1000, 9000, 1000)
    grows = [9.0, 9, 9, 9, 1, 2, 3, 4]
    constant = {name: [1.0] * 8 for name in ("open_files", "folder_MiB", "seconds")}
    show_slopes({"step": list(steps), "memory_MiB": grows, **constant})
    memory, files = capsys.readouterr().out.splitlines()[1:3]
    assert memory.split() == ["memory_MiB", "9.00", "4.00", "+1.0000"]
    assert float(files.split()[-1]) == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_is_equal_in_the_end(tmp_path: Path) -> None:
    measures = Soak(tmp_path).case({"task": "echo", "kind": "save", "case": 0})
    assert measures["place"] == "half a save"
    assert (measures["restarts"], measures["first"]) == (1, []), json.dumps(measures)
