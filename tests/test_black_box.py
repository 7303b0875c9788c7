"""The states before the worst spikes: whole, few, exact, and nearly free."""

import json
import math
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import full_disk
from processes import start_command, wait
from torch import Tensor

import spikes
from benchmarks import step_overhead
from benchmarks.spike_why import configuration
from callbacks import GradientSpikeMonitor
from core.runs import load_checkpoint
from steadyfit._monitor_hooks import BlackBoxHooks
from steadyfit.watching.black_box import BlackBox
from steadyfit.watching.records import SpikeRecord, Verdict
from train import main

KILLED = """
import os, signal, torch
usual = torch.save
def save(content, file):
    if ".step_" in str(getattr(file, "name", "")):
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    usual(content, file)
torch.save = save
"""


def command(folder: Path, **settings: Any) -> tuple[list[str], int]:
    """Arguments that train the planted LSTM with a black box, and the step of its spike."""
    config, step = configuration("lstm", "sample x 100", 101)
    config["trainer"]["callbacks"][0]["init_args"] = {"black_box": 2}
    config["trainer"] |= settings
    path = folder / "planted.yaml"
    path.write_text(json.dumps(config))
    return ["fit", f"--config={path}", f"--trainer.default_root_dir={folder}", "--run=x"], step


def assert_equal(a: Any, b: Any, name: str = "") -> None:
    """Assert that two states hold the same, bit for bit."""
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{name}.{number}")
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
    else:
        assert a == b or a != a, name


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_state_is_that_of_a_checkpoint_and_why_begins_with_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    accumulated: int,
) -> None:
    usual = BlackBoxHooks.on_train_batch_end

    def save_as_well(self: BlackBoxHooks, trainer: Any, *args: Any) -> None:
        step = trainer.global_step
        if step % 10 == 0 and not (tmp_path / f"{step}.pt").exists():
            trainer.save_checkpoint(tmp_path / f"{step}.pt", weights_only=False)
        usual(self, trainer, *args)

    monkeypatch.setattr(BlackBoxHooks, "on_train_batch_end", save_as_well)
    settings = {"accumulate_grad_batches": accumulated, "log_every_n_steps": 10}
    args, _ = command(tmp_path, **settings)
    main(args)
    folder = tmp_path / "planted" / "x"
    files = list((folder / "black_box").iterdir())
    assert 1 <= len(files) <= 2
    for path in files:
        step = int(path.stem.removeprefix("step_"))
        state = load_checkpoint(path)
        assert state["global_step"] == step
        assert_equal(state, load_checkpoint(tmp_path / f"{step}.pt"))
    shutil.rmtree(folder / "checkpoints")  # which may be nearer
    spikes.main(["why", str(folder), "--trust"])
    facts = json.loads((folder / "why.json").read_text())
    assert facts["control"]["since"].startswith("black_box/step_")
    assert facts["control"]["equal"]
    assert facts["steps"]["repeated"] < 200


@pytest.mark.slow
def test_one_that_is_killed_leaves_no_damaged_file(tmp_path: Path) -> None:
    args, _ = command(tmp_path, max_epochs=20)
    assert wait(start_command("train", args, tmp_path, KILLED)) == -signal.SIGKILL
    box = tmp_path / "planted" / "x" / "black_box"
    assert [path.name[:6] for path in box.iterdir()] == [".step_"]  # no state goes by this name
    main(args)  # goes on
    for path in box.iterdir():
        assert not path.name.startswith(".")
        load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "steps"), [("LeNet5", 150), ("one 1x2 Linear", 290)])
def test_copying_costs_below_one_percent_and_no_read(network: str, steps: int) -> None:
    def cost(**options: Any) -> step_overhead.Mark:
        way = partial(
            step_overhead.steadyfit,
            watched=False,
            more_callbacks=lambda: [GradientSpikeMonitor(**options)],
        )
        return step_overhead.measure(way, step_overhead.TASKS[network], steps, count=True)

    plain, boxed = cost(), cost(black_box=3)
    assert boxed.reads == plain.reads
    assert plain.operators < boxed.operators < 1.01 * plain.operators


def record(step: int, height: float) -> SpikeRecord:
    return SpikeRecord(step, spiked=["loss"], signals={"loss": Verdict(height, "spike", center=1)})


def train(box: BlackBox, records: list[SpikeRecord], steps: range) -> None:
    weights = torch.zeros(2)
    for step in steps:
        weights.fill_(step)
        box.judge(step, [r for r in records if r.step < step])
        if step >= box.due:
            box.take(step, {"weights": weights, "steps": [step]}, trained=1, multiple=10)
    box.judge(math.inf, records)


def test_the_states_before_the_worst_spikes_are_kept(tmp_path: Path) -> None:
    box = BlackBox(keep=2)
    box.open(tmp_path, 0, [])
    records = [record(s, h) for s, h in ((45, 3.0), (49, 9.0), (125, 2.0), (170, 5.0), (210, 4.0))]
    train(box, records, range(0, 300, 10))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0.ckpt", "step_160.ckpt"]
    state = torch.load(tmp_path / "step_160.ckpt")
    assert state["weights"].tolist() == [160.0, 160.0]  # not what they became
    assert state["steps"] == [160]


def test_a_training_that_goes_on_knows_its_files(tmp_path: Path) -> None:
    box = BlackBox(keep=2)
    box.open(tmp_path, 0, [])
    records = [record(49, 9.0), record(170, 5.0), record(210, 2.0)]
    train(box, records, range(0, 200, 10))
    (tmp_path / ".step_5.ckpt").write_bytes(b"half")
    box = BlackBox(keep=2)
    box.open(tmp_path, 150, records[:1])
    assert [p.name for p in tmp_path.iterdir()] == ["step_0.ckpt"]  # the other comes again
    train(box, records, range(150, 300, 10))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_is_full_does_not_end_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = BlackBox(keep=2)
    box.open(tmp_path, 0, [])
    with full_disk(1000):
        train(box, [record(49, 9.0)], range(0, 200, 10))
    assert "could not be written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [-1, 1.5])
def test_a_number_of_states_is_whole(number: float) -> None:
    with pytest.raises(ValueError, match=f"black_box.*{number}"):
        GradientSpikeMonitor(black_box=number)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "SingleDeviceStrategy"])
def test_a_state_that_cannot_be_had_whole_is_refused(strategy: str) -> None:
    """The second trainer is of a Lightning without the private name that is asked."""
    trainer = SimpleNamespace(strategy=type(strategy, (), {})(), callbacks=[])
    hooks = GradientSpikeMonitor(black_box=1)._black_box
    assert hooks
    with pytest.raises(ValueError, match="black_box"):
        hooks.stand_last(trainer)
