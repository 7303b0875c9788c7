"""How well spike detectors find the spikes of synthetic training signals, ours beside public rules.

    python -m benchmarks.spike_detectors [--quick] [--seeds tuning|test]

A stream has 2000 positive values with the look of a gradient norm or of a loss: a level that
moves, and noise on the logarithm. In 14 families some steps are multiplied by a factor and must be
found, in 7 there is nothing to find. Our detector was tuned on the tuning seeds alone. Rules of
others are written anew from their descriptions, with their own defaults.

Precision and recall are pooled over all streams, NaN and infinities among the spikes. Macro F1 and
the worst family are over the 14 families with spikes; false alarms are per 1000 steps.
"""

import argparse
import math
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from steadyfit.detector import SpikeDetector

STEPS = 2000
WARM = 150  # steps before the first spike, where spikes do not come early
SEEDS = {"tuning": range(1000, 1030), "test": range(200_000, 200_040)}

# Streams. Levels and noise are natural logarithms; a factor multiplies the value of a step.


class Stream(NamedTuple):
    values: list[float]
    spikes: list[bool]


Family = Callable[[np.random.Generator], Stream]


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """A log-uniform factor."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def gaussian(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Noise whose standard deviation is drawn once for the stream."""
    return rng.uniform(low, high) * rng.standard_normal(STEPS)


def student(rng: np.random.Generator) -> np.ndarray:
    """Noise with heavy tails on both sides."""
    return rng.uniform(0.15, 0.25) * rng.standard_t(rng.uniform(3.3, 5), STEPS)


def wandering(rng: np.random.Generator) -> np.ndarray:
    """A level that climbs or falls by a factor of up to 100, in waves."""
    steps = np.arange(STEPS) / STEPS
    waves = rng.uniform(0.4, 1.2) * np.sin(2 * np.pi * (rng.uniform(3, 8) * steps + rng.random()))
    return rng.uniform(-4, 4) * steps + waves


def falling(rng: np.random.Generator) -> np.ndarray:
    """A loss that decays as a power of the step towards its floor."""
    start, floor = rng.uniform(3, 8), rng.uniform(0.2, 1.5)
    power, onset = rng.uniform(0.5, 1), rng.uniform(20, 100)
    return np.log(floor + (start - floor) * (1 + np.arange(STEPS) / onset) ** -power)


def apart(
    rng: np.random.Generator, count: int = 8, first: int = WARM, last: int = STEPS, gap: int = 20
) -> np.ndarray:
    """Random steps in [first, last), at least ``gap`` apart."""
    slack = last - first - gap * count
    return first + np.sort(rng.integers(0, slack, count)) + gap * np.arange(count)


def planted(
    rng: np.random.Generator, logs: np.ndarray, steps: np.ndarray, low: float, high: float
) -> Stream:
    """Multiply the given steps by factors between ``low`` and ``high``, and scale the stream."""
    logs = logs + math.log(between(rng, 1e-3, 1e2))
    logs[steps] += rng.uniform(math.log(low), math.log(high), len(steps))
    spikes = np.zeros(STEPS, bool)
    spikes[steps] = True
    return Stream(np.exp(logs).tolist(), spikes.tolist())


NONE = np.empty(0, int)


def stationary(rng: np.random.Generator) -> Stream:
    return planted(rng, gaussian(rng, 0.15, 0.4), apart(rng), 4, 40)


def decaying_loss(rng: np.random.Generator) -> Stream:
    return planted(rng, falling(rng) + gaussian(rng, 0.03, 0.1), apart(rng), 1.5, 5)


def drift(rng: np.random.Generator) -> Stream:
    return planted(rng, wandering(rng) + gaussian(rng, 0.15, 0.35), apart(rng), 4, 30)


def heavy_tail(rng: np.random.Generator) -> Stream:
    return planted(rng, student(rng), apart(rng), 6, 60)


