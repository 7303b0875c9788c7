"""What a clipper does is what its formula says; where it does not act, nothing is different."""

import copy
import gc
import itertools
import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from small_training import (
    FIRST,
    LAST,
    Batches,
    Each,
    Plain,
    Plant,
    column,
    fit,
    same,
    scaled,
    snapshot,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from callbacks import GradientSpikeMonitor, UpdateClipping
from steadyfit import SpikeMonitor, clip_updates
from steadyfit.layout import Layout
from steadyfit.probe import StepProbe


class Groups(Plain):
    """Two layers with learning rates and weight decays of their own."""

    def configure_optimizers(self) -> Optimizer:
        first, last = self.network[0], self.network[2]
        groups = [
            {"params": first.parameters(), "lr": 0.02, "weight_decay": 0.3},
            {"params": last.parameters(), "lr": 0.002},
        ]
        return self.optimizer(groups)


class Matrices(Plain):
    """Muon takes nothing but matrices."""

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer([p for p in self.parameters() if p.ndim == 2])


MODELS: dict[str, Callable[[], Plain]] = {
    "SGD": partial(Plain, partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "RMSprop": partial(Plain, partial(RMSprop, lr=0.01)),
    "Adam": partial(Plain, partial(Adam, lr=0.01, weight_decay=0.01)),
    "AdamW": partial(Plain, partial(AdamW, lr=0.01, weight_decay=0.5)),
    "fused AdamW": partial(Plain, partial(AdamW, lr=0.01, weight_decay=0.5, fused=True)),
    "Muon": partial(Matrices, partial(torch.optim.Muon, lr=0.01, weight_decay=0.5)),
    "groups": partial(Groups, partial(AdamW, lr=0.01)),
}
each_optimizer = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


class Steps(Callback):
    """Keeps parameters and gradients around every step, in front of or behind the clippers."""

    def __init__(self) -> None:
        self.before: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.before.append([p.detach().clone() for p in params])
        self.gradients.append(
            [torch.zeros(()) if p.grad is None else p.grad.clone() for p in params]
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if len(self.after) < len(self.before):
            groups = trainer.optimizers[0].param_groups
            self.after.append([p.detach().clone() for group in groups for p in group["params"]])


def ends(folder: Path, model: LightningModule, *callbacks: Callback, **options: Any) -> Any:
    return snapshot(fit(folder, model, *callbacks, **options), model)


def train(
    model: Plain,
    watch: Callable[[Optimizer], Any] | None = None,
    dtype: torch.dtype = torch.float32,
    decay: float = 1.0,
) -> Any:
    """Train for an epoch in a plain loop.

    Args:
        model: What is trained.
        watch: Given the optimizer, makes a limit or a monitor of it.
        dtype: Of parameters and inputs.
        decay: Factor of the learning rate after each step.

    Returns:
        Parameters before and after each step, state at the end, and the optimizer.
    """
    optimizer: Optimizer = model.to(dtype).configure_optimizers()
    watcher = watch(optimizer) if watch else None
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = []
    for x, target in Batches():
        loss = model.loss((x.to(dtype), target))
        optimizer.zero_grad()
        loss.backward()
        if isinstance(watcher, SpikeMonitor):
            watcher.before_step(loss)
        elif watcher:
            watcher.loss = loss
        before = [p.detach().clone() for p in params]
        optimizer.step()
        found.append((before, [p.detach().clone() for p in params]))
        for group in optimizer.param_groups:
            group["lr"] *= decay
    return found, copy.deepcopy(optimizer.state_dict()["state"]), optimizer


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


# Update clipping


@each_optimizer
@pytest.mark.parametrize("on_host", [True, False])
def test_limits_that_are_not_reached_change_no_bit(
    on_host: bool, make: Callable[[], Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout, "on_host", on_host)
    *without, _ = train(make())
    *loose, optimizer = train(make(), partial(clip_updates, max_rms=1e9, max_decrease=1e9))
    assert same(loose, without)
    assert StepProbe.of(optimizer).update.factors is not None
    model = make()
    *watched, _ = train(model, partial(SpikeMonitor, model))
    assert same(watched, without)


def test_a_callback_that_does_not_act_changes_no_bit(tmp_path: Path) -> None:
    without = ends(tmp_path / "a", Plain())
    loose = UpdateClipping(max_rms=1e9, max_decrease=1e9)
    assert same(ends(tmp_path / "b", Plain(), GradientSpikeMonitor(), loose), without)
    assert (loose.steps, loose.acted) == (60, 0)


@each_optimizer
def test_no_update_is_larger_than_the_limit(make: Callable[[], Plain]) -> None:
    """Of each tensor; what decoupled decay takes is not a part of it and not touched."""
    steps, _, optimizer = train(make(), partial(clip_updates, max_rms=0.02))
    is_muon = isinstance(optimizer, torch.optim.Muon)
    rates: list[tuple[float, float]] = []
    for group in optimizer.param_groups:
        decoupled = group.get("decoupled_weight_decay", is_muon)
        decay = group["lr"] * group["weight_decay"] if decoupled else 0.0
        rates += [(group["lr"], decay)] * len(group["params"])
    sizes = [
        rms(new.double() - old.double() * (1 - decay)) / lr
        for before, after in steps
        for old, new, (lr, decay) in zip(before, after, rates, strict=True)
    ]
    assert max(sizes) == pytest.approx(0.02, rel=1e-3)


def test_clipped_adamw_is_the_reference(tmp_path: Path) -> None:
    """AdamW with the update clipping of StableAdamW, written out."""
    lr, (b1, b2), eps, decay, limit = 0.01, (0.9, 0.999), 1e-8, 0.5, 0.6
    reference = Plain()
    params = list(reference.parameters())
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    step = 0
    for _ in range(3):
        for batch in Batches():
            step += 1
            grads = torch.autograd.grad(reference.loss(batch), params)
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                m[i] = b1 * m[i] + (1 - b1) * g
                v[i] = b2 * v[i] + (1 - b2) * g * g
                u = m[i] / (1 - b1**step) / ((v[i] / (1 - b2**step)).sqrt() + eps)
                u = u / max(1.0, rms(u) / limit)
                p.data = p.data - lr * decay * p.data - lr * u
    model = Plain(partial(AdamW, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay))
    clipping = UpdateClipping(max_rms=limit)
    fit(tmp_path, model, clipping)
    assert clipping.acted > 10
    for ours, theirs in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def promises(seen: Steps) -> list[float]:
    """What each step promised to take off the loss, to first order."""
    return [
        -sum(float((g * (new - old)).double().sum()) for g, old, new in zip(*step, strict=True))
        for step in zip(seen.gradients, seen.before, seen.after, strict=True)
    ]


class Losses(Callback):
    """The loss of each optimizer step, from the batches themselves."""

    def __init__(self) -> None:
        self.parts: list[list[float]] = [[]]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches  # Lightning has divided it
        self.parts[-1].append(loss)
        if trainer.global_step == len(self.parts):
            self.parts.append([])

    def means(self) -> list[float]:
        return [sum(part) / len(part) for part in self.parts[:-1]]


@pytest.mark.parametrize("kind", ["plain", "accumulated", "scaled", "fused and scaled"])
def test_no_step_promises_more_than_a_share_of_the_loss(kind: str, tmp_path: Path) -> None:
    model = Plain(partial(Adam, lr=0.002, fused=kind.startswith("fused")))
    options: dict[str, Any] = {"plugins": scaled(64.0)} if "scaled" in kind else {}
    if kind == "accumulated":
        model.train_dataloader = partial(Batches, 8, 80)  # type: ignore[method-assign]
        options = {"accumulate_grad_batches": 4}
    seen, losses, clipping = Steps(), Losses(), UpdateClipping(None, max_decrease=0.008)
    fit(tmp_path, model, seen, clipping, losses, **options)
    scale = 64.0 if kind.startswith("fused") else 1.0  # Steps looks before the optimizer unscales
    shares = [p / scale / x for p, x in zip(promises(seen), losses.means(), strict=True)]
    precision = 0.01 if "scaled" in kind else 1e-3
    assert max(shares) == pytest.approx(0.008, rel=precision)
    assert 0 < clipping.acted < 60


def test_both_limits(tmp_path: Path) -> None:
    """The second is applied to what the first leaves: all tensors by the same factor."""
    model, seen, losses = Plain(partial(Adam, lr=0.05)), Steps(), Losses()
    fit(tmp_path, model, seen, UpdateClipping(0.5, max_decrease=0.02), losses)
    for before, after in zip(seen.before, seen.after, strict=True):
        assert all(rms(b - a) <= 0.5 * 0.05 * 1.0001 for a, b in zip(before, after, strict=True))
    shares = [p / x for p, x in zip(promises(seen), losses.means(), strict=True)]
    assert max(shares) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_numbers_and_tensors_limit_alike(
    make: Callable[[], Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few parameters in main memory are limited in plain numbers, all others on the device."""
    found = []
    for on_host in (True, False):
        monkeypatch.setattr(Layout, "on_host", on_host)
        torch.manual_seed(0)
        model = make()
        optimizer = model.configure_optimizers()
        limit = clip_updates(optimizer, max_rms=0.3, max_decrease=0.01, floor="auto", model=model)
        generator = torch.Generator().manual_seed(1)
        factors: list[Any] = []
        for _ in range(20):
            optimizer.zero_grad()
            x = torch.randn(16, 8, generator=generator)
            limit.loss = loss = model.network(x).square().mean()
            loss.backward()
            optimizer.step()
            factors.append(StepProbe.of(optimizer).update.factors)
        found.append((factors, list(model.parameters())))
    assert any(min(each) < 1 for each in found[0][0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_negative_loss_is_no_limit() -> None:
    """A loss that can fall below zero says nothing about how far it can fall."""

    class Shifted(Plain):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) - 10

    models = [Shifted(partial(Adam, lr=0.05)) for _ in range(2)]
    *without, _ = train(models[0])
    *limited, _ = train(models[1], partial(clip_updates, max_rms=None, max_decrease=0.001))
    assert same(limited, without)


def test_parameter_without_gradient_stays(tmp_path: Path) -> None:
    """Nor does decay touch it, which is not the optimizer's doing either."""
    values = []

    class NowAndThen(Plain):
        def __init__(self) -> None:
            super().__init__(partial(AdamW, lr=0.1, weight_decay=5.0))
            self.used = nn.Parameter(torch.full((3,), 100.0))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            values.append(self.used.tolist())
            return self.loss(batch) + (self.used.mean() / 100 if batch_idx % 3 == 0 else 0)

    fit(tmp_path, NowAndThen(), UpdateClipping(max_rms=0.3, max_decrease=0.1))
    moved = [before != after for before, after in itertools.pairwise(values[:20])]
    assert moved == [index % 3 == 0 for index in range(19)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_in_other_formats(dtype: torch.dtype) -> None:
    """The limit holds as far as the format can tell, and loose limits still change no bit."""
    make = partial(Plain, partial(SGD, lr=0.5))
    tight, _, _ = train(make(), partial(clip_updates, max_rms=0.02, max_decrease=0.5), dtype)
    epsilon = torch.finfo(dtype).eps
    for before, after in tight:
        for old, new in zip(before, after, strict=True):
            rounding = epsilon * new.double().abs().max().item()
            assert rms(new.double() - old.double()) <= 0.02 * 0.5 * (1 + 2 * epsilon) + rounding
    *without, _ = train(make(), None, dtype)
    assert not same(tight, without[0])
    *loose, _ = train(make(), partial(clip_updates, max_rms=1e9, max_decrease=1e9), dtype)
    assert same(loose, without)


def test_learning_rate_of_zero() -> None:
    model = Plain(partial(SGD, lr=0.0))
    start = [p.detach().clone() for p in model.parameters()]
    _, _, optimizer = train(model, partial(clip_updates, max_rms=1.0, max_decrease=0.5))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    factors = StepProbe.of(optimizer).update.factors
    assert factors is not None
    assert min(factors) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float, tmp_path: Path) -> None:
    """Clipping is no repair: a parameter that NaN reaches is NaN, as without it."""
    model = Plain()
    fit(tmp_path, model, Plant([30], LAST, bad), UpdateClipping(1.0, 0.5), max_steps=31)
    assert not model.get_parameter(LAST).isfinite().any()
    assert model.get_parameter(FIRST).isfinite().all()


def test_schedule_of_the_learning_rate_is_followed() -> None:
    model = Plain(partial(Adam, lr=0.01))
    steps, _, _ = train(model, partial(clip_updates, max_rms=0.1), decay=0.9)
    for step, (before, after) in enumerate(steps):
        limit = 0.1 * 0.01 * 0.9**step
        assert max(rms(b - a) for a, b in zip(before, after, strict=True)) <= limit + 1e-8


def test_clipping_under_a_gradient_scaler_is_that_without(tmp_path: Path) -> None:
    """Whether the scale is 1 or 1024, and whoever unscales."""
    found = []
    for scale, fused in ((1.0, False), (1024.0, False), (1024.0, True)):
        model = Plain(partial(Adam, lr=0.01, fused=fused))
        callbacks = [Plant([40]), GradientSpikeMonitor(), UpdateClipping()]
        trainer = fit(tmp_path / f"{scale}{fused}", model, *callbacks, plugins=scaled(scale))
        found.append(column(trainer, "update_norm/clipped"))
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[2] == pytest.approx(found[0], rel=0.02)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_clipping_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """State, weights and optimizer, bit for bit; the state is read without pickle."""

    def run(name: str, **options: Any) -> Any:
        model, clipping = Plain(partial(Adam, lr=0.01)), UpdateClipping(0.3, 0.1, floor="auto")
        save = ModelCheckpoint(tmp_path / name, "{epoch}", every_n_epochs=1, save_top_k=-1)
        plant = Plant([15, 25, 45])
        trainer = fit(tmp_path / name, model, plant, clipping, save, **options)
        return clipping.state_dict(), snapshot(trainer, model)

    whole = run("whole")
    run("again", max_epochs=2)
    assert same(run("again", ckpt_path=tmp_path / "again" / "epoch=0.ckpt"), whole)
    assert whole[0]["steps"] == 60


# Together


def test_callbacks_share_one_copy_of_the_parameters(tmp_path: Path) -> None:
    probes: list[list[StepProbe]] = []
    copies: list[int] = []

    def look(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        probe = StepProbe.of(optimizer)
        if not probes:
            copy = probe.copy

            def counted() -> None:
                copies.append(trainer.global_step)
                copy()

            probe.copy = counted  # type: ignore[method-assign]
        probes.append([probe, StepProbe.of(trainer.optimizers[0])])

    callbacks = [Each(look), GradientSpikeMonitor(), UpdateClipping(), UpdateClipping(None, 0.5)]
    callbacks[-1].__class__ = type("Second", (UpdateClipping,), {})  # Lightning asks for one each
    fit(tmp_path, Plain(), *callbacks)
    assert len({id(probe) for pair in probes for probe in pair}) == 1
    assert copies == list(range(60))


def test_share_of_steps_is_said_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, Plain(partial(SGD, lr=0.01)), UpdateClipping(max_rms=1e-6))
    assert "UpdateClipping acted in 100.0% of the steps." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(UpdateClipping, 0.0), "max_rms must be positive, got 0.0; use None for no limit."),
        (partial(UpdateClipping, 1.0, -1.0), "max_decrease must be positive, got -1.0; use None"),
        (partial(UpdateClipping, math.nan), "max_rms must be positive, got nan"),
        (partial(UpdateClipping, None), "there is no limit; set max_rms, max_decrease"),
    ],
)
def test_wrong_argument(make: Callable[[], Callback], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        make()


def test_an_optimizer_that_overwrites_its_gradients_is_refused(tmp_path: Path) -> None:
    """Nesterov's momentum is added to the gradients in place, where SGD works on lists of them."""
    module = Plain(partial(SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True))
    with pytest.raises(ValueError, match="set foreach to False"):
        fit(tmp_path, module, UpdateClipping(max_decrease=0.1))
    kept = Plain(partial(SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=False))
    fit(tmp_path, kept, UpdateClipping(max_decrease=0.1))


def test_a_finished_training_leaves_nothing_in_memory(tmp_path: Path) -> None:
    """A table of probes once kept trainer, model and optimizer alive for ever."""
    module = Plain()
    fit(tmp_path, module, GradientSpikeMonitor(), UpdateClipping())
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None
