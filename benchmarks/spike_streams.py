"""Streams of synthetic training signals whose spikes are known.

A stream has 2000 positive values with the look of a gradient norm or of a loss: a level that
moves, and noise on the logarithm. Levels and noise are natural logarithms here; a factor multiplies
the value of a step, and a spike is a step so multiplied.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

STEPS = 2000
WARM = 150  # steps before the first spike, where spikes do not come early


class Stream(NamedTuple):
    """Values, the steps that must be found, and those of which nothing is asked."""

    values: list[float]
    spikes: list[bool]
    ignored: list[bool]


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
    return marked(logs, steps)


NONE = np.empty(0, int)


def marked(logs: np.ndarray, steps: np.ndarray, tails: np.ndarray = NONE) -> Stream:
    """A stream whose given steps are spikes; in the tails that are none, nothing is asked."""
    spikes, ignored = np.zeros(STEPS, bool), np.zeros(STEPS, bool)
    ignored[tails] = True
    spikes[steps], ignored[steps] = True, False
    return Stream(np.exp(logs).tolist(), spikes.tolist(), ignored.tolist())


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


# Twelve more, in six pairs. Of each pair a coin (numpy's generator 21) made one `TUNED`, on which
# the detector may be tuned, and one `HELD_OUT`, before it had seen either.


def raised(
    rng: np.random.Generator, starts: np.ndarray, low: float, high: float, jitter: float
) -> tuple[np.ndarray, np.ndarray]:
    """Trains of three to eight steps of about one height: the steps, and their logarithms."""
    lengths = rng.integers(3, 9, len(starts))
    factors = rng.uniform(math.log(low), math.log(high), len(starts))
    steps = np.concatenate([s + np.arange(n) for s, n in zip(starts, lengths, strict=True)])
    heights = np.repeat(factors, lengths) + jitter * rng.standard_normal(lengths.sum())
    return steps, heights


def trains(rng: np.random.Generator) -> Stream:
    """Six to ten trains of raised steps, and a spike 20 to 50 steps after every other."""
    starts = apart(rng, int(rng.integers(6, 11)), last=STEPS - 60, gap=90)
    steps, heights = raised(rng, starts, 4, 25, rng.uniform(0.1, 0.4))
    logs = gaussian(rng, 0.15, 0.3)
    logs[steps] += heights
    alone = starts[::2] + rng.integers(30, 60, len(starts[::2]))
    logs[alone] += rng.uniform(math.log(5), math.log(40), len(alone))
    return marked(logs, np.concatenate([steps, alone]))


def loss_trains(rng: np.random.Generator) -> Stream:
    """A falling loss with five to eight trains of raised steps."""
    starts = apart(rng, int(rng.integers(5, 9)), last=STEPS - 10, gap=60)
    steps, heights = raised(rng, starts, 1.7, 6, rng.uniform(0.05, 0.15))
    logs = falling(rng) + gaussian(rng, 0.03, 0.1)
    logs[steps] += heights
    return marked(logs, steps)


def recovering(
    rng: np.random.Generator, logs: np.ndarray, steps: np.ndarray, heights: np.ndarray, power: float
) -> Stream:
    """Spikes whose height goes back to zero in 5 to 30 steps, the slower the lower ``power``."""
    tails: list[int] = []
    for step, height in zip(steps, heights, strict=True):
        length = min(int(rng.integers(5, 31)), STEPS - 1 - step)
        after = np.arange(length + 1)
        logs[step : step + length + 1] += height * (1 - after / (length + 1)) ** power
        tails.extend(step + after[1:])
    return marked(logs, steps, np.array(tails, int))


def recovery_tail(rng: np.random.Generator) -> Stream:
    """Spikes that are mostly over after a few steps and all over after 5 to 30."""
    steps = apart(rng, 8, last=STEPS - 2, gap=45)
    heights = rng.uniform(math.log(6), math.log(60), len(steps))
    return recovering(rng, gaussian(rng, 0.15, 0.35), steps, heights, rng.uniform(2, 4))


def slow_recovery(rng: np.random.Generator) -> Stream:
    """Spikes of a recurrent net: correlated noise, and a way back as long as 30 steps."""
    noise = rng.standard_normal(STEPS)
    for step in range(1, STEPS):
        noise[step] += 0.4 * noise[step - 1]
    steps = apart(rng, 8, last=STEPS - 2, gap=60)
    heights = rng.uniform(math.log(10), math.log(150), len(steps))
    return recovering(rng, rng.uniform(0.2, 0.4) * noise, steps, heights, rng.uniform(1, 2))


def lognormal_spikes(rng: np.random.Generator) -> Stream:
    """A spike about every 200 steps, some of them hardly above the noise."""
    steps = 200 * np.arange(1, 10) + rng.integers(-60, 61, 9)
    return planted(rng, gaussian(rng, 0.3, 0.3), steps, 4, 20)


def frequent_spikes(rng: np.random.Generator) -> Stream:
    """A spike of three to eight times every 30 to 80 steps, each alone."""
    steps = WARM + np.cumsum(rng.integers(30, 81, 60))
    return planted(rng, gaussian(rng, 0.08, 0.15), steps[steps < STEPS], 3, 8)


def explosion(rng: np.random.Generator) -> Stream:
    """A loss at some ten thousand times its level for 40 steps, then back; spikes before and after.

    Only the first step of the explosion is asked for.
    """
    start = int(rng.integers(400, 900))
    logs = gaussian(rng, 0.05, 0.12)
    blown = start + np.arange(40)
    unrest = rng.uniform(0.1, 0.5) * rng.standard_normal(40)
    logs[blown] += math.log(between(rng, 1e3, 1e5)) + unrest
    before = apart(rng, 3, last=start, gap=20)
    after = apart(rng, 8, first=start + 45, last=start + 700, gap=20)
    steps = np.concatenate([before, after])
    logs[steps] += rng.uniform(math.log(2), math.log(8), len(steps))
    return marked(logs, np.append(steps, start), blown)


def two_modes(rng: np.random.Generator) -> Stream:
    """A falling loss; a share of the batches has a loss of about twice the others'."""
    logs = falling(rng) + gaussian(rng, 0.04, 0.1)
    logs[rng.random(STEPS) < rng.uniform(0.05, 0.4)] += math.log(rng.uniform(1.4, 2.2))
    return planted(rng, logs, apart(rng), 5, 30)


