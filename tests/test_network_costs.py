"""The table of what networks cost."""

from pathlib import Path

import pytest
from conftest import CONFIGS

from benchmarks.network_costs import COLUMNS, main


def rows(printed: str) -> list[dict[str, str]]:
    _, _, _, _, *lines = printed.splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in table]


def test_a_row_for_each_config_whose_data_are_there(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mnist, photos = CONFIGS / "mnist_lenet.yaml", CONFIGS / "image_folder.yaml"
    flags = [f"--data.data_dir={data_dir}", "--data.val_size=40", "--data.verify=false"]
    main([str(mnist), str(photos), *flags])
    printed = capsys.readouterr().out
    [lenet] = rows(printed)
    assert (lenet["network"], lenet["parameters"], lenet["batch"]) == ("LeNet5", "61,706", "64")
    convolutions = 28**2 * 25 * 6 + 10**2 * 25 * 6 * 16
    linear = 400 * 120 + 120 * 84 + 84 * 10
    assert float(lenet["MFLOP"]) == pytest.approx(2e-6 * (convolutions + linear), abs=1e-3)
    assert lenet["weights"] == lenet["gradients"] == "0.24"
    assert lenet["optimizer"] == "0.00"
    assert "\nWithout image_folder: " in printed


def test_operations_are_those_of_an_example_and_not_of_a_token(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model.network.rnn=lit_models.networks.VanillaRNN", f"--data.data_dir={data_dir}"]
    main([str(CONFIGS / "last_names_course.yaml"), *flags])
    [names] = rows(capsys.readouterr().out)
    assert names["network"] == "Recurrent of VanillaRNN"
    steps = 13 * 2 * 128 * (128 + 128 + 3)  # letters of the longest name; states, three languages
    assert float(names["MFLOP"]) == pytest.approx(1e-6 * steps, abs=1e-3)


def test_a_config_that_cannot_be_built_without_its_data_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module of the photos looks for their folder when it is made."""
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("model: [")
    Path("empty.yaml").write_text("trainer: {}")
    shipped = [str(CONFIGS / f"{name}.yaml") for name in ("image_folder", "digits_conv_stack")]
    main(["broken.yaml", "empty.yaml", "missing.yaml", *shipped])
    printed = capsys.readouterr().out
    [digits] = rows(printed)
    assert digits["network"] == "ConvStack"
    assert "\nWithout image_folder: photos is no folder" in printed
    assert "\nWithout broken: broken.yaml is not YAML" in printed
    assert "\nWithout empty: it is no experiment" in printed
    assert "\nWithout missing: missing.yaml cannot be read" in printed
