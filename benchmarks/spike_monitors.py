"""What four other tools and our monitor see, say, cost and survive when a gradient spikes.

    python -m benchmarks.spike_monitors [--zclip FOLDER]

Every cell of the table is the outcome of a training on the temporal-order task in which something
is planted: the gradient of one parameter times 100, a loss times 100 (a bad batch), or a NaN. A
tool is judged by what it leaves behind (files, changed gradients, an exception) beside what a
witness in the same training measured. Where a tool records values and marks nothing, a spike counts
as seen if a value of its step is more than 10 times the median. An exception that nobody foresaw is
a result, too. The rows below "other steps marked" give each tool the kind of spike it looks for.

ZClip (github.com/bluorion-com/ZClip) is in no package index; FOLDER is a checkout of it.
"""

import argparse
import contextlib
import csv
import importlib
import json
import logging
import math
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import wandb
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, SpikeDetection
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.step_overhead import Mark, Meter
from callbacks.gradient_spikes import GradientSpikeMonitor
from datamodules.sequences.temporal_order import Level, TemporalOrderDataModule
from lit_models.networks import LSTM, Recurrent
from pipeline.trainer import quiet_libraries

PLANTED = "network.3.weight"  # the parameter whose gradient is multiplied
SPIKE = 137  # neither a log step nor next to one: epoch 2, batch 17
NAN = 100
EPOCH = 60  # batches


@dataclass(frozen=True)
class Case:
    """A training and what is planted in it; steps are optimizer steps, counted from 0."""

    steps: int = 200
    spike_at: int = SPIKE
    kind: str = "gradient"  # of spike, or "loss"
    nan_at: int = -1  # the loss of this step is NaN
    rescue: bool = False  # a step with NaN is left out, as a gradient scaler would
    every_step: bool = True  # the tool records as often as it can, else as it comes
    clip: float | None = None
    accumulate: int = 1
    processes: int = 1  # the last one has the spike
    resume_at: int = 0
    scaler: tuple[float, int] | None = None  # of float16: first scale and growth interval


# The training


class Learner(LightningModule):
    """A LightningModule as most tutorials write it, with something planted."""

    def __init__(self, network: nn.Module, case: Case) -> None:
        super().__init__()
        self.network = network
        self.case = case
        self.now = False  # whether the batch in work is the one to plant in
        parameter = dict(self.named_parameters()).get(PLANTED)
        if parameter is not None:  # hooks of the tools come later and see what this one returns
            parameter.register_hook(self.plant)

    def plant(self, gradient: Tensor) -> Tensor:
        return 100 * gradient if self.now and self.case.kind == "gradient" else gradient

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        case, step = self.case, self.global_step
        inputs, target = batch
        loss = F.cross_entropy(self.network(inputs), target)
        second = batch_idx % case.accumulate == 1 % case.accumulate
        here = second and self.global_rank == case.processes - 1
        self.now = here and step == case.spike_at
        if self.now and case.kind == "loss":
            loss = 100 * loss
        if here and step == case.nan_at:
            loss = math.nan * loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.RMSprop(self.parameters(), lr=1e-3)


def measure(module: LightningModule) -> dict[str, float]:
    """The norm of each gradient and of all, and the largest absolute value of each."""
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    peaks = {f"{name} peak": gradient.abs().max().item() for name, gradient in gradients.items()}
    return {**norms, **peaks, "total": math.sqrt(sum(n * n for n in norms.values()))}


@dataclass
class Truth:
    """What the witness saw in one process, by optimizer step."""

    before: dict[int, dict[str, float]] = field(default_factory=dict)  # the tool and clipping
    used: dict[int, dict[str, float]] = field(default_factory=dict)  # by the optimizer
    decided: list[int] = field(default_factory=list)  # what the callback here has marked
    error: str = ""
    ended: int = -1  # the step that ended in an exception
    mid_step: bool = False  # the exception came while batches were accumulated
    finite: bool = True  # the weights at the end


