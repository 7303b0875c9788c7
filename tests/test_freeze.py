"""What is frozen stays, its gradient is not computed, and a resumed run knows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import by_two
from test_classification import NUM_CLASSES, Points, model, trainer, weights
from torch import Tensor, nn

from callbacks import Freeze


class Watch(Callback):
    """The first layer's weights before every batch, and whether its input was given a gradient."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(pl_module.network[0].weight.detach().clone())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, NUM_CLASSES))


def test_the_layer_learns_until_then_and_not_after(tmp_path: Path) -> None:
    net, watch = network(), Watch()
    lit = model(net)
    freeze = Freeze(["network.0"], from_epoch=1)
    trainer(tmp_path, max_epochs=2, callbacks=[freeze, watch]).fit(lit, Points())
    assert not torch.equal(watch.weights[8], watch.weights[9])
    assert torch.equal(watch.weights[10], watch.weights[19])
    assert torch.equal(weights(lit)[0], watch.weights[10])
    assert net[0].weight.requires_grad  # afterwards it is as it was


def test_no_gradient_is_computed_for_it(tmp_path: Path) -> None:
    needed: list[bool] = []
    net = network()
    net[0].register_forward_hook(lambda layer, inputs, output: needed.append(output.requires_grad))
    freeze = Freeze(["network.0"], from_epoch=1)
    trainer(tmp_path, max_epochs=2, callbacks=[freeze], limit_val_batches=0).fit(
        model(net), Points()
    )
    # the first is without gradient, to see whether network and data fit
    assert needed == [False] + [True] * 10 + [False] * 10


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("step", [5, 15])
def test_a_run_resumed_in_mid_epoch_ends_with_the_same_bits(step: int, tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> list[Tensor]:
        lit = model(network())
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        callbacks = [Freeze(["network.0"], from_epoch=1), checkpoint]
        run = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
        run.fit(lit, Points(), ckpt_path=ckpt_path, weights_only=True)
        return weights(lit)

    whole = fit()
    assert all(map(torch.equal, whole, fit(tmp_path / f"step={step}.ckpt")))


@pytest.mark.slow
def test_several_processes_drop_the_gradient(small: list[str], tmp_path: Path) -> None:
    """DistributedDataParallel waits for the gradient of every parameter that it knows."""
    freeze = ["--trainer.callbacks+=Freeze", "--trainer.callbacks.parameters=[network.groups.0]"]
    options = ["--trainer.callbacks.from_epoch=0", "--trainer.max_epochs=2", "--run=x"]
    devices = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    assert by_two("train", ["fit", *small, *freeze, *options, *devices], tmp_path) == 0
    path = tmp_path / "runs" / "cifar10_cpu" / "x" / "checkpoints" / "last.ckpt"
    trained = torch.load(path, weights_only=True)["state_dict"]
    first, second = (trained[f"network.groups.{i}.0.weight"] for i in (0, 1))
    assert torch.equal(first, nn.init.dirac_(torch.empty_like(first)))  # as it started
    assert not torch.equal(second, nn.init.dirac_(torch.empty_like(second)))


@pytest.mark.parametrize(
    ("parameters", "from_epoch", "message"),
    [
        (["network.0"], -1, "from_epoch must not be negative, got -1."),
        (["whiten"], 0, "no parameter's name begins with 'whiten'; there are network.0.weight"),
    ],
)
def test_what_cannot_be_is_refused(
    parameters: list[str], from_epoch: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, max_epochs=1, callbacks=[Freeze(parameters, from_epoch)]).fit(
            model(network()), Points()
        )