def heavier_tail(rng: np.random.Generator) -> Stream:
    noise = rng.uniform(0.12, 0.22) * rng.standard_t(rng.uniform(2.8, 4), STEPS)
    return planted(rng, noise, apart(rng), 8, 80)


def noise_jump(rng: np.random.Generator) -> Stream:
    """The noise grows threefold from one step to the next."""
    noise = gaussian(rng, 0.06, 0.1)
    noise[rng.integers(500, 1500) :] *= rng.uniform(2.5, 3.5)
    return planted(rng, noise, apart(rng), 6, 60)


def quiet_skewed(rng: np.random.Generator) -> Stream:
    """Correlated noise with its longer tail on the right."""
    noise = rng.gamma(rng.uniform(2, 4), 1, STEPS)
    for step in range(1, STEPS):
        noise[step] += 0.5 * noise[step - 1]
    return planted(rng, rng.uniform(0.08, 0.15) * noise, NONE, 1, 1)


def quiet_waves(rng: np.random.Generator) -> Stream:
    """Cycles of the learning rate: up by 1.3 to 2.5 times in a tenth of a cycle, then down."""
    phase = np.arange(STEPS) / rng.uniform(200, 500) % 1
    wave = np.where(phase < 0.1, phase / 0.1, (1 - phase) / 0.9)
    level = math.log(between(rng, 1.3, 2.5)) * wave - rng.uniform(0, 2) * np.arange(STEPS) / STEPS
    return planted(rng, level + gaussian(rng, 0.06, 0.2), NONE, 1, 1)


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


TUNED: list[Family] = [
    trains,
    slow_recovery,
    lognormal_spikes,
    two_modes,
    heavier_tail,
    quiet_waves,
]
HELD_OUT: list[Family] = [
    loss_trains,
    recovery_tail,
    frequent_spikes,
    explosion,
    noise_jump,
    quiet_skewed,
]


def make(family: Family, seed: int) -> Stream:
    index = [*SPIKY, *QUIET, *TUNED, *HELD_OUT].index(family)
    return family(np.random.default_rng([seed, index]))
