"""What a clipper does is what its formula says; where it does not act, nothing is different."""

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
from test_gradient_spikes import (
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

from callbacks.clipping import AdaptiveGradientClipping, GradientNormClipping, UpdateClipping
from callbacks.gradient_spikes import GradientSpikeMonitor
from steadyfit import clip_updates
from steadyfit.layout import Layout
from steadyfit.lightning import Clipping
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


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


# Update clipping


@each_optimizer
@pytest.mark.parametrize("on_host", [True, False])
def test_limits_that_are_not_reached_change_no_bit(
    on_host: bool, make: Callable[[], Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout, "on_host", on_host)
    without = ends(tmp_path / "a", make())
    loose = UpdateClipping(max_rms=1e9, max_decrease=1e9)
    assert same(ends(tmp_path / "b", make(), loose), without)
    assert (loose.steps, loose.acted) == (60, 0)
    assert same(ends(tmp_path / "c", make(), GradientSpikeMonitor()), without)


@each_optimizer
def test_no_update_is_larger_than_the_limit(make: Callable[[], Plain], tmp_path: Path) -> None:
    """Of each tensor; what decoupled decay takes is not a part of it and not touched."""
    model, seen, clipping = make(), Steps(), UpdateClipping(max_rms=0.02)
    trainer = fit(tmp_path, model, seen, clipping)
    rates: list[tuple[float, float]] = []
    for group in trainer.optimizers[0].param_groups:
        decoupled = group.get(
            "decoupled_weight_decay", isinstance(trainer.optimizers[0], torch.optim.Muon)
        )
        decay = group["lr"] * group["weight_decay"] if decoupled else 0.0
        rates += [(group["lr"], decay)] * len(group["params"])
    sizes = []
    for before, after in zip(seen.before, seen.after, strict=True):
        for old, new, (lr, decay) in zip(before, after, rates, strict=True):
            sizes.append(rms(new.double() - old.double() * (1 - decay)) / lr)
    assert max(sizes) <= 0.02 * (1 + 1e-3)
    assert clipping.acted > 10


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


def test_negative_loss_is_no_limit(tmp_path: Path) -> None:
    """A loss that can fall below zero says nothing about how far it can fall."""

    class Shifted(Plain):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) - 10

    models = [Shifted(partial(Adam, lr=0.05)) for _ in range(2)]
    clipping = UpdateClipping(None, max_decrease=0.001)
    without = ends(tmp_path / "a", models[0])
    assert same(ends(tmp_path / "b", models[1], clipping), without)
    assert clipping.acted == 0


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


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_parameters_in_other_formats(precision: Any, tmp_path: Path) -> None:
    """The limit holds as far as the format can tell, and loose limits still change no bit."""
    make = partial(Plain, partial(SGD, lr=0.5))
    seen, tight = Steps(), UpdateClipping(max_rms=0.02, max_decrease=0.5)
    fit(tmp_path / "a", make(), seen, tight, precision=precision)
    (epsilon,) = {torch.finfo(p.dtype).eps for p in seen.after[0]}
    for before, after in zip(seen.before, seen.after, strict=True):
        for old, new in zip(before, after, strict=True):
            rounding = epsilon * new.double().abs().max().item()
            assert rms(new.double() - old.double()) <= 0.02 * 0.5 * (1 + 2 * epsilon) + rounding
    assert tight.acted > 10
    loose = UpdateClipping(1e9, 1e9)
    without = ends(tmp_path / "b", make(), precision=precision)
    assert same(ends(tmp_path / "c", make(), loose, precision=precision), without)


def test_learning_rate_of_zero(tmp_path: Path) -> None:
    model = Plain(partial(SGD, lr=0.0))
    start = [p.detach().clone() for p in model.parameters()]
    clipping = UpdateClipping(1.0, 0.5)
    fit(tmp_path, model, clipping)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert clipping.acted == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float, tmp_path: Path) -> None:
    """Clipping is no repair: a parameter that NaN reaches is NaN, as without it."""
    model = Plain()
    fit(tmp_path, model, Plant([30], LAST, bad), UpdateClipping(1.0, 0.5), max_steps=31)
    assert not model.get_parameter(LAST).isfinite().any()
    assert model.get_parameter(FIRST).isfinite().all()


def test_schedule_of_the_learning_rate_is_followed(tmp_path: Path) -> None:
    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    seen = Steps()
    fit(tmp_path, Scheduled(partial(Adam, lr=0.01)), seen, UpdateClipping(max_rms=0.1))
    for step, (before, after) in enumerate(zip(seen.before, seen.after, strict=True)):
        limit = 0.1 * 0.01 * 0.9**step
        assert max(rms(b - a) for a, b in zip(before, after, strict=True)) <= limit + 1e-8


# Clipping gradients


