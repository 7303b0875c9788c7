"""Time of a training step of every recurrent core, as a ratio to PyTorch's own RNN.

    python -m benchmarks.recurrences
    python -m benchmarks.recurrences --quick  # three rounds

Forward and backward pass of one layer on sequences (B, T, D); all cores take turns in each round,
and the ratio is the median of those of the rounds. ``attention_rnn`` looks back on two states.
"""

import argparse
import os
import statistics
import time
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from lit_models.networks import GRU, LSTM, RNN, AttentionRNN, GatedRNN, VanillaLSTM, VanillaRNN

CORES: dict[str, Any] = {
    "rnn": RNN,
    "vanilla_rnn": VanillaRNN,
    "gated_rnn": GatedRNN,
    "attention_rnn": AttentionRNN,
    "attention_rnn_of_all_states": partial(AttentionRNN, past="inf"),
    "lstm": LSTM,
    "vanilla_lstm": VanillaLSTM,
    "gru": GRU,
}


def seconds(core: torch.nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    core(x)[:, -1].sum().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="sequences B")
    parser.add_argument("--steps", type=int, default=80, help="time steps T")
    parser.add_argument("--features", type=int, default=64, help="features D of a step")
    parser.add_argument("--hidden", type=int, default=64, help="units H")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    options = parser.parse_args()
    torch.manual_seed(0)
    cores = {name: make(options.features, options.hidden) for name, make in CORES.items()}
    x = torch.randn(options.batch, options.steps, options.features)
    for core in cores.values():
        seconds(core, x)  # warm-up
    times: dict[str, list[float]] = {name: [] for name in cores}
    for _ in range(3 if options.quick else options.rounds):
        for name, core in cores.items():
            times[name].append(seconds(core, x))
    print(f"torch {version('torch')}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    print(f"B {options.batch}, T {options.steps}, D {options.features}, H {options.hidden}")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["rnn"], strict=True))
        print(f"{name:<28} {1e3 * statistics.median(values):7.2f} ms  {ratio:5.2f} x rnn")


if __name__ == "__main__":
    main()
