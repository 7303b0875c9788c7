"""Remedies against spikes on a small GPT: does a higher learning rate train as well with them?

    python -m benchmarks.spike_gpt GUTENBERG               # what has no line yet, then the tables
    python -m benchmarks.spike_gpt GUTENBERG --minutes 20  # as much of it as ends in 20 minutes
    python -m benchmarks.spike_gpt --picture docs/spikes_gpt.png  # tables and picture alone

Bytes of the Gutenberg books; the last twentieth of each book is for validation. Every run is one
thread of one process, 1,000 steps of 8 sequences of 64 bytes, AdamW, linear warm-up for 50 steps,
then linear decay to zero; half a minute on one core. A finished run is a line of
``records/spike_gpt.jsonl``.

Every fix is tuned in the same number of trials: three settings at each rate of ``TUNE_RATES``, seed
101. The setting of the lowest mean validation loss is reported, with seeds 1 to 3 at ``RATES``.
Untouched AdamW has nothing to be tuned; its betas are fixes of their own. That is 66 runs of tuning
and 144 to report.

Dimensions: B batch, T tokens, D width, V vocabulary, S optimizer steps.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.recorded import RECORDS, Line, RunRecord, Setting
from benchmarks.spike_rivals import SPAM, AdaGC, StableAdamW, ZClip
from core.errors import UserError
from core.files import atomic_write
from steadyfit import clip_updates
from steadyfit.measures import HEIGHT, excursions, finite_or_infinite, rolling_median
from steadyfit.panels import BLUE, GREEN, LINES, VERMILION

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "untouched": [{}],
    "gradient norm": [{"max_norm": 0.25}, {"max_norm": 1.0}, {"max_norm": 4.0}],
    "ZClip": [{"max_norm": 0.5}, {"max_norm": 1.0}, {"max_norm": 4.0}],
    "AdaGC": [{"lambda_rel": 1.05}, {"lambda_rel": 1.5}, {"lambda_rel": 3.0}],
    "second beta": [{"beta2": 0.99}, {"beta2": 0.95}, {"beta2": 0.9}],
    "no momentum": [
        {"beta1": 0.0, "beta2": 0.999},
        {"beta1": 0.0, "beta2": 0.99},
        {"beta1": 0.0, "beta2": 0.95},
    ],
    "StableAdamW": [{"beta2": 0.999}, {"beta2": 0.99}, {"beta2": 0.95}],
    "SPAM": [{"theta": 5000.0}, {"theta": 500.0}, {"theta": 50.0}],
    "update rms": [{"max_rms": 0.25}, {"max_rms": 0.5}, {"max_rms": 1.0}],
    "decrease": [{"max_decrease": 0.005}, {"max_decrease": 0.02}, {"max_decrease": 0.1}],
    "decrease above the floor": [
        {"max_decrease": 0.02, "floor": "auto"},
        {"max_decrease": 0.1, "floor": "auto"},
        {"max_decrease": 0.5, "floor": "auto"},
    ],
    "both": [
        {"max_rms": 0.25, "max_decrease": 0.02},
        {"max_rms": 0.5, "max_decrease": 0.02},
        {"max_rms": 0.5, "max_decrease": 0.005},
    ],
    "both, no momentum": [
        {"beta1": 0.0, "beta2": 0.99, "max_rms": 1.0, "max_decrease": 0.1},
        {"beta1": 0.0, "beta2": 0.99, "max_rms": 1.0, "max_decrease": 0.02},
        {"beta1": 0.0, "beta2": 0.99, "max_rms": 0.5, "max_decrease": 0.02},
    ],
}
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
TUNE_RATES = (6e-3, 1.2e-2)
TUNE_SEED = 101
SEEDS = (1, 2, 3)
STABLE = 0.1  # nats above the best of untouched that a stable rate may end at
LENGTH = 64  # T
CURVES = {"untouched": VERMILION, "gradient norm": GREEN, "both": BLUE}
CURVES_RATE = 1.2e-2
GUESSED = 3.2  # nats a byte, where a run that has learned little ends: the top of the picture
CURVES_STEPS = 10  # of which one value is kept
LEGEND: dict[str, Any] = {"loc": "outside lower center", "ncols": 6, "frameon": False}


class Block(nn.Module):
    """Attention and a perceptron, each after a normalisation and around which the input goes on."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        shape = (*x.shape[:2], 3, self.heads, -1)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)  # (B, heads, T, D')
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder with pre-normalisation, initialised as GPT-2 is; 391,008 parameters."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4, vocab: int = 256) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.places = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T) -> logits (B, T, V)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places.weight)))


