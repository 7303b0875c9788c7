"""Every shipped configuration trains, validates and tests."""

from pathlib import Path

import pytest
from conftest import CONFIGS

from train import main

LARGE = {"cifar10_96", "cifar10_97"}  # networks of which a step takes seconds on a CPU
EXPERIMENTS = [
    pytest.param(path, marks=[pytest.mark.slow] if path.stem in LARGE else [])
    for path in sorted(CONFIGS.glob("*.yaml"))
    if path.stem != "defaults"
]
OVERLAYS = sorted((CONFIGS / "hardware").glob("*.yaml"))


def fake(config: Path, data_dir: Path) -> list[str]:
    text = config.read_text()
    verified = "CIFAR10DataModule" in text or "MNISTDataModule" in text
    data = ["--data.verify=false"] if verified else []
    if "GrammarDataModule" in text or "MaskedBooksDataModule" in text:
        data = ["--data.epoch_size=80"]
    folder = data_dir / "photos" if "ImageFolderDataModule" in text else data_dir
    size = 4 if config.stem in LARGE else 20
    return [f"--data.data_dir={folder}", "--data.val_size=40", f"--data.batch_size={size}", *data]


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_fit_runs_and_leaves_nothing_behind(
    config: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["--trainer.fast_dev_run=2", "--trainer.accelerator=cpu"]
    main(["fit", f"--config={config}", *fake(config, data_dir), *args])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_config_opens_with_the_command_that_runs_it(config: Path) -> None:
    assert f"#   python train.py fit --config configs/{config.name}" in config.read_text()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_parses_over_an_experiment(
    overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIGS / "cifar10_cpu.yaml"
    with pytest.raises(SystemExit):
        main(["fit", f"--config={config}", f"--config={overlay}", "--print_config"])
    printed = capsys.readouterr().out
    assert "accelerator: cpu" in printed or "accelerator: gpu" in printed