def bursts(rng: np.random.Generator) -> Stream:
    """Four times, three to eight steps in a row."""
    starts = apart(rng, 4, last=STEPS - 20, gap=100)
    steps = np.concatenate([s + np.arange(rng.integers(3, 9)) for s in starts])
    return planted(rng, gaussian(rng, 0.15, 0.35), steps, 4, 30)


def clusters(rng: np.random.Generator) -> Stream:
    """Three times, six spikes within 60 steps."""
    starts = apart(rng, 3, last=STEPS - 60, gap=200)
    steps = np.concatenate([s + np.sort(rng.choice(60, 6, replace=False)) for s in starts])
    return planted(rng, gaussian(rng, 0.15, 0.35), steps, 4, 30)


def growing_noise(rng: np.random.Generator) -> Stream:
    growth = np.linspace(0.5, rng.uniform(1.5, 2.5), STEPS)
    return planted(rng, growth * gaussian(rng, 0.12, 0.2), apart(rng), 5, 50)


def small_spikes(rng: np.random.Generator) -> Stream:
    return planted(rng, gaussian(rng, 0.06, 0.14), apart(rng), 1.7, 3)


def early_spikes(rng: np.random.Generator) -> Stream:
    return planted(rng, gaussian(rng, 0.15, 0.3), apart(rng, 5, first=20, last=110, gap=8), 5, 40)


def lr_warm_up(rng: np.random.Generator) -> Stream:
    """The norm falls by a factor of 3 to 20 in the first 300 steps, spikes among them."""
    level = math.log(between(rng, 3, 20)) * np.exp(-np.arange(STEPS) / rng.uniform(50, 150))
    steps = np.concatenate([apart(rng, 3, 40, 300), apart(rng, 5, 300)])
    return planted(rng, level + gaussian(rng, 0.15, 0.35), steps, 4, 40)


def vanishing(rng: np.random.Generator) -> Stream:
    """The norm falls by four to eight orders of magnitude."""
    level = -np.linspace(0, math.log(between(rng, 1e4, 1e8)), STEPS)
    return planted(rng, level + gaussian(rng, 0.15, 0.35), apart(rng), 4, 40)


def constant(rng: np.random.Generator) -> Stream:
    return planted(rng, np.zeros(STEPS), apart(rng), 1.5, 20)


def non_finite(rng: np.random.Generator) -> Stream:
    """A third each of NaN, infinity, and ordinary spikes."""
    steps = apart(rng, 12)
    stream = planted(rng, gaussian(rng, 0.15, 0.3), steps, 5, 50)
    for step, what in zip(steps, rng.permutation([math.nan, math.inf, 0] * 4), strict=True):
        if what != 0:
            stream.values[step] = float(what)
    return stream


def lstm_like(rng: np.random.Generator) -> Stream:
    """A plateau, then ten times that, with correlated noise skewed to the right."""
    level = np.log(10) / (1 + np.exp(-(np.arange(STEPS) - rng.uniform(300, 900)) / 40))
    noise = rng.standard_normal(STEPS) + rng.exponential(0.5, STEPS)
    for step in range(1, STEPS):
        noise[step] += 0.3 * noise[step - 1]
    return planted(rng, level + rng.uniform(0.35, 0.6) * noise, apart(rng), 15, 150)


def quiet_heavy_tail(rng: np.random.Generator) -> Stream:
    return planted(rng, student(rng), NONE, 1, 1)


def quiet_drift(rng: np.random.Generator) -> Stream:
    return planted(rng, wandering(rng) + gaussian(rng, 0.15, 0.3), NONE, 1, 1)


def quiet_decay(rng: np.random.Generator) -> Stream:
    return planted(rng, falling(rng) + gaussian(rng, 0.03, 0.1), NONE, 1, 1)


