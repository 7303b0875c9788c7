"""What the check of a GPU writes, what it leaves out, and that it runs where there is none."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_check
from benchmarks.gpu_check import Part, WaitMeter, Way

ROOT = Path(__file__).parent.parent
QUICK = {
    "counts": {"steadyfit", "in 32-true", "without spike monitor"},
    "cold": {"steadyfit"},
    "hot": {"steadyfit, bf16-mixed", "steadyfit, 32-true"},
    "steps": {"steadyfit", "with Compile", "raw PyTorch loop"},
    "predict": {"predict.py"},
    "processes": {"2 processes"},
}


class Waiting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)
        return x


def fail() -> dict[str, float]:
    raise RuntimeError("no such kernel")


def interrupt() -> dict[str, float]:
    raise KeyboardInterrupt


def numbers(*values: float) -> Way:
    left = iter(values)
    return lambda: {"seconds": next(left)}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Run parts, and return all lines of the record."""

    def run(parts: dict[str, Part], *flags: str) -> list[Any]:
        monkeypatch.setattr(gpu_check, "parts_of", lambda options, folder: parts)
        gpu_check.main([str(tmp_path / "x.jsonl"), "--quick", *flags])
        return lines(tmp_path / "x.jsonl")

    return run


def lines(record: Path) -> list[Any]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def test_ways_take_turns_and_are_compared(check: Callable[..., list[Any]]) -> None:
    ways = {"a": numbers(9, 1, 2, 3), "b": numbers(9, 2, 4, 5)}
    first, second = check({"x": Part(1, ways, least=3, most=3, warm=True)})
    assert first["measures"]["seconds"] == {"n": 3, "mean": 2, "sd": 1, "values": [1, 2, 3]}
    seconds = second["measures"]["seconds"]
    assert seconds["values"] == [2, 4, 5]
    assert seconds["p"] == pytest.approx(0.0377, abs=1e-4)  # t = 5 with 2 degrees of freedom
    assert {"hardware", "versions"} < second["run"].keys()


def test_what_fails_is_told_and_the_rest_goes_on(
    check: Callable[..., list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "x": Part(1, {"a": fail, "b": numbers(1, 2)}, least=2, most=2),
        "y": Part(1, {"c": numbers(3)}),
    }
    with pytest.raises(SystemExit) as end:
        check(parts)
    assert end.value.code == 1
    assert "a failed: RuntimeError: no such kernel" in capsys.readouterr().out
    found = {
        line["run"]["way"]: line["measures"]["seconds"] for line in lines(tmp_path / "x.jsonl")
    }
    assert {way: seconds["values"] for way, seconds in found.items()} == {"b": [1, 2], "c": [3]}


def test_an_interrupted_check_goes_on_after_its_last_part(
    check: Callable[..., list[Any]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        check({"x": Part(1, {"a": numbers(1)}), "y": Part(1, {"b": interrupt})})
    assert [line["run"]["way"] for line in lines(tmp_path / "x.jsonl")] == ["a"]
    found = check({"x": Part(1, {"a": fail}), "y": Part(1, {"b": numbers(2)})})
    assert [line["run"]["way"] for line in found] == ["a", "b"]


def test_a_part_that_may_end_too_late_is_left_out(
    check: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"x": Part(5, {"a": fail}), "y": Part(1, {"b": numbers(2)})}
    (line,) = check(parts, "--minutes=2")
    assert line["run"]["part"] == "y"
    assert "x: left out, since it may take 5 minutes." in capsys.readouterr().out


def test_more_rounds_leave_the_time_of_later_parts(
    check: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def minute() -> dict[str, float]:
        now[0] += 60
        return {"seconds": 60.0}

    first, _ = check(
        {"x": Part(2, {"a": minute}, 2, 99), "y": Part(3, {"b": minute})}, "--minutes=9"
    )
    assert first["measures"]["seconds"]["n"] == 6  # and three minutes are left


def test_waits_for_the_device_are_counted_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CUDA's sync debug mode there is only its warning here, one in each forward pass."""
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", lambda mode: None)
    meter = WaitMeter()
    network = meter.watch(Waiting())
    with meter.counting():
        for _ in range(4):
            network(torch.ones(1))
    assert meter.per_step(0, 3).reads == 1


def test_without_a_gpu_only_a_trial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu_check.main([str(tmp_path / "x.jsonl")])
    assert end.value.code == 2
    assert "--quick" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_check_runs_to_its_end_without_wandb(tmp_path: Path) -> None:
    """In processes of their own, none of which can import wandb."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['wandb'] = None\n")
    record = tmp_path / "x.jsonl"
    run = [sys.executable, "-m", "benchmarks.gpu_check", str(record), "--quick", "--minutes=60"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, set[str]] = {}
    for line in lines(record):
        found.setdefault(line["run"]["part"], set()).add(line["run"]["way"])
        assert all(measured["n"] >= 1 for measured in line["measures"].values())
    assert found.keys() == QUICK.keys()
    assert all(found[part] >= ways for part, ways in QUICK.items())