class Spiky(Callback):
    """Multiplies all gradients of a step by a number of its own."""

    FACTORS = (
        [1.0] * 30 + [20.0, 1.0, 1.0, math.nan, 1.0, 5.0, math.inf, 1.0, 0.1, 100.0] + [1.0] * 20
    )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        for parameter in pl_module.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(self.FACTORS[trainer.global_step])


def zclip(norms: list[float], warm_up: int, decay: float, max_norm: float) -> list[float]:
    """The norms after clipping, as arXiv:2504.02507 has it in section 3; NaN is passed over."""
    seen: list[float] = []
    used: list[float] = []
    mean = variance = 0.0
    for norm in norms:
        clipped = norm
        if math.isfinite(norm):
            if len(seen) < warm_up:
                clipped = min(norm, max_norm)
                seen.append(clipped)
                mean = sum(seen) / len(seen)
                variance = sum((x - mean) ** 2 for x in seen) / len(seen)
            else:
                std = math.sqrt(max(variance, 1e-12))  # all may have been clipped
                z = (norm - mean) / std
                if z > 2.5:
                    clipped = mean + 2.5 * std * 2.5 / z
                clipped = min(clipped, max_norm)
                old = mean
                mean = decay * mean + (1 - decay) * clipped
                variance = decay * variance + (1 - decay) * decay * (clipped - old) ** 2
        used.append(clipped)
    return used


def autoclip(norms: list[float], percentile: float, history: int) -> list[float]:
    """The norms after clipping, as arXiv:2007.14469 has it in section 3; NaN is passed over."""
    seen: list[float] = []
    used = []
    for norm in norms:
        if math.isfinite(norm):
            seen = [*seen, norm][-history:]
            ordered = sorted(seen)
            place = percentile / 100 * (len(ordered) - 1)
            low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
            limit = low + (high - low) * (place - math.floor(place))
            used.append(min(norm, limit))
        else:
            used.append(norm)
    return used


RULES: list[tuple[dict[str, Any], Callable[[list[float]], list[float]]]] = [
    (
        {"rule": "zclip", "warm_up": 10, "max_norm": None, "decay": 0.9},
        partial(zclip, warm_up=10, decay=0.9, max_norm=math.inf),
    ),
    ({"rule": "zclip", "max_norm": 0.2}, partial(zclip, warm_up=25, decay=0.97, max_norm=0.2)),
    ({"rule": "autoclip"}, partial(autoclip, percentile=10, history=1000)),
    (
        {"rule": "autoclip", "percentile": 60, "history": 7},
        partial(autoclip, percentile=60, history=7),
    ),
]


@pytest.mark.parametrize(("arguments", "reference"), RULES)
def test_norms_are_clipped_by_the_rule(
    arguments: dict[str, Any], reference: Callable[[list[float]], list[float]], tmp_path: Path
) -> None:
    def leave_out(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        if not all(p.grad is None or p.grad.isfinite().all() for p in module.parameters()):
            optimizer.zero_grad()  # NaN has been seen by the clipper and stays out of the weights

    model, clipping = Plain(), GradientNormClipping(**arguments)
    callbacks = [Spiky(), GradientSpikeMonitor(), clipping, Each(leave_out)]
    trainer = fit(tmp_path, model, *callbacks)
    before, after = (column(trainer, f"grad_norm/{name}") for name in ("total", "clipped"))
    assert [i for i, norm in enumerate(before) if not math.isfinite(norm)] == [33, 36]
    expected = [norm if math.isfinite(norm) else 0.0 for norm in reference(before)]
    assert after == pytest.approx(expected, rel=1e-3)
    factors = column(trainer, "clip/gradient_factor")
    assert sum(f < 1 for f in factors) == clipping.acted > 0
    assert clipping.steps == 60


@pytest.mark.parametrize("callback", [partial(GradientNormClipping, max_norm=None), UpdateClipping])
def test_clipping_under_a_gradient_scaler_is_that_without(
    callback: Callable[[], Callback], tmp_path: Path
) -> None:
    """Whether the scale is 1 or 1024, and whoever unscales."""
    found = []
    for scale, fused in ((1.0, False), (1024.0, False), (1024.0, True)):
        model = Plain(partial(Adam, lr=0.01, fused=fused))
        callbacks = [Plant([40]), GradientSpikeMonitor(), callback()]
        folder = tmp_path / f"{scale}{fused}"
        trainer = fit(folder, model, *callbacks, plugins=scaled(scale))
        found.append(column(trainer, "grad_norm/clipped"))
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[2] == pytest.approx(found[0], rel=0.02)


def test_agc_under_a_gradient_scaler(tmp_path: Path) -> None:
    found = []
    for scale, fused in ((1.0, False), (1024.0, True)):
        model = Plain(partial(Adam, lr=0.01, fused=fused))
        callbacks = [GradientSpikeMonitor(), AdaptiveGradientClipping(0.01)]
        trainer = fit(tmp_path / str(fused), model, *callbacks, plugins=scaled(scale))
        found.append(column(trainer, "grad_norm/clipped"))
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_agc_is_the_reference_and_leaves_the_last_layer_alone(tmp_path: Path) -> None:
    """Unit by unit: rows of a weight matrix, all inputs of a filter, a whole bias."""

    class Convolved(Plain):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4)]
            self.network = nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 2))

    model, before, after = Convolved(), Steps(), Steps()
    fit(tmp_path, model, before, AdaptiveGradientClipping(0.02), after)
    names = [name for name, _ in model.named_parameters()]
    acted = 0
    for weights, given, left in zip(before.before, before.gradients, after.gradients, strict=True):
        for name, weight, gradient, result in zip(names, weights, given, left, strict=True):
            if name.startswith("network.5"):
                assert torch.equal(result, gradient)
                continue
            units = len(weight) if weight.ndim > 1 else 1
            rows = zip(*(x.reshape(units, -1) for x in (weight, gradient, result)), strict=True)
            for w, g, r in rows:
                allowed = 0.02 * max(w.norm().item(), 1e-3)
                factor = min(1.0, allowed / g.norm().item())
                torch.testing.assert_close(r, g * factor, rtol=1e-4, atol=1e-9)
                acted += factor < 1
    assert acted > 10


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "make",
    [
        partial(GradientNormClipping, "zclip", max_norm=None),
        partial(GradientNormClipping, "autoclip"),
        partial(AdaptiveGradientClipping, 0.02),
        partial(UpdateClipping, 0.3, 0.1),
    ],
    ids=["zclip", "autoclip", "agc", "update"],
)
def test_resumed_clipping_is_the_uninterrupted_one(
    make: Callable[[], Clipping], tmp_path: Path
) -> None:
    """State, weights and optimizer, bit for bit; the state is read without pickle."""

    def run(name: str, **options: Any) -> Any:
        model, clipping = Plain(partial(Adam, lr=0.01)), make()
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


