"""Which signals of the untouched temporal-order LSTM announce that its loss is about to spike.

    python -m benchmarks.spike_predictors --output FOLDER [--tuning SEED ...] [--seeds SEED ...]

Trains the network of ``configs/temporal_order_lstm.yaml`` in a bare loop and keeps what it records
of each step as ``FOLDER/SEED.npz``; a file that is there is not made again. The signals are known
before the update of their step is applied, except for the update's own norm and the loss of the
same batch after it.

An excursion (see ``steadyfit.measures``, those within 10 steps are one) is announced by a flag in
the 10 steps before it starts; a flag from there to 5 steps after its end is no false alarm. A
signal's threshold is the one with 2 false alarms per 1000 steps on the tuning seeds. ``random`` is
the share of the excursions that as many flags at random steps would announce; ``earlier`` the share
that is flagged a step or more before the monitor's rules on gradient, update and loss flag it.

``turn`` is the curvature along the last update from two successive gradients, as a share of the
slope there: 1 - g(t+1).d / g(t).d. Above 2 the step has gone beyond where it is of use: that is the
preconditioned curvature beyond 2/lr of arXiv:2506.04805, without the need for a learning rate.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.spike_episodes import merged
from datamodules.sequences.temporal_order import LEVELS, PAD, clean_sequences
from lit_models.networks import LSTM, Recurrent
from steadyfit.detector import NORM_MIN_SCALE, SpikeDetector
from steadyfit.measures import Spans, excursions
from steadyfit.watching.optimizer_monitor import PROMISE, PROMISE_RATIO

EPOCHS, EPOCH_SIZE, BATCH_SIZE = 100, 992, 32
BEFORE, AFTER = 10, 5  # steps around an excursion where a flag is none too many
ALARMS = 2.0  # per 1000 steps
# the paper's threshold, and the lowest whole number with less than 2 alarms on the tuning seeds
FIXED = {"turn": 2.0, "promised decrease / loss": 5.0}

Record = dict[str, np.ndarray]  # of S steps, each (S,)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def train(seed: int) -> Record:
    """The loss, the norms and the slopes of each step.

    ``slope`` is the product of gradient and update, ``last_slope`` that of the gradient and the
    update before, ``own_loss`` the loss of the same batch after the update.
    """
    torch.manual_seed(seed)
    network = Recurrent(LSTM(8, 12), num_classes=4)
    parameters = list(network.parameters())
    optimizer = torch.optim.RMSprop(parameters, lr=1e-3)
    one_hot = torch.eye(PAD + 1, PAD)
    rows: list[dict[str, float]] = []
    last_update = torch.zeros(sum(parameter.numel() for parameter in parameters))
    for epoch in range(EPOCHS):
        data = clean_sequences(LEVELS["moderate"], "train", epoch * EPOCH_SIZE, EPOCH_SIZE, seed)
        batches = (part.split(BATCH_SIZE) for part in data)
        for symbols, target in zip(*batches, strict=True):
            inputs = one_hot[symbols.long()]
            before = flat(parameters)
            optimizer.zero_grad()
            loss = F.cross_entropy(network(inputs), target)
            loss.backward()
            optimizer.step()
            gradient = flat([parameter.grad for parameter in parameters])  # type: ignore[misc]
            update = flat(parameters) - before
            with torch.no_grad():
                own_loss = F.cross_entropy(network(inputs), target)
            row = {"loss": loss, "own_loss": own_loss}
            row |= {"gradient": gradient.norm(), "update": update.norm()}
            row |= {"slope": gradient @ update, "last_slope": gradient @ last_update}
            rows.append({name: value.item() for name, value in row.items()})
            last_update = update
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def signals(record: Record) -> Record:
    """What may announce an excursion, by name; higher is worse."""
    decrease = -record["slope"]  # that the update promises to first order, in nats
    last = np.concatenate([[np.nan], decrease[:-1]])
    turn = 1 + record["last_slope"] / last
    return {
        "gradient norm": record["gradient"],
        "update norm": record["update"],
        "loss": record["loss"],
        "turn": turn,
        "promised decrease": decrease,
        "promised decrease / loss": decrease / record["loss"],
        "promised decrease x (1 + turn)": decrease * (1 + np.maximum(turn, 0)),
        "same batch again: loss ratio": record["own_loss"] / record["loss"],
    }


def monitored(record: Record) -> Record:
    """Flags of the rules of the monitor, of each signal apart and of all."""
    flags = {
        name: np.array([detector.update(value) for value in record[name].tolist()])
        for name, detector in (
            ("gradient", SpikeDetector(min_scale=NORM_MIN_SCALE)),
            ("update", SpikeDetector(min_scale=NORM_MIN_SCALE)),
            ("loss", SpikeDetector()),
        )
    }
    flags["promise"] = promises(signals(record)["promised decrease / loss"])
    norms = flags["gradient"] | flags["update"]
    early = norms | flags["promise"]
    return flags | {"gradient or update": norms, "or promise": early, "any": early | flags["loss"]}


def promises(values: np.ndarray) -> np.ndarray:
    """Flags (S,) of the monitor's rule for what a step promises to take off its loss."""
    usual = SpikeDetector(min_scale=NORM_MIN_SCALE)
    flags = []
    for value in values.tolist():
        usual.update(value)
        flags.append(value > max(PROMISE, PROMISE_RATIO * usual.center))
    return np.array(flags)


