"""Data of the user's own in a plain Trainer: nothing of this project but the model."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import MLP

from core.errors import UserError
from datamodules import DigitsDataModule
from lit_models import LitClassifier, LitRegressor
from lit_models.base import LitModel
from lit_models.schedules import OneCycle

SGD = partial(torch.optim.SGD, lr=0.1)


def blobs(samples: int = 64) -> TensorDataset:
    """Points (N, 4) around two centres, which are the classes."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(samples) % 2
    return TensorDataset(torch.randn(samples, 4, generator=generator) + 4 * target[:, None], target)


def loader(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(blobs(), batch_size=16, shuffle=shuffle)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    usual: dict[str, Any] = {"max_epochs": 5, "logger": False, "enable_checkpointing": False}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, **usual | quiet | options)


def classifier(**options: Any) -> LitClassifier:
    torch.manual_seed(0)
    return LitClassifier(MLP(4, [16, 2]), SGD, num_classes=2, **options)


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:.*have no `val_dataloader`",
)


def test_every_stage_works_and_returns_its_values(tmp_path: Path) -> None:
    """fit ended with "'NoneType' object has no attribute ...", and test returned ``[{}]``."""
    model, trainer = classifier(), make_trainer(tmp_path)
    trainer.fit(model, loader(shuffle=True), loader())
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    [validated] = trainer.validate(model, loader(), verbose=False)
    [tested] = trainer.test(model, loader(), verbose=False)
    assert tested["test/accuracy"] == validated["val/accuracy"] > 0.9
    assert tested.keys() >= {"test/loss", "test/macro_f1"}
    batches: Any = trainer.predict(model, loader())
    targets, probabilities = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (probabilities.argmax(1) == targets).float().mean() == pytest.approx(
        tested["test/accuracy"]
    )
    points, _ = blobs().tensors
    for inputs in (TensorDataset(points), points):
        batches = trainer.predict(model, DataLoader(inputs, batch_size=16))  # type: ignore[arg-type]
        assert torch.equal(torch.cat([found for _, found in batches]), probabilities)
        assert all(ids is None for ids, _ in batches)


def test_a_schedule_is_as_long_as_the_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
    model = classifier(lr_scheduler=OneCycle)
    trainer.fit(model, loader(shuffle=True))
    [config] = trainer.lr_scheduler_configs
    assert config.scheduler.total_steps == trainer.global_step == 10  # type: ignore[union-attr]


def test_a_checkpoint_goes_on_and_is_loaded_as_lightning_has_it(tmp_path: Path) -> None:
    model, path = classifier(), tmp_path / "own.ckpt"
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    trainer.save_checkpoint(path)
    again = LitClassifier.load_from_checkpoint(
        path, network=MLP(4, [16, 2]), optimizer=SGD, num_classes=2
    )
    weights = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    with pytest.raises(UserError, match="carries no configuration"):
        LitClassifier.load_from_checkpoint(path)
    longer = make_trainer(tmp_path, max_epochs=6)
    longer.fit(again, loader(), ckpt_path=path)
    assert longer.global_step == 24
    other = make_trainer(tmp_path, logger=CSVLogger(tmp_path, version="test"))
    [tested] = other.test(again, loader(), ckpt_path=path, verbose=False)
    assert tested["step"] == 19  # the last of 20 steps, where the loggers have it


def test_layers_that_ask_for_data_are_shown_the_users(tmp_path: Path) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.register_buffer("mean", torch.zeros(4))

        def init_from_data(self, x: Tensor) -> None:
            self.mean = x.mean(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x - self.mean)

    network = Centred()
    make_trainer(tmp_path).fit(LitClassifier(network, SGD, num_classes=2), loader(shuffle=True))
    torch.testing.assert_close(network.mean, blobs().tensors[0].mean(0))


def test_a_data_module_of_somebody_else(tmp_path: Path) -> None:
    class Own(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

        val_dataloader = test_dataloader = train_dataloader

    model, trainer = classifier(), make_trainer(tmp_path)
    trainer.fit(model, Own())
    [tested] = trainer.test(model, Own(), verbose=False)
    assert tested["test/accuracy"] > 0.9
    with pytest.raises(UserError, match="has no data module"):
        model.predict(blobs().tensors[0])


def test_a_regression(tmp_path: Path) -> None:
    points, _ = blobs().tensors
    lines = DataLoader(TensorDataset(points, points.sum(1)), batch_size=16)
    model: LitModel = LitRegressor(nn.Linear(4, 1), partial(torch.optim.SGD, lr=0.01))
    trainer = make_trainer(tmp_path)
    trainer.fit(model, lines, lines)
    [tested] = trainer.test(model, lines, verbose=False)
    assert tested["test/r2"] > 0.5
    batches: Any = trainer.predict(model, lines)
    assert torch.cat([found for _, found in batches]).shape == (64, 1)
    with pytest.raises(UserError, match="has no classes"):
        model.predict(points)


def test_a_data_module_says_what_it_has_read() -> None:
    """``print(datamodule)`` ended with an error, as its loaders are none of torch's."""
    data = DigitsDataModule()
    assert str(data) == "DigitsDataModule: nothing read yet"
    data.setup("fit")
    assert str(data) == "DigitsDataModule: 1,000 train, 297 val"
