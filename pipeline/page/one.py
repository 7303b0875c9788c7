"""The page of one run."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from callbacks.pictures.confusion_matrix import READABLE, confusion_matrix
from callbacks.pictures.learning_curves import learning_curves
from core.errors import UserError
from pipeline.continuing import named, shown
from pipeline.page.facts import Facts, shown_value
from pipeline.page.parts import Listing, Page, Part, Picture, Section, Table, drawable
from pipeline.page.settings import unusual
from steadyfit.pictures import SpikeRun, spike_pictures
from steadyfit.watching.records import format_spike, read_records

ROWS = 20  # of a table of spikes or mistakes; the whole is in a file of the run
CHOICES = ("data", "model", "model.network", "model.optimizer", "model.lr_scheduler")
CAPTIONS = {
    "spikes_curves": "Loss and accuracy with spikes and kinks",
    "spikes_norms": "Norms of gradients and updates",
    "spikes_layers": "Gradients, updates and weights of each parameter",
}
NOT_RECORDED = "not recorded"


def page_of_run(facts: Facts) -> Page:
    try:
        result = str(facts.result())
    except UserError as error:
        result = f"No result: {error}"
    parts = {
        "What was trained": trained(facts),
        "Settings": settings(facts),
        "Numbers": numbers(facts),
        "Curves": curves(facts),
        "Spikes": spikes(facts),
        "Gradients and weights": gradients(facts),
        "Confusion matrix": confusions(facts),
        "Worst mistakes": mistakes(facts),
        "Submission and score": submission(facts),
    }
    return Page(result, facts.label, [Section.of(*each) for each in parts.items()])


def trained(facts: Facts) -> Iterator[Part]:
    """Origin, data, and what it took."""
    origin, chosen = facts.origin, dict(named(facts.config))
    git, versions = origin.get("git") or {}, origin.get("versions") or {}
    rows = [[name.rpartition(".")[2], str(chosen[name])] for name in CHOICES if name in chosen]
    rows.append(["seed", str(facts.seed)])
    state = {True: "", False: " with changes (code.patch, if the run has it)"}
    rows += [
        ["command", str(origin.get("command", NOT_RECORDED))],
        ["commit", f"{git['commit']}{state[git['clean']]}" if git else NOT_RECORDED],
        ["versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or NOT_RECORDED],
        ["hardware", str(origin.get("hardware", NOT_RECORDED))],
        ["precision", str(chosen.get("trainer.precision"))],
    ]
    yield Table("What was trained, with what", ["fact", "value"], rows)
    checkpoint = facts.checkpoint
    rows = [
        ["data digest (SHA-256)", str(checkpoint.get("data_digest") or NOT_RECORDED)],
        ["epoch, counted from 0", str(checkpoint["epoch"])],
        ["optimizer steps", f"{checkpoint['global_step']:,}"],
    ]
    if split := checkpoint.get("split"):
        rows.insert(1, ["digest of the folds", str(split)])
    yield Table("The checkpoint that predicts", ["fact", "value"], rows)
    hint = "time and memory were not recorded"
    times = facts.table("timing.csv", hint).replace("", "nan").astype(float)
    rows = [
        [str(name), f"{column.median():.4g}", f"{column.max():.4g}", f"{column.iloc[-1]:.4g}"]
        for name, column in times.items()
    ]
    yield Table("Time and memory (timing.csv)", ["value", "median", "largest", "last"], rows)


def settings(facts: Facts) -> Iterator[Part]:
    rows = [
        [name, shown(value, usual), shown(usual, value)]
        for name, usual, value in unusual(facts.config)
    ]
    caption = "What differs from the defaults, beside the classes chosen"
    yield Table(caption, ["setting", "value", "default"], rows)
    text = yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True)
    yield Listing("All settings (config.yaml)", text)


def numbers(facts: Facts) -> Iterator[Part]:
    """Every metric as in ``metrics.csv``, to six digits."""
    rows = []
    for name in facts.metrics:
        values = facts.values(str(name))
        if str(name).partition("/")[0] in ("train", "val", "test") and len(values):
            ends = values.iloc[-1], values.min(), values.max()
            rows.append([str(name), f"{values.index[-1]}", *(f"{x:.6g}" for x in ends)])
    if not rows:
        raise UserError("metrics.csv holds no metric of training, validation or test.")
    head = ["metric", "last step", "last value", "lowest", "highest"]
    yield Table("Metrics, of each optimizer step or each validation (metrics.csv)", head, rows)
    if not len(facts.values("val/loss")):
        yield "Missing: there was no validation."
    if not len(facts.values("test/loss")):
        yield f"Missing: there was no test; python train.py test --run {facts.folder} makes it."


def curves(facts: Facts) -> Iterator[Part]:
    told = []
    for name in ("train/loss", "val/loss", "train/accuracy", "val/accuracy"):
        if len(values := facts.values(name)):
            ends = shown_value(name, values.iloc[0]), shown_value(name, values.iloc[-1])
            told.append(f"{name} went from {ends[0]} to {ends[1]}")
    if not told:
        raise UserError("there is no loss and no accuracy to draw.")
    alt = f"{'; '.join(told)}, over {facts.metrics.index.max() + 1:,} optimizer steps."
    figure = learning_curves(facts.metrics.reset_index())
    yield Picture.of(figure, "Learning curves", f"Learning curves: {alt}")


def spikes(facts: Facts) -> Iterator[Part]:
    """How many there were, the worst with its evidence, and why."""
    steps = len(facts.values("train/loss"))
    records = [r for r in read_records(facts.folder / "spikes.jsonl") if r["spiked"]]
    run = SpikeRun.read(facts.folder, drawable(facts.label))
    if records:
        records.sort(key=lambda record: -(record["max_loss_after"] or 0))
        confirmed = sum(record["confirmed"] for record in records)
        yield f"{len(records)} spikes in {steps:,} optimizer steps, {confirmed} seen in the loss."
        rows = [
            [str(r["step"]), ", ".join(r["spiked"]), format_spike(r).partition(": ")[2]]
            for r in records[:ROWS]
        ]
        few = f", the {ROWS} worst" if len(records) > ROWS else ""
        yield Table(f"Spikes{few} (spikes.jsonl)", ["step", "in", "evidence"], rows)
    elif run.has("grad_norm/total"):
        yield f"No spike in {steps:,} optimizer steps."
    else:
        yield "Missing: the run was not watched; callbacks.GradientSpikeMonitor does it."
    path = facts.folder / "why.json"
    if path.is_file():
        why = json.loads(path.read_text())
        yield f"Why (spikes.py why): {why['verdict']} {why['remedy']}"
        rows = [[x["name"], f"{x['gone']} of {x['forks']}"] for x in why["experiments"]]
        yield Table("What takes the spike away (why.json)", ["change", "spike gone"], rows)
        alt = f"Loss around the spike, as recorded and with each change. {why['verdict']}"
        yield Picture.read(path.with_suffix(".png"), "The spike and its changes", alt)
    elif records:
        yield f"Why is not known yet: python spikes.py why {facts.folder}"
    figure = spike_pictures([run])["spikes_curves"]
    yield Picture.of(figure, CAPTIONS["spikes_curves"], alt_of(run))


def alt_of(run: SpikeRun) -> str:
    found = run.measures
    return (
        f"Loss and accuracy over the epochs and the loss of each step of {run.label}: excess loss "
        f"{found.excess:.2f}, {found.excursions} excursions, {found.kinks_val} kinks of validation."
    )


def gradients(facts: Facts) -> Iterator[Part]:
    run = SpikeRun.read(facts.folder, drawable(facts.label))
    norms = facts.values("grad_norm/total")
    if norms.empty:
        raise UserError("no norms were recorded; callbacks.GradientSpikeMonitor does it.")
    told = f"Gradient norm of a step: median {norms.median():.3g}, largest {norms.max():.3g}"
    for name, figure in spike_pictures([run]).items():
        if name != "spikes_curves":
            yield Picture.of(figure, CAPTIONS[name], f"{CAPTIONS[name]}. {told}.")
    path = facts.folder / "spikes_through_time.png"
    if path.is_file():
        alt = "Gradient of the loss with respect to each time step of the input, at the worst step."
        yield Picture.read(path, "Gradient through time", alt)


def confusions(facts: Facts) -> Iterator[Part]:
    there = [p for p in ("test", "val") if (facts.folder / f"confusion_matrix_{p}.csv").is_file()]
    for part in there or ["test"]:
        counts = facts.confusion(part)
        size, right = counts.to_numpy().sum(), counts.to_numpy().trace()
        names = [str(name) for name in counts.columns]
        told = f"{right:,} of {size:,} right ({part})"
        figure = confusion_matrix(counts.to_numpy(), [drawable(name) for name in names])
        if len(names) <= READABLE:
            rows = [
                [name, *map(str, row)] for name, row in zip(names, counts.to_numpy(), strict=True)
            ]
            yield Table(f"Confusion matrix, {told}", ["true / predicted", *names], rows)
        alt = f"Confusion matrix of {len(names)} classes, {told}; the numbers are in the CSV file."
        yield Picture.of(figure, f"Confusion matrix ({part})", alt)


def mistakes(facts: Facts) -> Iterator[Part]:
    table = facts.table(
        "mistakes.csv", f"python train.py test --run {facts.folder} makes it of images"
    )
    few = f", the {ROWS} most confident" if len(table) > ROWS else ""
    caption = f"{len(table):,} mistakes of the test{few} (mistakes.csv)"
    yield Table(caption, [str(name) for name in table], table.head(ROWS).to_numpy().tolist())
    path = facts.folder / "mistakes.png"
    if path.is_file():
        yield Picture.read(path, "Mistakes", "The images of the first rows of the table above.")


def submission(facts: Facts) -> Iterator[Part]:
    made = read_json(facts, "submission.json", f"python predict.py {facts.folder} makes it")
    keys = ("csv", "rows", "competition", "created", "sha256")
    yield Table("The prediction file", ["fact", "value"], rows_of(made, keys))
    sent = read_json(facts, "score.json", f"python submit.py {facts.folder} sends the file")
    keys = ("status", "public_score", "ref", "time", "competition", "message", "error")
    yield Table("The submission", ["fact", "value"], rows_of(sent, keys))


def read_json(facts: Facts, name: str, hint: str) -> dict[str, Any]:
    path = facts.folder / name
    if not path.is_file():
        raise UserError(f"there is no {name}; {hint}.")
    return dict(json.loads(path.read_text()))


def rows_of(found: dict[str, Any], keys: tuple[str, ...]) -> list[list[str]]:
    return [[key, str(found[key])] for key in keys if found.get(key) not in (None, "")]
