"""The slow weights are what their formula says, and survive a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_classification import NUM_CLASSES, Points, model, trainer, weights
from torch import Tensor, nn

from callbacks import Lookahead


class History(Callback):
    """The weights behind every batch; stands before Lookahead, so what the optimizer left."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(pl_module.network.weight.detach().clone())


def test_every_few_steps_the_weights_are_pulled_back(tmp_path: Path) -> None:
    lit, before, after = model(), History(), History()
    [slow, _] = weights(lit)
    callbacks = [before, Lookahead(every=4, keep=0.5), after]
    trainer(tmp_path, max_epochs=1, callbacks=callbacks).fit(lit, Points())
    for step, (fast, left) in enumerate(zip(before.weights, after.weights, strict=True), 1):
        if step in (4, 8, 10):
            keep = {4: 0.5 * 0.4**3, 8: 0.5 * 0.8**3, 10: 1.0}[step]  # 10 steps in all
            slow = keep * slow + (1 - keep) * fast
            torch.testing.assert_close(left, slow)
        else:
            assert torch.equal(left, fast)


def test_running_averages_are_pulled_back_and_counters_are_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8)
    lit = model(nn.Sequential(norm, nn.Linear(8, NUM_CLASSES)))
    lookahead = Lookahead(every=3)
    trainer(tmp_path, max_epochs=1, callbacks=[lookahead]).fit(lit, Points())
    assert norm.running_mean is not None
    assert norm.num_batches_tracked == 10
    assert any(torch.equal(norm.running_mean, slow) for slow in lookahead.slow)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    lit, before, after = model(), History(), History()
    callbacks = [before, Lookahead(every=2, keep=0.9), after]
    options = {"max_epochs": 1, "accumulate_grad_batches": 2}
    trainer(tmp_path, callbacks=callbacks, **options).fit(lit, Points())
    pairs = zip(before.weights, after.weights, strict=True)
    pulled = [batch for batch, (fast, left) in enumerate(pairs) if not torch.equal(fast, left)]
    assert pulled == [3, 7, 9]  # optimizer steps 2 and 4, and 5, the last


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> list[Tensor]:
        lit = model()
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
        callbacks = [Lookahead(every=3, keep=0.9), checkpoint]
        run = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
        run.fit(lit, Points(), ckpt_path=ckpt_path, weights_only=True)
        return weights(lit)

    whole = fit()
    assert all(map(torch.equal, whole, fit(tmp_path / "step=7.ckpt")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1 step, got 0."),
        ({"keep": 1.0}, r"keep must be in \[0, 1\), got 1.0."),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Lookahead(**options)


def test_a_training_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Lookahead needs the length of training"):
        trainer(tmp_path, max_epochs=-1, callbacks=[Lookahead()]).fit(model(), Points())