def quiet_level_shift(rng: np.random.Generator) -> Stream:
    """Two lasting changes by a factor of 1.5 to 5, up or down."""
    level = np.zeros(STEPS)
    for step in apart(rng, 2, gap=200):
        level[step:] += rng.choice([-1, 1]) * math.log(between(rng, 1.5, 5))
    return planted(rng, level + gaussian(rng, 0.15, 0.3), NONE, 1, 1)


def quiet_variance_shift(rng: np.random.Generator) -> Stream:
    """The noise becomes two or three times as large, or as small."""
    change = rng.uniform(2, 3) ** rng.choice([-1, 1])
    growth = np.where(np.arange(STEPS) < rng.integers(400, 1600), 1, change)
    return planted(rng, growth * gaussian(rng, 0.12, 0.2), NONE, 1, 1)


def quiet_saw_tooth(rng: np.random.Generator) -> Stream:
    """A level that sinks in every epoch and jumps back at its end."""
    epoch = rng.integers(50, 250)
    level = rng.uniform(0.3, 0.8) * (1 - np.arange(STEPS) % epoch / epoch)
    return planted(rng, level + gaussian(rng, 0.1, 0.25), NONE, 1, 1)


def quiet_stationary(rng: np.random.Generator) -> Stream:
    return planted(rng, gaussian(rng, 0.15, 0.35), NONE, 1, 1)


SPIKY: list[Family] = [
    stationary,
    decaying_loss,
    drift,
    heavy_tail,
    bursts,
    clusters,
    growing_noise,
    small_spikes,
    early_spikes,
    lr_warm_up,
    vanishing,
    constant,
    non_finite,
    lstm_like,
]
QUIET: list[Family] = [
    quiet_heavy_tail,
    quiet_drift,
    quiet_decay,
    quiet_level_shift,
    quiet_variance_shift,
    quiet_saw_tooth,
    quiet_stationary,
]


def make(family: Family, seed: int) -> Stream:
    index = [*SPIKY, *QUIET].index(family)
    return family(np.random.default_rng([seed, index]))


# Rules


class Detector(Protocol):
    def update(self, value: float) -> bool: ...


class ZClip:
    """Kumar et al., arXiv 2504.02507: z > 2.5 of exponential mean and variance, 25 steps to start.

    What is clipped enters the statistics with its clipped value.
    """

    def __init__(self) -> None:
        self.start: list[float] = []
        self.mean = self.var = 0.0

    def update(self, value: float) -> bool:
        if len(self.start) < 25:
            self.start.append(value)
            self.mean, self.var = float(np.mean(self.start)), float(np.var(self.start))
            return False
        std = math.sqrt(self.var)
        z = (value - self.mean) / (std + 1e-6)
        spike = z > 2.5
        if spike:
            value = self.mean + 2.5 / z * 2.5 * std
        self.mean = 0.97 * self.mean + 0.03 * value
        self.var = 0.97 * self.var + 0.03 * (value - self.mean) ** 2
        return spike


class AutoClip:
    """Seetharaman et al., arXiv 2007.14469: above the 10th percentile of all values so far."""

    def __init__(self) -> None:
        self.history: list[float] = []

    def update(self, value: float) -> bool:
        self.history.append(value)
        return value > float(np.percentile(self.history, 10))


class MeanStd:
    """Above the mean by some standard deviations of the last values, all of which are stored."""

    def __init__(self, window: int, sigmas: float, start: int | None = None) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.sigmas = sigmas
        self.start = start or window

    def update(self, value: float) -> bool:
        spike = len(self.values) >= self.start and self.judge(value, self.limit())
        self.values.append(value)
        return spike

    def limit(self) -> float:
        values = np.fromiter(self.values, float, len(self.values))
        with np.errstate(invalid="ignore"):  # an infinity in the window makes the limit NaN
            return float(values.mean() + self.sigmas * values.std(ddof=1))

    def judge(self, value: float, limit: float) -> bool:
        return value > limit


class SkipStep(MeanStd):
    """The same as an optimizer: a step is taken only if its value is known to keep the limit."""

    def judge(self, value: float, limit: float) -> bool:
        return not value <= limit


