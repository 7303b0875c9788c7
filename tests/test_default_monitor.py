"""Every run is watched for spikes: by the monitor of the defaults, or by one in its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, end_wandb, read_wandb
from small_training import Plain, fit
from test_train import rows, sentence
from torch import nn

import train
from callbacks import GradientSpikeMonitor
from core.runs import load_checkpoint

LENET = [
    f"--config={CONFIGS / 'mnist_lenet.yaml'}",
    "--data=DigitsDataModule",
    "--data.batch_size=50",
    "--model.lr_scheduler=null",  # else another length is another run
    "--run=r",
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_train_batches=8",
    "--trainer.limit_val_batches=1",
]
FOLDER = Path("runs/mnist_lenet/r")
ADD = "--trainer.callbacks+=GradientSpikeMonitor"
REACT = "--trainer.callbacks.reaction=skip"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*flags: str, epochs: int = 1) -> Path:
    train.main(["fit", *LENET, f"--trainer.max_epochs={epochs}", *flags])
    end_wandb()
    return FOLDER


def callbacks_of(folder: Path) -> list[dict[str, Any]]:
    found = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    return [c for c in found if c["class_path"].endswith("GradientSpikeMonitor")]


@pytest.mark.usefixtures("wandb_offline")
def test_a_run_logs_its_gradient_norm_and_says_whether_it_spiked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A default run logged no gradient norm at all."""
    folder = run()
    table = rows(folder)
    assert len(table) > 5
    assert all(float(row["grad_norm/total"]) > 0 for row in table)
    printed = capsys.readouterr().out
    assert f"spike in {len(table)} optimizer steps" in printed.replace("spikes in", "spike in")
    [wandb] = (folder / "wandb").glob("offline-run-*")
    history = [r["history"]["item"] for r in read_wandb(wandb) if r["type"] == "history"]
    logged = {
        r["trainer/global_step"]: r["grad_norm/total"] for r in history if "grad_norm/total" in r
    }
    expected = {int(row["step"]): float(row["grad_norm/total"]) for row in table}
    assert logged == pytest.approx(expected)


def test_one_that_is_added_takes_the_place_of_the_default_one() -> None:
    """Two were a RuntimeError of Lightning: they have one state key."""
    whole = run("--trainer.logger=callbacks.MetricsCSV")
    [default] = callbacks_of(whole)
    assert default["init_args"]["optional"]
    [state] = [k for k in load_checkpoint(whole / "checkpoints" / "last.ckpt")["callbacks"]
               if k.startswith("GradientSpikeMonitor")]  # fmt: skip
    before = yaml.safe_load((whole / "config.yaml").read_text())["trainer"]["callbacks"]
    typed = [ADD, "--trainer.callbacks+=steadyfit.GradientSpikeMonitor", REACT]
    for name, flags in enumerate([typed, [f"--config={config_with_a_monitor()}"]]):
        run(*flags, f"--run={name}", "--trainer.logger=callbacks.MetricsCSV")
        folder = whole.with_name(str(name))
        [added] = callbacks_of(folder)
        assert (added["init_args"]["reaction"], added["init_args"]["optional"]) == ("skip", False)
        after = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
        names = [[c["class_path"].rpartition(".")[2] for c in each] for each in (before, after)]
        assert names[0] == names[1]
        assert state in load_checkpoint(folder / "checkpoints" / "last.ckpt")["callbacks"]


def config_with_a_monitor() -> Path:
    path = Path("reacting.yaml")
    entry = {"class_path": "callbacks.GradientSpikeMonitor", "init_args": {"reaction": "skip"}}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": [entry]}}))
    return path


def test_a_run_from_before_goes_on_with_it_unless_it_reacts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = ["--trainer.callbacks=[]", "--trainer.logger=callbacks.MetricsCSV"]
    folder = run(*bare)
    assert not callbacks_of(folder)
    said = sentence(["fit", *LENET, "--trainer.max_epochs=2", *bare[1:], ADD, REACT], capsys)
    assert "--trainer.callbacks.GradientSpikeMonitor was none, not GradientSpikeMonitor" in said
    run(*bare[1:], epochs=2)
    table = rows(folder)
    half = len(table) // 2
    assert [bool(row["grad_norm/total"]) for row in table] == [False] * half + [True] * half
    said = sentence(["fit", *LENET, "--trainer.max_epochs=3", *bare[1:], ADD, REACT], capsys)
    assert "--trainer.callbacks.GradientSpikeMonitor.reaction was log, not skip" in said
    run(*bare[1:], ADD, "--trainer.callbacks.window=32", epochs=3)
    assert callbacks_of(folder)[0]["init_args"]["window"] == 32


class Complex(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.ones(2, dtype=torch.complex64))


class Frozen(Plain):
    """Trains nothing, as methods do that only collect statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.automatic_optimization = False

    def configure_optimizers(self) -> None:
        return None


UNWATCHED: dict[str, tuple[Callable[[], Plain], str]] = {
    "complex": (Complex, "does not take complex parameters"),
    "frozen": (Frozen, "every parameter of Frozen is frozen"),
}


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
@pytest.mark.parametrize("case", UNWATCHED)
def test_what_it_cannot_watch_is_said_once_and_trained(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, why = UNWATCHED[case]
    monitor = GradientSpikeMonitor(optional=True)
    trainer = fit(tmp_path, make(), monitor, max_epochs=2)
    assert trainer.current_epoch == 2
    printed = [line for line in capsys.readouterr().out.splitlines() if "spike" in line.lower()]
    assert len(printed) == 1
    assert printed[0].startswith("Spikes are not watched: ")
    assert why in printed[0]
    assert not list(tmp_path.rglob("spikes.jsonl"))
    assert not any("grad_norm" in path.read_text() for path in tmp_path.rglob("metrics.csv"))
    with pytest.raises(ValueError, match=why):
        fit(tmp_path / "named", make(), GradientSpikeMonitor())


@pytest.mark.usefixtures("wandb_offline")
def test_what_a_run_left_undone_that_was_killed_behind_its_last_checkpoint() -> None:
    """The norms of each parameter, and W&B's tables and pictures.

    What a shorter training had left stayed as it was.
    """
    flags = [
        "--trainer.limit_train_batches=1.0",
        ADD,
        "--trainer.callbacks.threshold=1",
    ]  # some step is a spike by that
    shorter = (run(*flags) / "norms.pt").read_bytes()
    folder = run(*flags, epochs=2)
    norms = (folder / "norms.pt").read_bytes()
    spikes = (folder / "spikes.jsonl").read_bytes()
    (folder / "norms.pt").write_bytes(shorter)
    run(*flags, epochs=2)
    assert (folder / "norms.pt").read_bytes() == norms != shorter
    assert (folder / "spikes.jsonl").read_bytes() == spikes
    for pattern in ("spikes*.table.json", "sample_sheet*.png"):
        parts = folder.glob("wandb/offline*")
        assert [len(list(part.rglob(pattern))) for part in parts] == [1, 1, 1], pattern