def test_monitor_in_front_sees_both_norms(tmp_path: Path) -> None:
    """The clipper's factor is what lies between them."""
    model = Plain(partial(SGD, lr=0.01))
    clipping = GradientNormClipping(max_norm=0.1)
    trainer = fit(tmp_path, model, GradientSpikeMonitor(), clipping)
    before, after = (column(trainer, f"grad_norm/{name}") for name in ("total", "clipped"))
    factors = column(trainer, "clip/gradient_factor")
    assert after == pytest.approx([b * f for b, f in zip(before, factors, strict=True)], rel=1e-5)
    assert max(after) <= 0.1 * 1.00001 < min(before)


def test_share_of_steps_is_said_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, Plain(partial(SGD, lr=0.01)), GradientNormClipping(max_norm=1e-3))
    assert "GradientNormClipping acted in 100.0% of the steps." in capsys.readouterr().out


@pytest.mark.parametrize("first", [GradientNormClipping, AdaptiveGradientClipping])
def test_clipping_twice_is_a_warning(first: Callable[[], Callback], tmp_path: Path) -> None:
    name = type(first()).__name__
    with pytest.warns(UserWarning, match=f"{name} and gradient_clip_val both clip the gradients"):
        fit(tmp_path, Plain(), first(), gradient_clip_val=1.0)
    with pytest.warns(UserWarning, match="both clip the gradients; leave one out."):
        fit(tmp_path, Plain(), GradientNormClipping(), AdaptiveGradientClipping())
    fit(tmp_path, Plain(), UpdateClipping(), gradient_clip_val=1.0)  # another thing: no warning


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(UpdateClipping, 0.0), "max_rms must be positive, got 0.0; use None for no limit."),
        (partial(UpdateClipping, 1.0, -1.0), "max_decrease must be positive, got -1.0; use None"),
        (partial(UpdateClipping, math.nan), "max_rms must be positive, got nan"),
        (partial(UpdateClipping, None), "there is no limit; set max_rms, max_decrease"),
        (
            partial(GradientNormClipping, "norm"),  # type: ignore[arg-type]
            "rule must be one of zclip, autoclip, got 'norm'.",
        ),
        (partial(GradientNormClipping, max_norm=0.0), "max_norm must be positive, got 0.0"),
        (partial(GradientNormClipping, warm_up=0), "warm_up must be at least 1, got 0."),
        (partial(GradientNormClipping, history=0), "history must be at least 1, got 0."),
        (partial(GradientNormClipping, decay=1.0), r"decay must be in \(0, 1\), got 1.0."),
        (
            partial(GradientNormClipping, percentile=0.0),
            r"percentile must be in \(0, 100\], got 0.0.",
        ),
        (partial(AdaptiveGradientClipping, 0.0), "clipping must be positive, got 0.0."),
        (partial(AdaptiveGradientClipping, eps=0.0), "eps must be positive, got 0.0."),
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