class LlmC:
    """karpathy/llm.c: z > 3 among the last 128 values, the one in question included."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=128)

    def update(self, value: float) -> bool:
        self.values.append(value)
        if len(self.values) < 128:
            return False
        values = np.fromiter(self.values, float, 128)
        with np.errstate(invalid="ignore"):
            return bool(value - values.mean() > 3 * values.std())


class KillLossSpike:
    """mosaicml/llm-foundry: five times in a row twice the mean of the last 5 % of the run."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=STEPS // 20)
        self.run = 0

    def update(self, value: float) -> bool:
        full = len(self.values) == self.values.maxlen
        self.run = self.run + 1 if full and value >= 2 * float(np.mean(self.values)) else 0
        self.values.append(value)
        return self.run >= 5


class LightningRule:
    """Lightning's SpikeDetection: worse than the last and three times the mean of ten steps."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=10)

    def update(self, value: float) -> bool:
        if not math.isfinite(value):
            return True
        spike = False
        if self.values:
            mean = sum(self.values) / len(self.values)
            spike = value > self.values[-1] and abs(value - mean) >= 2 * mean
        self.values.append(value)
        return spike


class MegatronLarge:
    """NVIDIA/Megatron-LM: above ten times the largest of the first 100 values."""

    def __init__(self) -> None:
        self.count, self.largest = 0, 0.0

    def update(self, value: float) -> bool:
        if self.count < 100:
            if math.isfinite(value):
                self.count += 1
                self.largest = max(self.largest, value)
            return False
        return value > 10 * self.largest


class MedianMAD:
    """Above the median by six robust standard deviations of the last 128 values."""

    sigmas = 6.0

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=128)

    def update(self, value: float) -> bool:
        spike = False
        if len(self.values) >= 16:
            values = np.fromiter(self.values, float, len(self.values))
            median = np.median(values)
            mad = np.median(np.abs(values - median))
            spike = bool(value > median + self.sigmas * 1.4826 * mad)
        if math.isfinite(value):
            self.values.append(value)
        return spike


class LogMAD(MedianMAD):
    """The same on logarithms."""

    def update(self, value: float) -> bool:
        return super().update(math.log(value) if value > 0 else value)


class RobustLogZ:
    """Reference of a study before this one: median of 32, spread of 64, flagged values left out."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=64)
        self.run: list[float] = []

    def update(self, value: float) -> bool:
        if not 0 < value < math.inf:
            return not math.isfinite(value)
        y = math.log(value)
        count = len(self.values)
        if count >= 8:
            values = np.fromiter(self.values, float, count)
            median = np.median(values[-32:])
            mad = np.median(np.abs(values - median))
            upper = np.quantile(values, 0.9) - median
            scale = max(1.4826 * mad, upper / 1.2816, 0.04)
            if count < 32:
                scale = math.sqrt((count * scale**2 + 8 * 0.35**2) / (count + 8))
            if y - median > max(4.5 * scale, math.log(1.25)):
                self.run.append(y)
                if len(self.run) < 12:
                    return True
                self.values.clear()
                self.values.extend(self.run)
                self.run.clear()
                return False
        self.run.clear()
        self.values.append(y)
        return False


RULES: dict[str, Callable[[], Detector]] = {
    "SpikeDetector (ours)": SpikeDetector,
    "ZClip": ZClip,
    "AutoClip, 10th percentile": AutoClip,
    "OLMo-core StabilityMonitor": lambda: MeanStd(128, 6),
    "OLMo-core SkipStep": lambda: SkipStep(128, 6, 64),
    "OLMo paper, 7 sigma of 1000": lambda: MeanStd(1000, 7),
    "llm.c z": LlmC,
    "llm-foundry KillLossSpike": KillLossSpike,
    "Lightning SpikeDetection": LightningRule,
    "Megatron-LM large": MegatronLarge,
    "median/MAD": MedianMAD,
    "log median/MAD": LogMAD,
    "RobustLogZ": RobustLogZ,
}