class Witness(Callback):
    """Writes down what happens; stands before the tool."""

    def __init__(self, folder: Path, tool: "Tool") -> None:
        self.folder = folder
        self.tool = tool
        self.truth = Truth()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def after(*_: Any) -> None:  # not called for a step that a gradient scaler leaves out
            self.truth.used[trainer.global_step] = measure(pl_module)

        trainer.optimizers[0].register_step_post_hook(after)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self.truth.before[trainer.global_step] = measure(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.truth.decided = self.tool.decided(trainer.callbacks)  # type: ignore[attr-defined]
        self.truth.finite = all(bool(p.isfinite().all()) for p in pl_module.parameters())
        file = self.folder / f"{trainer.global_rank}.truth"
        file.write_bytes(pickle.dumps(self.truth))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not self.truth.before:  # this is only the process that started the others
            return
        self.truth.error = type(exception).__name__
        batches = trainer.fit_loop.epoch_loop.batch_idx + 1
        self.truth.mid_step = batches % trainer.accumulate_grad_batches != 0
        self.truth.ended = trainer.global_step - (not self.truth.mid_step)
        self.on_train_end(trainer, pl_module)


class Accident(Callback):
    """Interrupts a training, or leaves out a step with NaN; stands behind the tool."""

    def __init__(self, case: Case, checkpoint: Path) -> None:
        self.case = case
        self.checkpoint = checkpoint

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.case.rescue and not math.isfinite(measure(pl_module)["total"]):
            optimizer.zero_grad()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        due = 0 < self.case.resume_at == trainer.global_step
        if due and not self.checkpoint.exists():
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True


# The tools


@dataclass
class Flag:
    """What a tool says of a step that it marks."""

    parameter: str = ""
    batch: str = ""


class Tool:
    """One column of the table: no callback at all, to begin with."""

    name = "none"
    kind = "gradient"  # of spike it looks for
    must_log = False  # records what Lightning's loggers are given on log steps, no other steps

    @property
    def base(self) -> "Tool":
        """The same training without the tool."""
        return NONE

    def callbacks(self, folder: Path, every_step: bool) -> list[Any]:
        return []

    def logger(self, folder: Path) -> Logger:
        return CSVLogger(folder, name="csv", version=0)

    def decided(self, callbacks: list[Callback]) -> list[int]:
        """What the callback holds to be spikes in this process."""
        return []

    def rows(self, folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
        """What the log has about gradients, by step, under the names of :func:`measure`."""
        for file in folder.glob("csv/*/metrics.csv"):
            for row in csv.DictReader(file.read_text().splitlines()):
                numbers = {k: float(v) for k, v in row.items() if k.startswith("grad") and v}
                prefix = r"^grad_(2.0_norm[/_]|norm/)"
                yield int(row["step"]), {re.sub(prefix, "", k): v for k, v in numbers.items()}

    def flags(self, folder: Path, truth: Truth) -> dict[int, Flag]:
        """What it has marked, by step."""
        return {}


class LightningSpikeDetection(Tool):
    name = "Lightning `SpikeDetection`"
    kind = "loss"

    def callbacks(self, folder: Path, every_step: bool) -> list[Any]:
        return [SpikeDetection(exclude_batches_path=folder)]

    def decided(self, callbacks: list[Callback]) -> list[int]:
        return [b for c in callbacks if isinstance(c, SpikeDetection) for b in c.bad_batches]

    def flags(self, folder: Path, truth: Truth) -> dict[int, Flag]:
        file = folder / "skip_batches.json"
        if not file.exists():
            return {}
        batches = ", ".join(map(str, json.loads(file.read_text())))
        return {truth.ended: Flag(batch=f"batches {batches}")}


class ZClip(Tool):
    name = "ZClip"

    def callbacks(self, folder: Path, every_step: bool) -> list[Any]:
        return [importlib.import_module("zclip").ZClipLightningCallback()]

    def flags(self, folder: Path, truth: Truth) -> dict[int, Flag]:
        """It keeps no record: steps that it shortened to less than its fixed maximum of 1."""
        pairs = {step: (truth.before[step]["total"], x["total"]) for step, x in truth.used.items()}
        return {s: Flag() for s, (had, left) in pairs.items() if left < 0.999 * min(had, 1.0)}


class Watch(Callback):
    def __init__(self, log_freq: int) -> None:
        self.log_freq = log_freq

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.logger.watch(pl_module, log_freq=self.log_freq)  # type: ignore[union-attr]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        wandb.finish()  # a process that was forked would end without


class WandbAlone(Tool):
    def logger(self, folder: Path) -> Logger:
        return WandbLogger(save_dir=folder, project="spikes", offline=True)


class WandbWatch(WandbAlone):
    name = "`wandb.watch`"
    must_log = True

    @property
    def base(self) -> Tool:
        return WANDB_ALONE

    def callbacks(self, folder: Path, every_step: bool) -> list[Any]:
        return [Watch(1 if every_step else 100)]

    def rows(self, folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
        """The outermost edges of the histograms."""
        for run in folder.glob("wandb/offline-run-*"):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            records = [json.loads(x) for x in lines.splitlines() if '"type":"history"' in x]
            # a process that watches its second model puts the number of the graph into the name
            pattern = re.compile(r"gradients/(?:graph_\d+)?(.*)\.bins")
            for item in (record["history"]["item"] for record in records):
                found = {match[1]: v for k, v in item.items() if (match := pattern.match(k))}
                yield (
                    int(item.get("trainer/global_step", -1)),
                    {f"{name} peak": max(map(abs, edges)) for name, edges in found.items()},
                )


class LogGradNorm(Callback):
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class LightningGradNorm(Tool):
    name = "Lightning `grad_norm`"
    must_log = True

    def callbacks(self, folder: Path, every_step: bool) -> list[Any]:
        return [LogGradNorm()]


class Ours(Tool):
    name = "`GradientSpikeMonitor`"

    def __init__(self, reaction: Any = "log") -> None:
        self.reaction = reaction

    def callbacks(self, folder: Path, every_step: bool) -> list[Any]:
        return [GradientSpikeMonitor(self.reaction)]

    def decided(self, callbacks: list[Callback]) -> list[int]:
        records = [r for c in callbacks if isinstance(c, GradientSpikeMonitor) for r in c.records]
        return [record["step"] for record in records if record["spiked"]]

    def flags(self, folder: Path, truth: Truth) -> dict[int, Flag]:
        lines = [x for f in folder.glob("csv/*/spikes.jsonl") for x in f.read_text().splitlines()]
        spikes = [record for record in map(json.loads, lines) if record["spiked"]]
        return {
            spike["step"]: Flag(
                spike["by_share"][0]["name"],
                f"epoch {spike['epoch']}, batch {', '.join(map(str, spike['batches']))}",
            )
            for spike in spikes
        }


NONE, WANDB_ALONE, SKIPPING = Tool(), WandbAlone(), Ours("skip")


# Running a case


def train(
    tool: Tool,
    case: Case,
    folder: Path,
    network: nn.Module,
    level: Level,
    *,
    first: Callback | None = None,
    last: Callback | None = None,
    checkpoint: Path | None = None,
) -> None:
    own = tool.callbacks(folder, case.every_step)
    precision = None
    if case.scaler:
        scale, interval = case.scaler
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = Trainer(
        accelerator="cpu",
        devices=case.processes,
        strategy="ddp_fork" if case.processes > 1 else "auto",
        plugins=precision,
        callbacks=[*([first] if first else []), *own, *([last] if last else [])],
        logger=tool.logger(folder),
        default_root_dir=folder,
        log_every_n_steps=1 if case.every_step and tool.must_log else 50,
        gradient_clip_val=case.clip,
        accumulate_grad_batches=case.accumulate,
        max_epochs=-1,
        max_steps=case.steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = TemporalOrderDataModule(level, epoch_size=EPOCH * 32, val_size=0)
    with contextlib.ExitStack() as stack:
        silence = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(silence))
        stack.enter_context(contextlib.redirect_stderr(silence))
        stack.callback(wandb.finish)
        trainer.fit(Learner(network, case), data, ckpt_path=checkpoint)


@dataclass
class Outcome:
    """What a training left behind."""

    truths: list[Truth]  # of each process
    values: dict[int, dict[str, float]]  # recorded ones, by step
    flags: dict[int, Flag]
    writers: int  # processes with a log
    error: str

    @property
    def truth(self) -> Truth:
        return self.truths[0]


@cache
def run(tool: Tool, case: Case) -> Outcome:
    """A training in one go or, with ``resume_at``, the second part of one in two."""
    error = ""
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / "last.ckpt"
        for part in range(2 if case.resume_at else 1):
            folder = Path(name) / str(part)
            folder.mkdir()
            seed_everything(1, verbose=False)
            layers = (nn.Linear(72, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
            network = nn.Sequential(nn.Flatten(), *layers)
            witness, accident = Witness(folder, tool), Accident(case, checkpoint)
            start = checkpoint if part else None
            try:
                train(
                    *(tool, case, folder, network, "easy"),
                    first=witness,
                    last=accident,
                    checkpoint=start,
                )
            except Exception as problem:  # whatever it is, it is a result
                error = type(problem).__name__
                if error == "ProcessRaisedException":  # the error of one process, told by another
                    error = re.findall(r"^[\w.]*?(\w+): ", str(problem), re.MULTILINE)[-1]
        truths = [pickle.loads(file.read_bytes()) for file in sorted(folder.glob("*.truth"))]
        truths = truths or [Truth()]  # it broke off before the witness was called
        values = {step: numbers for step, numbers in tool.rows(folder) if numbers}
        logs = [*folder.glob("csv/*/metrics.csv"), *folder.glob("wandb/offline-run-*")]
        flags = tool.flags(folder, truths[0])
        return Outcome(truths, values, flags, len(logs), truths[0].error or error)


# What the cells say


def outcome_of(tool: Tool, **facts: Any) -> Outcome:
    """With a spike of the kind that the tool looks for."""
    return run(tool, Case(kind=tool.kind, **facts))


def yes(fact: bool) -> str:
    return "yes" if fact else "no"


def outstanding(outcome: Outcome, step: int) -> list[str]:
    """The recorded values of a step that a reader would notice."""

    def usual(name: str) -> float:
        column = [row[name] for row in outcome.values.values() if name in row]
        return statistics.median(value for value in column if math.isfinite(value))

    row = outcome.values.get(step, {})
    return [name for name, x in row.items() if not math.isfinite(x) or x > 10 * usual(name)]


def seen(outcome: Outcome, step: int) -> bool:
    """Whether the step is marked or, by a tool that never marks one, recorded conspicuously."""
    return step in outcome.flags if outcome.flags else bool(outstanding(outcome, step))


def sees(tool: Tool, case: Case, step: int) -> str:
    outcome = run(tool, case)
    if 0 <= outcome.truth.ended < step:
        return f"training ended at step {outcome.truth.ended}"
    return yes(seen(outcome, step))


def parameter(tool: Tool) -> str:
    outcome = run(tool, Case())
    if PLANTED in outcome.flags.get(SPIKE, Flag()).parameter:
        return "yes"
    out = " ".join(outstanding(outcome, SPIKE))
    return f"by comparing {len(outcome.values[0])} columns" if PLANTED in out else "no"


def batch(tool: Tool) -> str:
    return outcome_of(tool).flags.get(SPIKE, Flag()).batch or "no"


def others(tool: Tool) -> str:
    flags = outcome_of(tool).flags
    return str(len(flags.keys() - {SPIKE})) if flags else "marks none"


def action(tool: Tool) -> str:
    outcome = outcome_of(tool)
    had, used = outcome.truth.before[SPIKE]["total"], outcome.truth.used[SPIKE]["total"]
    facts = {
        f"raises {outcome.error}": bool(outcome.error),
        f"clips ({had:.2g} to {used:.2g})": used < 0.999 * had,
        "logs values": bool(outcome.values),
        "writes a file of spikes": any(flag.batch for flag in outcome.flags.values()),
    }
    return ", ".join(fact for fact, true in facts.items() if true)


def around_clipping(tool: Tool) -> str:
    outcome = outcome_of(tool, clip=0.05)

    def recorded(numbers: dict[str, float]) -> bool:
        row = outcome.values.get(SPIKE, {})
        return any(math.isclose(x, numbers.get(n, 0), rel_tol=0.01) for n, x in row.items())

    # ours has the norm after clipping in a column of its own
    used = outcome.truth.used[SPIKE]
    sides = {"before": outcome.truth.before[SPIKE], "after": {**used, "clipped": used["total"]}}
    return " and ".join(side for side, numbers in sides.items() if recorded(numbers)) or "neither"


def resumed(tool: Tool) -> str:
    """50 steps and 50 more, with a spike among them, or 100 in one go."""
    facts = {"steps": 100, "spike_at": 60}
    whole, part = outcome_of(tool, **facts), outcome_of(tool, **facts, resume_at=50)
    if part.error != whole.error:
        return f"crashes: {part.error}"
    if whole.flags != part.flags:
        return f"no, marks {list(part.flags) or 'nothing'} instead of {list(whole.flags)}"
    later = [{s: x for s, x in a.items() if s >= 50} for a in (whole.values, whole.truth.used)]
    return yes(later == [part.values, part.truth.used])


def weights_after_nan(tool: Tool) -> str:
    def weights(tool: Tool) -> str:
        return "finite" if run(tool, Case(nan_at=NAN)).truth.finite else "NaN"

    return weights(tool) + (f"; with `skip` {weights(SKIPPING)}" if isinstance(tool, Ours) else "")


def two_processes(tool: Tool) -> str:
    """The batch with the spike is in the second process."""
    outcome = outcome_of(tool, steps=100, spike_at=77, processes=2)
    if len(outcome.truths) != 2:
        return f"{outcome.error} ends both, {outcome.writers} writer"
    words = ["spike found" if seen(outcome, 77) else "spike not found"]
    if outcome.flags:
        one, other = ((t.decided, t.used, t.error) for t in outcome.truths)
        words.append(f"{'same' if one == other else 'different'} decisions")
    return ", ".join([*words, f"{outcome.writers} writer"])


def value_of_step(tool: Tool, case: Case) -> str:
    """Recorded values of ordinary steps over the true ones, and whether the spike is seen."""
    outcome = run(tool, replace(case, kind=tool.kind))
    ratios = [
        value / outcome.truth.before[step][name]
        for step, row in outcome.values.items()
        for name, value in row.items()
        if step != case.spike_at and outcome.truth.before[step].get(name)
    ]
    ratio = statistics.median(ratios) if ratios else math.nan
    right = "right values" if abs(ratio - 1) < 0.01 else f"values times {ratio:.2g}"
    words = [right] if ratios else []
    words += ["judges single batches"] if outcome.truth.mid_step else []
    hit = seen(outcome, case.spike_at)
    return "; ".join([*words, "spike found" if hit else "spike not found"])


def overflows(tool: Tool) -> str:
    """The scale doubles every 10 steps, into an overflow again and again."""
    outcome = outcome_of(tool, scaler=(2.0**22, 10))
    norms = {s: x["total"] for s, x in outcome.truth.before.items() if s != SPIKE}
    steps = [step for step, norm in norms.items() if not math.isfinite(norm)]
    alarms = sum(seen(outcome, step) for step in steps)
    hit = "spike found" if seen(outcome, SPIKE) else "spike not found"
    return f"{alarms} of {len(steps)} look like spikes; {hit}"


# Costs


class CpuMeter(Meter):
    """Takes the processor's time of this process, which others on the machine hardly change."""

    def mark(self, network: nn.Module, inputs: object) -> None:
        self.marks.append(Mark(time.process_time(), self.operators, self.reads))


def cost(tool: Tool, every_step: bool, *, count: bool) -> Mark:
    """Mean of 200 steps of the course notebook's LSTM, log steps included, with nothing planted."""
    meter = CpuMeter()
    seed_everything(1, verbose=False)
    case = Case(steps=252, spike_at=-1, every_step=every_step)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if count:
            stack.enter_context(meter.counting())
        train(tool, case, folder, meter.watch(Recurrent(LSTM(8, 12), 4)), "moderate")
    return meter.per_step(50, 250)


def device_reads(tool: Tool, *, every_step: bool) -> str:
    base = cost(tool.base, False, count=True).reads
    return f"{cost(tool, every_step, count=True).reads - base:.2f}"


@cache
def seconds(tools: tuple[Tool, ...], rounds: int) -> dict[tuple[Tool, bool], list[float]]:
    """CPU seconds per step of all ways, which take turns."""
    ways = [(tool, False) for tool in dict.fromkeys([*(t.base for t in tools), *tools])]
    ways += [(tool, True) for tool in tools if tool.must_log]
    times: dict[tuple[Tool, bool], list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            times[way].append(cost(*way, count=False).seconds)
    return times


def ratio(tool: Tool, tools: tuple[Tool, ...], rounds: int, *, every_step: bool) -> str:
    times = seconds(tools, rounds)
    own, base = times[tool, every_step and tool.must_log], times[tool.base, False]
    return f"{statistics.median(a / b for a, b in zip(own, base, strict=True)):.2f}"


# The table


def make_rows(tools: tuple[Tool, ...], rounds: int) -> dict[str, Callable[[Tool], str]]:
    accumulating = Case(steps=80, spike_at=57, accumulate=4)

    def after_nan(tool: Tool, step: int) -> str:
        return sees(tool, Case(kind=tool.kind, nan_at=NAN, rescue=True), step)

    return {
        "sees a gradient x 100, as it comes": partial(
            sees, case=Case(every_step=False), step=SPIKE
        ),
        "sees it, recording every step": partial(sees, case=Case(), step=SPIKE),
        "sees a loss x 100": partial(sees, case=Case(kind="loss"), step=SPIKE),
        "names the parameter": parameter,
        "other steps marked": others,
        "names the batch (epoch 2, batch 17)": batch,
        "what it does": action,
        "records the norm around clipping": around_clipping,
        "device reads per step, as it comes": partial(device_reads, every_step=False),
        "device reads per step, recording every step": partial(device_reads, every_step=True),
        "CPU time of a step, as it comes": partial(
            ratio, tools=tools, rounds=rounds, every_step=False
        ),
        "CPU time of a step, recording every step": partial(
            ratio, tools=tools, rounds=rounds, every_step=True
        ),
        "resumed = uninterrupted": resumed,
        "sees a NaN": partial(after_nan, step=NAN),
        "sees the next spike after a NaN": partial(after_nan, step=SPIKE),
        "weights after a NaN": weights_after_nan,
        "DDP, spike in one of 2 processes": two_processes,
        "4 batches accumulated": partial(value_of_step, case=accumulating),
        "float16, scale 1024": partial(value_of_step, case=Case(scaler=(1024.0, 2000))),
        "float16, overflows": overflows,
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zclip", type=Path, help="a checkout of github.com/bluorion-com/ZClip")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    quiet_libraries()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of trainings that are meant to go wrong
    tools: tuple[Tool, ...]
    tools = (LightningSpikeDetection(), ZClip(), WandbWatch(), LightningGradNorm(), Ours())
    versions = [f"{name} {version(name)}" for name in ("torch", "lightning", "wandb")]
    if options.zclip:
        sys.path.insert(0, str(options.zclip))
        project = tomllib.loads((options.zclip / "pyproject.toml").read_text())["project"]
        versions.append(f"zclip {project['version']}")
    else:
        tools = tuple(tool for tool in tools if not isinstance(tool, ZClip))
        versions.append("ZClip left out: no --zclip")
    lines = [["", *(tool.name for tool in tools)], ["---"] * (len(tools) + 1)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {f"WANDB_{kind}_DIR": folder for kind in ("DATA", "CACHE", "CONFIG")}
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        for title, cell in make_rows(tools, options.rounds).items():
            lines.append([title])
            for tool in tools:
                start = time.perf_counter()
                lines[-1].append(cell(tool))
                took = f"{time.perf_counter() - start:.1f} s"
                print(f"{title} | {tool.name}: {lines[-1][-1]} ({took})", file=sys.stderr)
    print(f"Python {platform.python_version()}, {', '.join(versions)}")
    print(f"{platform.processor() or platform.machine()}, one thread; {options.rounds} rounds\n")
    for line in lines:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
