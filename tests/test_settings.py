"""Every line of docs/settings.md is run."""

import re
from pathlib import Path

import pytest
from conftest import CONFIGS

import train

pytestmark = pytest.mark.slow

PAGE = CONFIGS.parent / "docs" / "settings.md"
LINES = [
    line
    for block in re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines()
]
QUICK = [
    f"--config={CONFIGS / 'mnist_lenet.yaml'}",
    "--data=DigitsDataModule",
    "--data.train_fraction=0.3",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=callbacks.MetricsCSV",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_page_trains(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "own_nets" in line:
        own = "from lit_models.networks import LeNet5\nclass OwnNet(LeNet5): pass\n"
        Path("own_nets.py").write_text(own)
    if "--init_from" in line:
        train.main(["fit", *QUICK, "--run=first"])
    train.main(["fit", *QUICK, "--run=x", *line.split()])
    [recorded] = Path("runs").glob("*/x/config.yaml")
    assert recorded.is_file()