class Books:
    """Bytes of all books in a folder, one after the other: for training and for validation."""

    def __init__(self, folder: Path, held_out: float = 0.05) -> None:
        texts = [path.read_bytes() for path in sorted(folder.glob("*.txt"))]
        if not texts:
            raise UserError(f"{folder} holds no *.txt; give the folder of the Gutenberg books.")
        cuts = [int(len(text) * (1 - held_out)) for text in texts]
        parts = list(zip(texts, cuts, strict=True))
        self.train = as_tensor(b"".join(text[:cut] for text, cut in parts))
        self.val = as_tensor(b"".join(text[cut:] for text, cut in parts))

    def batch(self, generator: torch.Generator, size: int = 8) -> Tensor:
        """Random stretches (B, T + 1) of the training text."""
        starts = torch.randint(len(self.train) - LENGTH - 1, (size, 1), generator=generator)
        return self.train[starts + torch.arange(LENGTH + 1)].long()

    def validation(self, size: int = 256) -> Tensor:
        """The same stretches (B, T + 1) for all runs, evenly over the held-out text."""
        starts = torch.linspace(0, len(self.val) - LENGTH - 1, size).long()[:, None]
        return self.val[starts + torch.arange(LENGTH + 1)].long()


def as_tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).copy())


def loss_of(network: nn.Module, tokens: Tensor) -> Tensor:
    logits = network(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def equip(
    fix: str, setting: dict[str, Any], params: list[nn.Parameter], lr: float
) -> tuple[Optimizer, Callable[[Tensor], None]]:
    """Optimizer of a fix, and what it does between the backward pass and the step."""
    setting = dict(setting)
    common: dict[str, Any] = {"lr": lr, "weight_decay": 0.1}
    common["betas"] = (setting.pop("beta1", 0.9), setting.pop("beta2", 0.999))
    if fix in ("SPAM", "StableAdamW"):
        make: Any = SPAM if fix == "SPAM" else StableAdamW
        return make(params, **common, **setting), lambda loss: None
    optimizer = AdamW(params, **common)
    if fix == "gradient norm":
        return optimizer, lambda loss: _clip_norm(params, **setting)
    if fix in ("ZClip", "AdaGC"):
        rule = (ZClip if fix == "ZClip" else AdaGC)(**setting)
        return optimizer, lambda loss: rule.clip(params)
    if setting.keys() & {"max_rms", "max_decrease"}:  # these and whatever else clip_updates takes
        limit = clip_updates(optimizer, **({"max_rms": None} | setting))
        return optimizer, lambda loss: setattr(limit, "loss", loss)
    return optimizer, lambda loss: None


def _clip_norm(params: list[nn.Parameter], max_norm: float) -> None:
    nn.utils.clip_grad_norm_(params, max_norm)


def train(run: Setting, books: Books) -> dict[str, Any]:
    """Train once; of the first reported seed the course of the loss is kept for the picture."""
    torch.manual_seed(run["seed"])
    generator = torch.Generator().manual_seed(run["seed"])
    network, steps = GPT(), run["steps"]
    params = list(network.parameters())
    optimizer, before_step = equip(run["fix"], run["setting"], params, run["lr"])
    schedule = LambdaLR(optimizer, lambda s: min((s + 1) / 50, 1.0) * (1 - s / steps))
    losses = []
    for _ in range(steps):
        loss = loss_of(network, books.batch(generator))
        optimizer.zero_grad()
        loss.backward()
        before_step(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        final = float(loss_of(network, books.validation()))
    found = {"val_loss": final, **measures(finite_or_infinite(np.array(losses)))}
    if run["seed"] == SEEDS[0]:
        largest = np.maximum.reduceat(losses, np.arange(0, steps, CURVES_STEPS))
        found["losses"] = [round(float(x), 2) for x in largest]
    return found


def measures(loss: np.ndarray) -> dict[str, Any]:
    """How many steps (S,) are above the lowest rolling median so far, by how much, and spikes."""
    above = loss - (np.minimum.accumulate(rolling_median(loss)) + HEIGHT)
    return {
        "steps_lost": int((above > 0).sum()),
        "excess": float(np.maximum(above, 0).sum()),  # nats times steps
        "excursions": len(excursions(loss)),
    }


# The plan


def tuning_runs(fixes: list[str], steps: int) -> list[Setting]:
    return [
        {"fix": fix, "setting": setting, "lr": lr, "seed": TUNE_SEED, "steps": steps}
        for fix in fixes
        if len(SETTINGS[fix]) > 1
        for setting in SETTINGS[fix]
        for lr in TUNE_RATES
    ]


def tuned(record: RunRecord, fix: str, steps: int) -> dict[str, float]:
    """Mean validation loss of each setting (as JSON) that has been tried at all rates."""
    found: dict[str, list[float]] = {}
    for run in tuning_runs([fix], steps):
        line = record.find(run)
        value = math.nan if line is None else line["measures"]["val_loss"]
        found.setdefault(json.dumps(run["setting"]), []).append(value)
    means = {setting: mean(values) for setting, values in found.items()}
    return {setting: value for setting, value in means.items() if value == value}


def chosen(record: RunRecord, fix: str, steps: int) -> dict[str, Any] | None:
    """The best setting on the tuning seed; None while a trial is missing."""
    if len(SETTINGS[fix]) == 1:
        return SETTINGS[fix][0]
    values = tuned(record, fix, steps)
    return json.loads(min(values, key=values.__getitem__)) if len(values) == 3 else None


def reporting_runs(record: RunRecord, options: argparse.Namespace) -> list[Setting]:
    settings = {fix: chosen(record, fix, options.steps) for fix in options.fixes}
    return [
        {"fix": fix, "setting": setting, "lr": lr, "seed": seed, "steps": options.steps}
        for seed in options.seeds
        for lr in options.rates
        for fix, setting in settings.items()
        if setting is not None
    ]


# The tables


def cell(lines: list[Line]) -> str:
    """Mean and standard deviation of the validation loss, and mean steps lost."""
    if not lines:
        return ""
    values = [line["measures"]["val_loss"] for line in lines]
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    lost = mean(line["measures"]["steps_lost"] for line in lines)
    return f"{mean(values):.3f}{spread} ({lost:.1f})"


def print_tables(record: RunRecord, options: argparse.Namespace) -> None:
    """Trials of the tuning seed, then the reported runs."""
    print(f"Tuning: mean validation loss at {rates_text(TUNE_RATES)}, seed {TUNE_SEED}\n")
    print("| fix | settings |\n| --- | --- |")
    for fix in options.fixes:
        values = tuned(record, fix, options.steps)
        print(
            f"| {fix} | {'; '.join(f'{text(json.loads(k))}: {v:.3f}' for k, v in values.items())} |"
        )
    lines = [line for run in reporting_runs(record, options) if (line := record.find(run))]
    by_rate = {
        (fix, lr): [x for x in lines if (x["run"]["fix"], x["run"]["lr"]) == (fix, lr)]
        for fix in options.fixes
        for lr in options.rates
    }
    print("\nValidation loss, in brackets the steps lost, at each learning rate\n")
    print(f"| fix | {' | '.join(map(str, options.rates))} | highest stable rate |")
    print(f"|{' --- |' * (len(options.rates) + 2)}")
    for fix in options.fixes:
        setting = chosen(record, fix, options.steps)
        cells = [cell(by_rate[fix, lr]) for lr in options.rates]
        name = f"{fix}, {text(setting)}" if setting else fix
        print(f"| {name} | {' | '.join(cells)} | {stable_rate(by_rate, fix, options.rates)} |")
    seeds = sorted({line["run"]["seed"] for line in lines})
    print(f"\n{len(lines)} runs; seeds {seeds}; {options.steps} steps; {RunRecord.origins(lines)}")


def stable_rate(by_rate: dict[tuple[str, float], list[Line]], fix: str, rates: list[float]) -> str:
    """The highest rate at which every seed ends near the best mean of untouched runs."""

    def losses(fix: str, lr: float) -> list[float]:
        return [line["measures"]["val_loss"] for line in by_rate.get((fix, lr), [])]

    best = min((mean(values) for lr in rates if (values := losses("untouched", lr))), default=0.0)
    stable = [lr for lr in rates if losses(fix, lr) and max(losses(fix, lr)) <= best + STABLE]
    return f"{max(stable)}" if stable else "none"


def text(setting: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"
        for name, value in setting.items()
    )


def rates_text(rates: tuple[float, ...]) -> str:
    return " and ".join(f"{rate:g}" for rate in rates)


# The picture


def picture(record: RunRecord, options: argparse.Namespace) -> Figure:
    """Validation loss against the rate, and the loss of each step of some runs at one rate."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = [line for run in reporting_runs(record, options) if (line := record.find(run))]
    for i, fix in enumerate(options.fixes):
        own = [line for line in lines if line["run"]["fix"] == fix]
        rates = sorted({line["run"]["lr"] for line in own})
        ends = [[x["measures"]["val_loss"] for x in own if x["run"]["lr"] == r] for r in rates]
        if ends:
            style = "o-" if i < len(LINES) else "s--"
            color = LINES[i % len(LINES)]
            left.plot(rates, [mean(values) for values in ends], style, color=color, ms=4, label=fix)
    left.set(xscale="log", xlabel="learning rate", ylabel="validation loss after the last step")
    left.set_xticks(options.rates, [f"{rate:g}" for rate in options.rates], minor=False)
    left.minorticks_off()
    left.set_ylim(top=GUESSED)
    for fix, color in CURVES.items():
        for line in lines:
            run = line["run"]
            if (run["fix"], run["lr"], run["seed"]) == (fix, CURVES_RATE, SEEDS[0]):
                losses = line["measures"]["losses"]
                steps = (np.arange(len(losses)) + 1) * CURVES_STEPS
                right.plot(steps, losses, color=color, lw=1, label=fix)
    right.set(xscale="log", xlabel="optimizer step")  # what happens, happens early
    right.set_ylabel(f"training loss, largest of {CURVES_STEPS} steps")
    right.set_title(f"learning rate {CURVES_RATE:g}, seed {SEEDS[0]}", fontsize="medium")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), **LEGEND)
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False)
    return figure


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("books", type=Path, nargs="?", help="folder of *.txt; without: no runs")
    parser.add_argument("--fixes", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--record", type=Path, default=RECORDS / "spike_gpt.jsonl")
    parser.add_argument("--picture", type=Path, help="draw to this file")
    options = parser.parse_args(args)
    record = RunRecord(options.record)
    if options.books:
        torch.set_num_threads(1)
        books, start = Books(options.books), time.monotonic()
        left = record.complete(
            tuning_runs(options.fixes, options.steps),
            lambda run: train(run, books),
            options.minutes,
        )
        spent = (time.monotonic() - start) / 60
        if not left:
            record.complete(
                reporting_runs(record, options),
                lambda run: train(run, books),
                options.minutes and options.minutes - spent,
            )
    print_tables(record, options)
    if options.picture:
        with atomic_write(options.picture) as file:
            picture(record, options).savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main()
