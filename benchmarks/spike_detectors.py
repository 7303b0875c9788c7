"""How well spike detectors find the spikes of synthetic training signals, ours beside public rules.

    python -m benchmarks.spike_detectors [--families first|tuned|held_out] [--quick]
        [--seeds tuning|test]

The streams are those of ``spike_streams``: 21 families on all of which our detector was tuned, 6
newer ones on which it was tuned, and 6 that were held out. It was tuned on the tuning seeds alone.
Rules of others are written anew from their descriptions, with their own defaults.

Precision and recall are pooled over all streams, NaN and infinities among the spikes. Macro F1 and
the worst family are over the families with spikes; false alarms are per 1000 steps.
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

from benchmarks.spike_streams import (
    HELD_OUT,
    QUIET,
    SPIKY,
    STEPS,
    TUNED,
    Family,
    Stream,
    make,
    stationary,
)
from steadyfit.detector import SpikeDetector

SEEDS = {"tuning": range(1000, 1030), "test": range(200_000, 200_040)}
SETS = {"first": [*SPIKY, *QUIET], "tuned": TUNED, "held_out": HELD_OUT}

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
    spikes, judged = np.array(stream.spikes), ~np.array(stream.ignored)
    return Counts(
        hits=int((flags & spikes).sum()),
        false_alarms=int((flags & ~spikes & judged).sum()),
        misses=int((~flags & spikes).sum()),
        steps=int(judged.sum()),
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
    parser.add_argument("--families", choices=SETS, default="first")
    options = parser.parse_args(args)
    seeds = SEEDS[options.seeds][:2] if options.quick else SEEDS[options.seeds]
    families = SETS[options.families]
    quiet_ones = [family for family in families if family.__name__.startswith("quiet_")]
    spiky = [family for family in families if family not in quiet_ones]

    print(f"Python {platform.python_version()}, numpy {np.__version__}, ", end="")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread")
    print(f"{options.seeds} seeds {seeds[0]} to {seeds[-1]}, ", end="")
    print(f"{len(spiky)} families with spikes and {len(quiet_ones)} without, {STEPS} steps each\n")
    print(
        f"{'':<29}{'precision':>9}{'recall':>8}{'F1':>7}{'macro':>7}{'worst':>7} {'family':<16}",
        end="",
    )
    print(f"{'FA/1000':>8}{'quiet':>8}{'us':>7}")
    times = microseconds(3 if options.quick else 9)
    for name, rule in RULES.items():
        counts = evaluate(rule, seeds, families)
        if rule is SpikeDetector:
            ours = counts
        pooled, quiet = add(counts.values()), add(counts[family] for family in quiet_ones)
        worst = min(spiky, key=lambda family: counts[family].f1)
        macro = statistics.mean(counts[family].f1 for family in spiky)
        print(f"{name:<29}{pooled.precision:>9.3f}{pooled.recall:>8.3f}{pooled.f1:>7.3f}", end="")
        print(f"{macro:>7.3f}{counts[worst].f1:>7.3f} {worst.__name__:<16}", end="")
        print(f"{pooled.alarms_per_1000:>8.3f}{quiet.alarms_per_1000:>8.3f}{times[name]:>7.1f}")

    print("\nours, F1 (recall, false alarms per 1000):")
    for family in spiky:
        found = ours[family]
        print(f"  {family.__name__:<18}{found.f1:.2f}", end="")
        print(f" ({found.recall:.2f}, {found.alarms_per_1000:.2f})")
    print("ours, false alarms per 1000:")
    for family in quiet_ones:
        print(f"  {family.__name__:<21}{ours[family].alarms_per_1000:.2f}")


if __name__ == "__main__":
    main()
