"""Data sets of torch, and the page about Python."""

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import MNIST, FakeData
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

import predict
import train
from core.errors import UserError
from datamodules import MNISTDataModule, TorchDatasetDataModule
from lit_models import load
from pipeline.admission import admit

PAGE = (CONFIGS.parent / "docs" / "python.md").read_text()
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=1",
]
NAMES = list("0123456789")


class Transformed(Dataset[Any]):
    """Images of one set as another one may have them."""

    def __init__(self, images: Any, transform: Callable[[Any], Any]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), index % 3


def unit(image: Image.Image) -> Tensor:
    return to_dtype(pil_to_tensor(image), torch.float32, scale=True)


@pytest.mark.parametrize("transform", [lambda image: image, np.array, pil_to_tensor, unit])
@pytest.mark.parametrize("size", [(8, 8, 3), (8, 8)])
def test_images_of_all_kinds_are_read_as_they_are(
    transform: Callable[[Any], Any], size: tuple[int, ...]
) -> None:
    images = np.random.RandomState(0).randint(0, 256, (9, *size)).astype(np.uint8)
    data = TorchDatasetDataModule(
        partial(Transformed, images, transform),
        image_size=(8, 8, (*size, 1)[2]),
        class_names=["a", "b", "c"],
        val_size=3,
        mean=(0.5,) * (*size, 1)[2],
        std=(0.5,) * (*size, 1)[2],
    )
    pixels, classes = data.read_train()
    assert np.array_equal(pixels.numpy().reshape(images.shape), images)
    assert classes.tolist() == [0, 1, 2] * 3
    data.setup("fit")
    assert str(data) == "TorchDatasetDataModule: 6 train, 3 val"


def test_the_same_as_the_data_module_of_the_set(data_dir: Path) -> None:
    ours = MNISTDataModule(data_dir=str(data_dir), verify=False)
    grey: dict[str, Any] = {"image_size": (28, 28, 1), "mean": (0.5,), "std": (0.5,)}
    first, second = (partial(MNIST, data_dir, train=part) for part in (True, False))
    data = TorchDatasetDataModule(first, second, val_size=0, **grey)
    assert data.class_names[0] == "0 - zero"
    for own, same in ((ours.read_train(), data.read_train()), (ours.read_test(), data.read_test())):
        assert all(torch.equal(a, b) for a, b in zip(own, same, strict=True))
    validating = TorchDatasetDataModule(first, val=second, **grey)
    validating.setup("fit")
    assert torch.equal(validating.splits["val"][0], ours.read_test()[0])
    assert torch.equal(validating.splits["train"][0], ours.read_train()[0])
    other = TorchDatasetDataModule(second, val=second, **grey)
    other.setup("fit")
    assert other.digest != validating.digest  # of the training images too


def test_mistakes_are_told_in_one_sentence() -> None:
    fake = partial(FakeData, 20, (3, 32, 32))
    with pytest.raises(UserError, match="no attribute classes; name them"):
        TorchDatasetDataModule(fake)
    with pytest.raises(UserError, match="cannot be made: Dataset not found"):
        TorchDatasetDataModule(partial(MNIST, "none"))
    with pytest.raises(UserError, match="no test set; name one"):
        TorchDatasetDataModule(fake, class_names=NAMES).read_test()
    with pytest.raises(UserError, match="val is a set for validation"):
        TorchDatasetDataModule(fake, val=fake, val_size=0, class_names=NAMES)
    with pytest.raises(UserError, match="but 2 are named"):
        TorchDatasetDataModule(fake, class_names=["a", "b"]).read_train()
    images = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="leave out what normalizes them"):
        TorchDatasetDataModule(
            partial(Transformed, images, lambda image: unit(image) - 0.5), class_names=NAMES
        ).read_train()


@pytest.mark.parametrize(
    ("path", "options", "refused"),
    [
        ("torchvision.datasets.FakeData", {"size": 20}, False),
        ("torchvision.datasets.LSUN", {"root": "data"}, True),  # unpickles what lies in its folder
        ("torch.nn.Linear", {}, True),
        ("torchvision.datasets.FakeData", {"transform": "os.system"}, True),
        ("lightning.pytorch.demos.boring_classes.RandomDataset", {}, True),
        ("own_sets.Squares", {}, True),
    ],
)
def test_a_stranger_names_no_set_that_runs_code(
    path: str, options: dict[str, Any], refused: bool
) -> None:
    made = {"class_path": path, "init_args": options}
    data = {"class_path": "datamodules.TorchDatasetDataModule", "init_args": {"train": made}}
    config = {"model": {"class_path": "lit_models.LitClassifier"}, "data": data, "trainer": {}}
    if refused:
        with pytest.raises(UserError, match="add --trust"):
            admit(config, "x.ckpt")
    else:
        admit(config, "x.ckpt")


def test_the_configuration_of_the_page(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_dir / "MNIST", "data/FashionMNIST")  # of the same format
    [config] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("fashion.yaml").write_text(config)
    args = ["--config=fashion.yaml", "--run=first", "--test=true", "--data.val_size=20"]
    train.main(["fit", *args, *QUICK])
    predict.main(["runs/fashion/first"])
    saved = np.load("runs/fashion/first/submission.npz")
    assert saved["classes"][0] == "T-shirt/top"
    shutil.rmtree("data")  # a loaded model needs none of it
    grey = [Image.new("L", (28, 28), value) for value in (0, 255)]
    assert set(load("fashion/first").predict(grey).labels) <= set(saved["classes"])


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:.*have no `val_dataloader`",
)
def test_the_script_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--model.network.widths=[8,8,8]", "--trainer.limit_train_batches=4"]
    train.main(["fit", f"--config={CONFIGS / 'demo.yaml'}", "--run=first", *small, *QUICK])
    capsys.readouterr()
    [script] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(script, "docs/python.md", "exec"), {})
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("(500, 10)")
    assert 0.1 < float(last) <= 1
