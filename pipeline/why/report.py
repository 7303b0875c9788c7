"""The report of a verdict: a table, ``why.json``, a picture, and a remedy."""

import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any

import yaml
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import ScalarFormatter
from torch import Tensor

from callbacks.run.wandb_logger import ResumableWandbLogger
from core.files import atomic_write
from core.runs import Run
from pipeline.continuing import named
from pipeline.why.again import Rows
from pipeline.why.changes import MEMORY, MOMENTA
from pipeline.why.control import Control
from pipeline.why.experiments import CLIPPED, SHORT
from pipeline.why.spike import Spike
from pipeline.why.trials import Tally, Trials
from pipeline.why.verdict import SAID, Verdict
from steadyfit.panels import count_axis
from steadyfit.watching.records import json_safe

_IMAGES = 8  # of samples that are shown
_WIDTH = 80  # columns of a terminal
_GREY, _RED, _BLUE = "0.7", "tab:red", "tab:blue"
_ADVICE = {  # by the cause, where no setting keeps it away
    "irreproducible": "Repeat the run, and test the machine's memory if it happens again.",
    "buffer": "Look for what writes into a buffer: a forward pass of inputs not finite?",
    "samples": "The samples have no ids that --data.exclude takes; mend the data.",
    "jump": "Raise the learning rate in small steps there, as a warm-up does.",
    "order": "Shuffle with another --seed_everything, or take larger batches.",
    "dropout": "Try less dropout.",
}