def near(spans: Spans, steps: int) -> np.ndarray:
    """Steps (S,) on which a flag is no false alarm."""
    marked = np.zeros(steps, bool)
    for start, end in spans:
        marked[max(0, start - BEFORE) : end + AFTER + 1] = True
    return marked


def spans_of(record: Record) -> Spans:
    return merged(excursions(record["loss"]))


def threshold(records: list[Record], signal: str) -> float:
    """The value above which there are ``ALARMS`` false alarms per 1000 steps."""
    quiet = []
    for record in records:
        values = signals(record)[signal]
        quiet.append(values[~near(spans_of(record), len(values)) & np.isfinite(values)])
    ordered = np.sort(np.concatenate(quiet))[::-1]
    steps = sum(len(record["loss"]) for record in records)
    return float(ordered[int(ALARMS * steps / 1000)])


def row(records: list[Record], rule: Callable[[Record], np.ndarray]) -> str:
    """One line of the table: what these flags announce, and at which price."""
    announced = one_before = earlier = count = alarms = steps = 0
    by_chance = 0.0
    for record in records:
        flags, spans = rule(record), spans_of(record)
        monitor = monitored(record)
        others = monitor["gradient or update"] | monitor["loss"]
        alarms += int((flags & ~near(spans, len(flags))).sum())
        steps += len(flags)
        for start, end in spans:
            window = slice(max(0, start - BEFORE), end + 1)
            first = np.append(np.flatnonzero(flags[window]), end + 1)[0]
            earlier += bool(first < np.append(np.flatnonzero(others[window]), end + 1)[0])
            announced += bool(flags[max(0, start - BEFORE) : start].any())
            one_before += bool(flags[start - 1])
        count += len(spans)
        by_chance += len(spans) * (1 - (1 - flags.mean()) ** BEFORE)
    shares = [100 * part / count for part in (announced, by_chance, one_before, earlier)]
    return "".join(f"{share:>10.0f}" for share in shares) + f"{1000 * alarms / steps:>10.2f}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tuning", type=int, nargs="+", default=range(211, 216))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(201, 211))
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    records = {}
    for seed in [*options.tuning, *options.seeds]:
        file = options.output / f"{seed}.npz"
        if not file.exists():
            np.savez(file, **train(seed))  # type: ignore[arg-type]
        records[seed] = dict(np.load(file))
    tuning, test = ([records[s] for s in seeds] for seeds in (options.tuning, options.seeds))

    count = sum(len(spans_of(record)) for record in test)
    print(f"{len(test)} runs, {count} excursions; shares in %\n")
    print(f"{'':<32}{'above':>8}{'announced':>10}{'random':>10}{'one before':>10}", end="")
    print(f"{'earlier':>10}{'FA/1000':>10}")
    for signal in signals(test[0]):
        limit = threshold(tuning, signal)
        line = row(test, lambda record: signals(record)[signal] > limit)  # noqa: B023
        print(f"{signal:<32}{limit:>8.3g}{line}")
    for signal, limit in FIXED.items():
        line = row(test, lambda record: signals(record)[signal] > limit)  # noqa: B023
        print(f"{signal:<32}{limit:>8.3g}{line}")
    print("\nSpikeDetector")
    for name in monitored(test[0]):
        line = row(test, lambda record: monitored(record)[name])  # noqa: B023
        print(f"{name:<32}{'':>8}{line}")


if __name__ == "__main__":
    main()