# Scores


class Counts(NamedTuple):
    """Steps of some streams."""

    hits: int = 0
    false_alarms: int = 0
    misses: int = 0
    steps: int = 0

    @property
    def f1(self) -> float:
        return 2 * self.hits / max(1, 2 * self.hits + self.false_alarms + self.misses)

    @property
    def precision(self) -> float:
        return self.hits / max(1, self.hits + self.false_alarms)

    @property
    def recall(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def alarms_per_1000(self) -> float:
        return 1000 * self.false_alarms / self.steps


def add(counts: Iterable[Counts]) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))


def count(detector: Detector, stream: Stream) -> Counts:
    flags = np.array([detector.update(value) for value in stream.values])
    spikes = np.array(stream.spikes)
    return Counts(
        hits=int((flags & spikes).sum()),
        false_alarms=int((flags & ~spikes).sum()),
        misses=int((~flags & spikes).sum()),
        steps=len(flags),
    )


def evaluate(
    rule: Callable[[], Detector],
    seeds: Iterable[int],
    families: Sequence[Family] = (*SPIKY, *QUIET),
) -> dict[Family, Counts]:
    """Counts of each family, added up over the seeds."""
    seeds = list(seeds)
    return {family: add(count(rule(), make(family, seed)) for seed in seeds) for family in families}


def microseconds(rounds: int) -> dict[str, float]:
    """CPU time per update, the median over rounds in which the rules take turns."""
    times: dict[str, list[float]] = {name: [] for name in RULES}
    values = make(stationary, 0).values
    for _ in range(rounds):
        for name, rule in RULES.items():
            detector = rule()
            start = time.process_time()
            for value in values:
                detector.update(value)
            times[name].append(1e6 * (time.process_time() - start) / len(values))
    return {name: statistics.median(own) for name, own in times.items()}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds: a trial run")
    parser.add_argument("--seeds", choices=SEEDS, default="test")
    options = parser.parse_args(args)
    seeds = SEEDS[options.seeds][:2] if options.quick else SEEDS[options.seeds]

    print(f"Python {platform.python_version()}, numpy {np.__version__}, ", end="")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread")
    print(f"{options.seeds} seeds {seeds[0]} to {seeds[-1]}, ", end="")
    print(f"{len(SPIKY)} families with spikes and {len(QUIET)} without, {STEPS} steps each\n")
    print(
        f"{'':<29}{'precision':>9}{'recall':>8}{'F1':>7}{'macro':>7}{'worst':>7} {'family':<15}",
        end="",
    )
    print(f"{'FA/1000':>8}{'quiet':>8}{'us':>7}")
    times = microseconds(3 if options.quick else 9)
    for name, rule in RULES.items():
        counts = evaluate(rule, seeds)
        if rule is SpikeDetector:
            ours = counts
        pooled, quiet = add(counts.values()), add(counts[family] for family in QUIET)
        worst = min(SPIKY, key=lambda family: counts[family].f1)
        macro = statistics.mean(counts[family].f1 for family in SPIKY)
        print(f"{name:<29}{pooled.precision:>9.3f}{pooled.recall:>8.3f}{pooled.f1:>7.3f}", end="")
        print(f"{macro:>7.3f}{counts[worst].f1:>7.3f} {worst.__name__:<15}", end="")
        print(f"{pooled.alarms_per_1000:>8.3f}{quiet.alarms_per_1000:>8.3f}{times[name]:>7.1f}")

    print("\nours, F1:")
    print(", ".join(f"{family.__name__} {ours[family].f1:.2f}" for family in SPIKY))
    print("ours, false alarms per 1000:")
    print(
        ", ".join(
            f"{f.__name__.removeprefix('quiet_')} {ours[f].alarms_per_1000:.2f}" for f in QUIET
        )
    )


if __name__ == "__main__":
    main()
