"""A trained model in Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CONFIGS, SMALL
from PIL import Image

import predict
import train
from core.errors import UserError
from lit_models import LitClassifier, LitRegressor, load
from lit_models.base import LitModel


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained run that a test may change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/cifar10_cpu/first", symlinks=True)
    return Path("runs/cifar10_cpu/first")


def predicted(run: Path) -> tuple[list[str], np.ndarray]:
    """Labels and probabilities as ``predict.py`` writes them."""
    predict.main([str(run)])
    saved = np.load(run / "submission.npz")
    rows = (run / "submission.csv").read_text().splitlines()[1:]
    return [row.split(",")[1] for row in rows], saved["probabilities"]


def changed(path: Path, section: str, **entry: object) -> Path:
    """A checkpoint whose configuration is another one."""
    checkpoint = torch.load(path, weights_only=True)
    config = yaml.safe_load(checkpoint["config"])
    config[section] |= entry
    checkpoint["config"] = yaml.safe_dump(config)
    torch.save(checkpoint, path.with_name("changed.ckpt"))
    return path.with_name("changed.ckpt")


def test_predictions_are_those_of_the_command(run: Path) -> None:
    """The same bits: normalisation, test-time augmentation and precision are the run's."""
    labels, probabilities = predicted(run)
    model = load("cifar10_cpu/first")
    assert not model.training
    assert model.class_names[0] == "airplane"
    images, _ = model.data.read_test()
    found = model.predict(images)
    assert found.labels == labels
    assert np.array_equal(found.probabilities, probabilities)
    few = model.predict(images[:7].numpy()[::-1])
    assert few.labels == labels[:7][::-1]
    other = load(run, tta="none").predict(images)
    assert not np.allclose(other.probabilities, probabilities)
    assert model.network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert model.device.type == "cpu"


def test_images_of_all_kinds(run: Path) -> None:
    model = load(run / "checkpoints" / "last.ckpt")
    images = model.data.read_test()[0][:5].numpy()
    pictures = [Image.fromarray(image) for image in images]
    for number, picture in enumerate(pictures):
        picture.save(f"{number}.png")
    expected = model.predict(images)
    for same in (pictures, list(images), [f"{n}.png" for n in range(5)], Path().glob("*.png")):
        found = model.predict(sorted(same) if not isinstance(same, list) else same)
        assert np.array_equal(found.probabilities, expected.probabilities)
    large = [picture.resize((64, 96)) for picture in pictures]
    assert model.predict(large).probabilities.shape == (5, 10)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(2, 32, 32, 3), "uint8 from 0 to 255, got torch.float32"),
        ([], "no images"),
        ("photo.png", "put one into a list"),
        (["none.png"], "none.png is no image"),
        ([np.zeros((2, 2, 7), np.uint8)], "a ndarray is no image"),
    ],
)
def test_what_is_no_images_is_refused(given: object, said: str, run: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(run).predict(given)


def test_a_run_is_found_from_any_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_models.trained.CHECKOUT", Path.cwd())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for name in ("runs/cifar10_cpu/first", "cifar10_cpu/first", run / "checkpoints" / "best.ckpt"):
        assert isinstance(load(name), LitClassifier)
    with pytest.raises(UserError, match="none is not a run folder"):
        load("none")


def test_a_stranger_chooses_no_import(run: Path) -> None:
    Path("own_module.py").write_text(
        "from pathlib import Path\nfrom lit_models import LitClassifier\n"
        "Path('imported').touch()\nclass Own(LitClassifier): pass\n"
    )
    path = changed(run / "checkpoints" / "best.ckpt", "model", class_path="own_module.Own")
    for refused in (load, LitModel.load_from_checkpoint):
        with pytest.raises(UserError, match=r"own_module.*trust=True"):
            refused(path)
    assert not Path("imported").exists()
    assert type(load(path, trust=True)).__name__ == "Own"
    assert Path("imported").exists()


def test_load_from_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a TypeError: the arguments are not in Lightning's ``hyper_parameters``."""
    path = run / "checkpoints" / "best.ckpt"
    model = LitClassifier.load_from_checkpoint(path, map_location="cpu", label_smoothing=0.1)
    assert model.training
    assert model.label_smoothing == 0.1
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], own) for name, own in model.state_dict().items())
    with pytest.raises(UserError, match="holds a LitClassifier, no LitRegressor"):
        LitRegressor.load_from_checkpoint(path)
    with pytest.raises(UserError, match="there is no strict"):
        LitClassifier.load_from_checkpoint(path, strict=False)
    with pytest.raises(UserError, match="optimizer is a function"):
        LitClassifier.load_from_checkpoint(path, optimizer=predicted)
    with pytest.raises(UserError, match="does not exist"):
        LitClassifier.load_from_checkpoint("none.ckpt")


def test_names(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = f"--config={CONFIGS / 'last_names.yaml'}"
    settings = ["--data.val_size=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    train.main(["fit", config, f"--data.data_dir={data_dir}", *settings, *SMALL[-1:], "--run=x"])
    names = ["Nguyen", "Kowalski"]
    predict.main(["runs/last_names/x", "--names", *names])
    saved = np.load("runs/last_names/x/predictions.npz")
    found = load("last_names/x").predict(names)
    assert np.array_equal(found.probabilities, saved["probabilities"])
    assert found.labels == [str(saved["classes"][k]) for k in saved["probabilities"].argmax(1)]
    with pytest.raises(UserError, match="takes a list of texts, got 'Nguyen'"):
        load("last_names/x").predict("Nguyen")


@pytest.mark.slow
def test_the_import_is_cheap() -> None:
    """Nobody who only wants the modules pays for the command line."""
    command = "import sys; from lit_models import load; print(*sys.modules)"
    root = CONFIGS.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, check=True, cwd="/"
    )
    names = set(done.stdout.decode().split())
    assert names.isdisjoint({"pipeline", "callbacks", "pandas", "sklearn", "wandb"})
