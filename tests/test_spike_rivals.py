"""Remedies of others do what their papers say, each beside a reference of a few lines."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.spike_rivals import (
    AGC,
    SPAM,
    AdaGC,
    AutoClip,
    StableAdamW,
    ZClip,
    total_norm,
)


def gradients(steps: int, scales: tuple[float, ...] = (1.0, 3.0)) -> list[list[Tensor]]:
    """Random gradients (6,) of two tensors, every seventh forty times as large."""
    torch.manual_seed(0)
    return [[s * torch.randn(6) * (40 if t % 7 == 6 else 1) for s in scales] for t in range(steps)]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))]


def test_adagc_bounds_each_tensor_by_its_own_average() -> None:
    params, rule = parameters(), AdaGC(warm_up=4)
    averages = [math.inf, math.inf]
    for t, given in enumerate(gradients(20)):
        total = math.sqrt(sum(float(g.norm()) ** 2 for g in given))
        for i, (p, g) in enumerate(zip(params, given, strict=True)):
            p.grad = g.clone()
            if t < 4:
                factor = min(1.0, 1 / total)
                averages[i] = min(averages[i], factor * float(g.norm()))
            else:
                factor = min(1.0, 1.05 * averages[i] / float(g.norm()))
                averages[i] = 0.98 * averages[i] + 0.02 * factor * float(g.norm())
            given[i] = factor * g
        rule.clip(params)
        for p, expected in zip(params, given, strict=True):
            torch.testing.assert_close(p.grad, expected)
    assert rule.averages is not None
    torch.testing.assert_close(rule.averages.tolist(), averages)


def zclip(norms: list[float], warm_up: int, decay: float, max_norm: float) -> list[float]:
    """The norms after clipping, as arXiv:2504.02507 has it in section 3."""
    seen: list[float] = []
    used: list[float] = []
    mean = variance = 0.0
    for norm in norms:
        clipped = min(norm, max_norm)
        if len(seen) < warm_up:
            seen.append(clipped)
            mean = sum(seen) / len(seen)
            variance = sum((x - mean) ** 2 for x in seen) / len(seen)
        else:
            std = math.sqrt(max(variance, 1e-12))  # all may have been clipped
            z = (norm - mean) / std
            if z > 2.5:
                clipped = min(mean + 2.5 * std * 2.5 / z, max_norm)
            old = mean
            mean = decay * mean + (1 - decay) * clipped
            variance = decay * variance + (1 - decay) * decay * (clipped - old) ** 2
        used.append(clipped)
    return used


def autoclip(norms: list[float], percentile: float, history: int) -> list[float]:
    """The norms after clipping, as arXiv:2007.14469 has it in section 3."""
    used = []
    for end in range(1, len(norms) + 1):
        ordered = sorted(norms[:end][-history:])
        place = percentile / 100 * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        used.append(min(norms[end - 1], low + (high - low) * (place - math.floor(place))))
    return used


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (ZClip(5.0, warm_up=6), partial(zclip, warm_up=6, decay=0.97, max_norm=5.0)),
        (ZClip(math.inf, warm_up=9, decay=0.9), partial(zclip, warm_up=9, decay=0.9, max_norm=9e9)),
        (AutoClip(60, history=7), partial(autoclip, percentile=60, history=7)),
    ],
    ids=["zclip", "zclip without a largest norm", "autoclip"],
)
def test_norms_are_clipped_by_the_rule(rule: Any, reference: Any) -> None:
    params, before, after = parameters(), [], []
    for given in gradients(30, scales=(0.5, 0.7)):
        for p, g in zip(params, given, strict=True):
            p.grad = g.clone()
        before.append(total_norm(params))
        rule.clip(params)
        after.append(total_norm(params))
    assert after == pytest.approx(reference(before), rel=1e-4)
    assert after != before


def test_agc_clips_unit_by_unit_and_leaves_the_last_layer_alone() -> None:
    """Rows of a weight matrix, all inputs of a filter, a whole bias."""
    torch.manual_seed(0)
    module, rule = LightningModule(), AGC(0.02)
    module.network = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4))
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    given = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    rule.on_train_start(Trainer(logger=False), module)
    rule.clip(list(module.parameters()))
    for (name, weight), gradient in zip(module.named_parameters(), given, strict=True):
        assert weight.grad is not None
        if name.startswith("network.2"):
            assert torch.equal(weight.grad, gradient)
            continue
        units = len(weight) if weight.ndim > 1 else 1
        rows = zip(*(x.reshape(units, -1) for x in (weight, gradient, weight.grad)), strict=True)
        for w, g, r in rows:
            factor = min(1.0, 0.02 * max(w.norm().item(), 1e-3) / g.norm().item())
            torch.testing.assert_close(r, g * factor, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("make", [SPAM, StableAdamW])
def test_without_a_spike_both_are_adamw(make: type[SPAM] | type[StableAdamW]) -> None:
    ours, theirs = parameters(), parameters()
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    mine, torchs = make(ours, **settings), AdamW(theirs, **settings)  # type: ignore[arg-type]
    for _ in range(30):
        for p, q in zip(ours, theirs, strict=True):
            p.grad, q.grad = torch.full((6,), 0.3), torch.full((6,), 0.3)
        mine.step()
        torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_stable_adamw_divides_the_rate_by_the_size_of_the_update() -> None:
    (p, _), weight = parameters(), torch.ones(6)
    optimizer = StableAdamW([p], lr=0.1, betas=(0.9, 0.8), weight_decay=0.5)
    first, second = torch.zeros(6), torch.zeros(6)
    for t, (g, _) in enumerate(gradients(15), start=1):
        first, second = 0.9 * first + 0.1 * g, 0.8 * second + 0.2 * g**2
        root = (second / (1 - 0.8**t)).sqrt()
        rate = 0.1 / max(1.0, float((g / root).square().mean().sqrt()))
        weight = weight - rate * 0.5 * weight - rate * first / (1 - 0.9**t) / (root + 1e-8)
        p.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), weight)


def test_spam_cuts_elements_and_begins_anew() -> None:
    (p, _), weight = parameters(), torch.ones(6)
    settings = {"theta": 4.0, "reset": 25, "warm_up": 3}
    optimizer = SPAM([p], lr=0.1, betas=(0.9, 0.8), weight_decay=0.0, **settings)  # type: ignore[arg-type]
    since, cut = 0, 0
    first, second = torch.zeros(6), torch.zeros(6)
    for t, (g, _) in enumerate(gradients(60)):
        if t and t % 25 == 0:
            since, first, second = 0, torch.zeros(6), torch.zeros(6)
        p.grad = g.clone()
        if since >= 20:
            limit = (4.0 * second).sqrt()
            cut += int((g.abs() > limit).sum())
            g = torch.where(g.abs() > limit, g.sign() * limit, g)
        rate = 0.1
        if t >= 25 and since < 3:
            rate *= 0.01 + 0.99 * (1 - math.cos(math.pi * since / 3)) / 2
        since += 1
        first, second = 0.9 * first + 0.1 * g, 0.8 * second + 0.2 * g**2
        root = (second / (1 - 0.8**since)).sqrt()
        weight = weight - rate * first / (1 - 0.9**since) / (root + 1e-8)
        optimizer.step()
        torch.testing.assert_close(p.detach(), weight)
    assert cut > 3


def test_they_are_callbacks_of_lightning() -> None:
    params, rule = parameters(), AdaGC(warm_up=1)
    for p in params:
        p.grad = torch.ones(6)
    rule.on_before_optimizer_step(Trainer(logger=False), LightningModule(), AdamW(params))
    assert params[0].grad is not None
    assert float(params[0].grad.norm()) == pytest.approx(math.sqrt(0.5))
