"""Between log steps the training loop reads nothing from the device and adds few operators."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.step_overhead import Meter, RandomImages, Task, raw_loop, steadyfit
from lit_models import LitClassifier
from lit_models.networks import LeNet5

LENET = Task(LeNet5, RandomImages, batch_size=4)  # the counts do not depend on the batch size


class Reading(LitClassifier):
    """What nobody should do."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss.item() > 0
        return loss


def metered(train: Callable[..., None], folder: Path, steps: int = 101) -> Meter:
    """Some steps of LeNet; the defaults log after step 50 and step 100."""
    meter = Meter()
    with meter.counting():
        train(LENET, steps, meter, folder)
    assert len(meter.marks) == steps
    return meter


@pytest.mark.slow
def test_a_step_as_shipped_reads_nothing_and_adds_few_operators(tmp_path: Path) -> None:
    ours, raw = metered(steadyfit, tmp_path), metered(raw_loop, tmp_path)
    assert ours.per_step(5, 45).reads == 0  # between log steps
    # of the fifty steps of a window: one for the losses, one for the monitor
    assert ours.marks[95].reads - ours.marks[45].reads == 2
    assert raw.per_step(45, 95).reads == 0
    overhead = ours.per_step(45, 95).operators - raw.per_step(45, 95).operators
    assert 0 < overhead <= 80


@pytest.mark.slow
def test_a_read_in_the_training_step_is_seen(tmp_path: Path) -> None:
    meter = metered(partial(steadyfit, lit_model=Reading), tmp_path, steps=51)
    assert meter.per_step(5, 45).reads == 1


@pytest.mark.parametrize(
    "read",
    [
        Tensor.item,
        float,
        lambda x: bool(x > 0),
        Tensor.tolist,
        Tensor.cpu,
        Tensor.numpy,
        Tensor.nonzero,
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
    ],
)
def test_every_way_to_read_is_counted(read: Callable[[Tensor], object]) -> None:
    meter = Meter()
    x = torch.ones(1)
    with meter.counting():
        read(x)
    assert meter.reads == 1


def test_operators_of_both_passes_are_counted() -> None:
    meter = Meter()
    layer, x = nn.Linear(3, 1, bias=False), torch.ones(2, 3)
    with meter.counting():
        loss = layer(x).sum()
        forward = meter.operators
        loss.backward()
    assert forward == 3  # transpose, multiply, sum
    assert meter.operators > forward
    assert meter.reads == 0
