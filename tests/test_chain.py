"""The Kaggle chain of the README, from PNG folders to a checked submission."""

from pathlib import Path

import pytest
from conftest import CONFIGS

import predict
import submit
import train


def test_train_predict_and_check(
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data=KaggleCIFAR10DataModule", f"--data.data_dir={data_dir}"]
    small = ["--data.val_size=20", "--data.batch_size=10", "--model.network.widths=[8,8,8]"]
    quick = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    train.main(
        ["fit", f"--config={CONFIGS / 'cifar10_cpu.yaml'}", *data, *small, *quick, "--run=first"]
    )
    predict.main(["runs/cifar10_cpu/first"])
    capsys.readouterr()
    submit.main(["runs/cifar10_cpu/first", "--dry_run"])
    printed = capsys.readouterr().out
    assert "30 rows for cifar-10" in printed
    assert "20 samples" in printed
    assert "All checks passed; nothing was sent." in printed