@dataclass
class Report:
    """A verdict with its evidence."""

    run: Run
    spike: Spike
    rows: Rows
    control: Control
    verdict: Verdict = field(default_factory=lambda: Verdict("unknown", "nothing was tried."))
    trials: Trials | None = None

    @property
    def tallies(self) -> list[Tally]:
        return self.trials.tallies if self.trials else []

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load(self.run.config.read_text())
        return settings

    def write(self) -> None:
        """Leave ``why.json`` and ``why.png`` in the run folder, and print the table."""
        remedy = self.remedy()
        facts = {
            "cause": self.verdict.cause,
            "verdict": str(self.verdict),
            "samples": self.verdict.samples,
            "spike": {k: v for k, v in asdict(self.spike).items() if k != "record"}
            | {"signals": sorted(self.spike.signals), "limit": self.spike.limit},
            "control": asdict(self.control) | {"equal": self.control.is_exact},
            "experiments": [
                {"name": t.name, "cause": t.cause, "gone": t.count, "forks": t.forks}
                for t in self.tallies
            ],
            "steps": {
                "repeated": self.control.steps,
                "forks": self.trials.steps if self.trials else 0,
            },
            "remedy": remedy,
        }
        with atomic_write(self.run.folder / "why.json", "w") as file:
            json.dump(json_safe(facts), file, indent=2)
        figure = self._picture()
        with atomic_write(self.run.folder / "why.png") as file:
            figure.savefig(file, format="png", dpi=120)
        self._show(remedy)
        self._to_wandb(figure)

    def _show(self, remedy: str) -> None:
        spike = self.spike
        print(
            f"Spike at step {spike.first}: loss {spike.height:.3g} at step {spike.peak}, usual "
            f"{spike.usual:.3g}"
        )
        print(_wrapped(f"Control: {self.control}."))
        if self.tallies:
            print(f"\n{'change':<62}{'spike gone':>18}")
            print(f"{'-' * 62:<62}{'-' * 12:>18}")
        for tally in self.tallies:
            print(f"{_cut(tally.name, 62):<62}{tally!s:>18}")
        print()
        print(_wrapped(f"Why: {self.verdict}"))
        print(_wrapped(remedy))
        print(f"why.json and why.png are in {self.run.folder}")

    def remedy(self) -> str:
        """A remedy whose forks have lost the spike, with the command that trains it so."""
        cause, flags = self.verdict.cause, self._flags()
        if not flags:
            return _ADVICE.get(cause, "Another spike of the run may tell more: --step N.")
        folder, state = self.run.folder.resolve(), self.control.since
        config, root = (shlex.quote(str(p)) for p in (self.run.config, folder.parents[1]))
        said = "To train it again from the start"
        if cause == "samples" or ".optimizer." in flags:  # a state has its own rate and betas
            said += ", since no state of it can go on with this"
        elif state is None:
            said += ", since there is no state before the spike"
        else:
            said = f"To go on from before the spike, with {state}"
            flags = f"--ckpt_path={shlex.quote(str(self.run.folder / state))} {flags}"
        return (
            f"{said}: python train.py fit --config {config} "
            f"--trainer.default_root_dir={root} --run {folder.name}_why {flags}"
        )

    def _flags(self) -> str:
        """Settings that keep the cause away, as typed; empty if there are none."""
        if self.verdict.cause == "samples" and self.verdict.samples:
            path = self.run.folder / "why_exclude.txt"
            with atomic_write(path, "w") as file:
                file.writelines(f"{sample}\n" for sample in self.verdict.samples)
            return f"--data.exclude={shlex.quote(str(path))}"
        if self.verdict.cause == "precision":
            plugin = self.settings["trainer"]["precision"] is None  # which is left out
            also = " --trainer.plugins=callbacks.AtomicCheckpointIO" if plugin else ""
            return f"--trainer.precision=32-true{also}"
        return self._calmer() if self.verdict.cause in ("moment", "rate") else ""

    def _calmer(self) -> str:
        """The first remedy, of those that suit the optimizer, whose forks mostly lose the spike."""
        helps = {tally.name: tally for tally in self.tallies if tally.mostly}
        settings = dict(named(self.settings))
        rate, betas = (settings.get(f"model.optimizer.{name}") for name in ("lr", "betas"))
        moved = bool(self.trials and self.trials.case.states.intersection(MOMENTA))
        moved = moved and not (betas and betas[0] == 0)
        if "update clipping" in helps and not moved:  # with momentum it does harm: docs/spikes.md
            return "--trainer.callbacks+=callbacks.UpdateClipping"
        if norms := [name for name in helps if name.startswith(CLIPPED)]:
            return f"--trainer.gradient_clip_val={norms[0].removeprefix(CLIPPED)}"
        if "half the learning rate" in helps and isinstance(rate, float):
            return f"--model.optimizer.lr={rate / 2:g}"
        if SHORT in helps and betas:  # over a whole run it is worse than a lower rate
            return f"--model.optimizer.betas=[{betas[0]:g},{1 - 1 / MEMORY:g}]"
        if SHORT in helps:
            return f"--model.optimizer.alpha={1 - 1 / MEMORY:g}"
        return ""

    def _picture(self) -> Figure:
        """The recorded loss around the spike with all forks, and images that are the cause."""
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        spike, images = self.spike, self.verdict.images
        if images is None:
            axes = figure.subplots()
        else:
            above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[3, 1])[:, 0]
            axes = above.subplots()
            _show_images(below, images[:_IMAGES], self.verdict.samples)
        told: set[str] = set()

        def draw(losses: list[Any], label: str, color: str, **style: Any) -> None:
            values = [x if isinstance(x, float) and math.isfinite(x) else math.nan for x in losses]
            steps = range(spike.start, spike.start + len(values))
            axes.plot(steps, values, color=color, label=None if label in told else label, **style)
            told.add(label)

        best = self.verdict.tally
        for tally in self.tallies:
            for line in tally.lines:
                if tally.name.startswith(("neutral", "noise")):
                    draw(line["losses"], "neutral changes", _GREY, lw=0.8, zorder=1)
                elif tally is best:
                    draw(line["losses"], tally.name, _RED, lw=1, zorder=3)
        steps = range(spike.start - 2 * (spike.end - spike.start), spike.end + 1)
        shown = [s for s in steps if s in self.rows]
        recorded = [self.rows[s].get("train/loss", math.nan) for s in shown]
        axes.plot(shown, recorded, color="black", lw=1.2, ls="--", label="recorded", zorder=2)
        if math.isfinite(spike.limit):
            axes.axhline(spike.limit, color=_BLUE, lw=0.8, ls=":", label="half the height")
        axes.axvline(spike.start, color=_GREY, lw=0.8, ls=":")
        axes.set(ylabel="training loss", yscale="log")
        count_axis([axes], "optimizer step")
        low, high = axes.get_ylim()
        if high < 10 * low:  # hardly a power of ten to be labelled
            axes.yaxis.set_minor_formatter(ScalarFormatter())
            axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_title(f"Step {spike.first}: {SAID[self.verdict.cause]}")
        axes.legend(loc="upper left", fontsize=8)
        return figure

    def _to_wandb(self, figure: Figure) -> None:
        """Add the verdict to the run's W&B run, if it has one."""
        if (id := self.run.wandb_id) is None:
            return
        os.environ.setdefault("WANDB_MODE", "offline")
        project = dict(named(self.settings)).get("trainer.logger.ResumableWandbLogger.project")
        folder = str(self.run.folder)
        logger = ResumableWandbLogger(save_dir=folder, id=id, project=project, resume="allow")
        logger.log_image("why", [figure])
        logger.experiment.summary["why"] = str(self.verdict)
        logger.experiment.finish()


def _show_images(figure: SubFigure, images: Tensor, ids: Sequence[Any]) -> None:
    """Images (N, H, W, C) uint8 in a row, each below its id."""
    row = figure.subplots(1, _IMAGES, squeeze=False)[0]
    for axes in row:
        axes.axis("off")
    for axes, image, id in zip(row, images, [*ids, *[""] * len(images)], strict=False):
        axes.imshow(image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(_cut(str(id), 12), fontsize=8)


def _cut(text: str, width: int) -> str:
    return text if len(text) < width else f"{text[: width - 2]}…"


def _wrapped(text: str) -> str:
    """Lines of a terminal's width; words such as commands are never cut."""
    return fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
