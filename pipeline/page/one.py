"""The page of one run."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from callbacks.pictures.confusion_matrix import READABLE, confusion_matrix
from callbacks.pictures.learning_curves import learning_curves
from core.errors import UserError
from pipeline.continuing import named, shown
from pipeline.page.facts import Facts, shown_value
from pipeline.page.parts import Listing, Page, Part, Picture, Section, Table, drawable
from pipeline.page.settings import unusual
from steadyfit.pictures import SpikeRun
from steadyfit.watching.records import format_spike, read_records

CURVES = ("train/loss", "val/loss", "train/accuracy", "val/accuracy")
_ROWS = 20  # of a table of spikes or mistakes; the whole is in a file of the run
_CHOICES = (
    *("data", "model", "model.network", "model.optimizer", "model.lr_scheduler"),
    *("seed_everything", "trainer.precision"),
)
CAPTIONS = {
    "spikes_curves": "Loss and accuracy with spikes and kinks",
    "spikes_norms": "Norms of gradients and updates",
    "spikes_layers": "Gradients, updates and weights of each parameter",
}


def page_of_run(facts: Facts) -> Page:
    try:
        result = str(facts.result())
    except UserError as error:
        result = f"No result: {error}"
    parts = {
        "What was trained": _trained(facts),
        "Settings": _settings(facts),
        "Numbers": _numbers(facts),
        "Curves": _curves(facts),
        "Spikes": _spikes(facts),
        "Gradients and weights": _gradients(facts),
        "Confusion matrix": _confusions(facts),
        "Worst mistakes": _mistakes(facts),
        "Submission and score": _submission(facts),
    }
    return Page(result, facts.label, [Section.of(*each) for each in parts.items()])


def _trained(facts: Facts) -> Iterator[Part]:
    """Origin, data, time and memory."""
    origin, chosen = facts.origin, dict(named(facts.settings))
    git, versions = origin.get("git") or {}, origin.get("versions") or {}
    patch = " (code.patch)" if (facts.folder / "code.patch").is_file() else ""
    yield _facts_table(
        "What was trained, with what",
        {name.rpartition(".")[2]: str(chosen.get(name)) for name in _CHOICES}
        | {
            "command": origin.get("command"),
            "commit": git and f"{git['commit']}{'' if git['clean'] else f', with changes{patch}'}",
            "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
            "hardware": origin.get("hardware"),
        },
    )
    yield _facts_table(
        "The checkpoint that predicts",
        {
            "data digest (SHA-256)": facts.best.get("data_digest"),
            "digest of the folds": facts.best.get("split", "no folds"),
            "epoch, counted from 0": facts.best["epoch"],
            "optimizer steps": facts.best["global_step"],
        },
    )
    recorded = facts.table("timing.csv", "time and memory were not recorded")
    times = recorded.filter(regex="^time/").replace("", "nan").astype(float)
    ends = zip(times.median(), times.max(), times.iloc[-1], strict=True)
    rows = [[str(n), *(f"{x:.4g}" for x in found)] for n, found in zip(times, ends, strict=True)]
    caption = "Time and memory, in seconds and MiB (timing.csv)"
    yield Table(caption, ["value", "median", "largest", "last"], rows)


def _settings(facts: Facts) -> Iterator[Part]:
    rows = [
        [name, shown(value, usual), shown(usual, value)]
        for name, usual, value in unusual(facts.settings)
    ]
    caption = "What differs from the defaults, beside the classes chosen"
    yield Table(caption, ["setting", "value", "default"], rows)
    text = yaml.safe_dump(facts.settings, sort_keys=False, allow_unicode=True)
    yield Listing("All settings (config.yaml)", text)


def _numbers(facts: Facts) -> Iterator[Part]:
    """Every metric as in ``metrics.csv``, to six digits."""
    rows = []
    for name in map(str, facts.metrics.filter(regex="^(train|val|test)/")):
        if len(values := facts.values(name)):
            ends = values.iloc[-1], values.min(), values.max()
            rows.append([name, f"{values.index[-1]}", *(f"{x:.6g}" for x in ends)])
    if not rows:
        raise UserError("metrics.csv holds no metric of training, validation or test.")
    head = ["metric", "last step", "last value", "lowest", "highest"]
    yield Table("Metrics, of each optimizer step or each validation (metrics.csv)", head, rows)
    if not len(facts.values("val/loss")):
        yield "Missing: there was no validation."
    if not len(facts.values("test/loss")):
        yield f"Missing: there was no test; python train.py test --run {facts.folder} makes it."


def _curves(facts: Facts) -> Iterator[Part]:
    names = [n for n in CURVES if len(facts.values(n))]
    if not names:
        raise UserError("there is no loss and no accuracy to draw.")
    ends = [(name, *facts.values(name).iloc[[0, -1]]) for name in names]
    told = [f"{n} from {shown_value(n, a)} to {shown_value(n, b)}" for n, a, b in ends]
    alt = f"{', '.join(told)}, in {facts.metrics.index.max() + 1:,} optimizer steps."
    figure = learning_curves(facts.metrics.reset_index())
    yield Picture.of(figure, "Learning curves", f"Learning curves: {alt}")


def _spikes(facts: Facts) -> Iterator[Part]:
    """Their number, the worst with their evidence, and why."""
    steps = len(facts.values("train/loss"))
    records = [r for r in read_records(facts.folder / "spikes.jsonl") if r.spiked]
    records.sort(key=lambda record: -(record.max_loss_after or 0))
    if not len(facts.values("grad_norm/total")):
        yield "Missing: the run was not watched; callbacks.GradientSpikeMonitor does it."
    else:
        confirmed = sum(record.confirmed for record in records)
        yield f"{len(records)} spikes in {steps:,} optimizer steps, {confirmed} seen in the loss."
    if records:
        rows = [
            [str(r.step), ", ".join(r.spiked), format_spike(r).partition(": ")[2]]
            for r in records[:_ROWS]
        ]
        few = f", the {_ROWS} worst" if len(records) > _ROWS else ""
        yield Table(f"Spikes{few} (spikes.jsonl)", ["step", "in", "evidence"], rows)
        if not (facts.folder / "why.json").is_file():
            yield f"Missing: why it spiked; python spikes.py why {facts.folder} finds out."
    figure = facts.spike_pictures["spikes_curves"]
    yield Picture.of(figure, CAPTIONS["spikes_curves"], alt_of(facts.spikes))
    if (path := facts.folder / "why.json").is_file():
        why = json.loads(path.read_text())
        yield f"Why (spikes.py why): {why['verdict']} {why['remedy']}"
        rows = [[x["name"], f"{x['gone']} of {x['forks']}"] for x in why["experiments"]]
        yield Table("What takes the spike away (why.json)", ["change", "spike gone"], rows)
        alt = f"Loss around the spike, as recorded and with each change. {why['verdict']}"
        yield Picture.read(path.with_suffix(".png"), "The spike and its changes", alt)


def alt_of(run: SpikeRun) -> str:
    found = run.measures
    return (
        f"Loss and accuracy over the epochs and the loss of each step of {run.label}: excess loss "
        f"{found.excess:.2f}, {found.excursions} excursions, {found.kinks_val} kinks of validation."
    )


def _gradients(facts: Facts) -> Iterator[Part]:
    norms = facts.values("grad_norm/total")
    if norms.empty:
        raise UserError("no norms were recorded; callbacks.GradientSpikeMonitor does it.")
    told = f"Gradient norm of a step: median {norms.median():.3g}, largest {norms.max():.3g}"
    for name, figure in facts.spike_pictures.items():
        if name != "spikes_curves":
            yield Picture.of(figure, CAPTIONS[name], f"{CAPTIONS[name]}. {told}.")
    path = facts.folder / "spikes_through_time.png"
    if path.is_file():
        alt = "Gradient of the loss with respect to each time step of the input, at the worst step."
        yield Picture.read(path, "Gradient through time", alt)


def _confusions(facts: Facts) -> Iterator[Part]:
    there = [p for p in ("test", "val") if (facts.folder / f"confusion_matrix_{p}.csv").is_file()]
    for part in there or ["test"]:
        table = facts.confusion(part)
        counts, names = table.to_numpy(), [str(name) for name in table.columns]
        told = f"Confusion matrix of {part}: {counts.trace():,} of {counts.sum():,} right"
        if len(names) <= READABLE:
            rows = [[name, *map(str, row)] for name, row in zip(names, counts, strict=True)]
            yield Table(told, ["true / predicted", *names], rows)
        figure = confusion_matrix(counts, [drawable(name) for name in names])
        alt = f"{told}, {len(names)} classes; the numbers are in confusion_matrix_{part}.csv."
        yield Picture.of(figure, f"Confusion matrix ({part})", alt)


def _mistakes(facts: Facts) -> Iterator[Part]:
    table = facts.table(
        "mistakes.csv", f"python train.py test --run {facts.folder} makes it of images"
    )
    few = f", the {_ROWS} most confident" if len(table) > _ROWS else ""
    caption = f"{len(table):,} mistakes of the test{few} (mistakes.csv)"
    yield Table(caption, [str(name) for name in table], table.head(_ROWS).to_numpy().tolist())
    path = facts.folder / "mistakes.png"
    if path.is_file():
        yield Picture.read(path, "Mistakes", "The images of the first rows of the table above.")


def _submission(facts: Facts) -> Iterator[Part]:
    names = "submission.json", "predictions.json"  # the second of what nobody scores
    predicted = next((name for name in names if (facts.folder / name).is_file()), names[0])
    for name, verb, keys in (
        (predicted, "predict", ("csv", "rows", "competition", "created", "sha256")),
        ("score.json", "submit", ("status", "public_score", "ref", "time", "message", "error")),
    ):
        path = facts.folder / name
        if not path.is_file():
            raise UserError(f"there is no {name}; python {verb}.py {facts.folder} makes it.")
        found = json.loads(path.read_text())
        yield _facts_table(
            f"From {name}", {key: found[key] for key in keys if found.get(key) not in (None, "")}
        )
        if not found.get("sendable", True):
            return


def _facts_table(caption: str, facts: Mapping[str, Any]) -> Table:
    rows = [[k, "not recorded" if v in (None, "", {}) else str(v)] for k, v in facts.items()]
    return Table(caption, ["fact", "value"], rows)
