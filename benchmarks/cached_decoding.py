"""Beam search with the Transformer's cache, against reading the whole prefix again at each step.

    python -m benchmarks.cached_decoding [--rounds 3]

100 sentences of 40 tokens at the size of a corrector, 4 hypotheses of each, 40 tokens written; the
weights are random. Both ways take turns in each round, the ratio is the median of those of the
rounds, and both must write the same tokens with the same scores.
"""

import argparse
import os
import statistics
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_models.networks import Transformer, beam_search
from lit_models.networks.beam_search import Hypotheses
from lit_models.networks.transformer import DecoderState

VOCAB, SENTENCES, LENGTH, BEAM_WIDTH = 4_000, 100, 40, 4


class Prefix(NamedTuple):
    """A state without a cache.

    Attributes:
        source: What was read of the source, before anything is written.
        tokens: All that was written (N, t), the token that begins included.
    """

    source: DecoderState
    tokens: Tensor


class ReadAgain:
    """Steps of a network that keeps the source, but computes all tokens written at each step."""

    def __init__(self, network: Transformer) -> None:
        self.network = network

    def start(self, source: Tensor) -> Prefix:
        empty = torch.empty(len(source), 0, dtype=torch.long, device=source.device)
        return Prefix(self.network.start(source), empty)

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Prefix]:
        source, before = state  # beam_search makes tuples of tuples when it reorders
        prefix = torch.cat([before, tokens[:, None]], 1)
        logits, _ = self.network.decode(prefix, source)
        return logits[:, -1].log_softmax(1), Prefix(source, prefix)


def search(network: Transformer | ReadAgain, source: Tensor) -> Hypotheses:
    begin = torch.zeros(len(source), dtype=torch.long, device=source.device)
    return beam_search(network.step, network.start(source), begin, None, BEAM_WIDTH, LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = Transformer(VOCAB, 256, 8, 3, 3, hidden_size=1024).eval()
    source = torch.randint(VOCAB, (SENTENCES, LENGTH))
    ways: dict[str, Transformer | ReadAgain] = {"cache": network, "prefix": ReadAgain(network)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Hypotheses] = {}
    for way in ways.values():
        with torch.no_grad():
            search(way, source[:10])  # warm-up
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            with torch.no_grad():
                found[name] = search(way, source)
            times[name].append(time.perf_counter() - start)
    print(f"torch {version('torch')}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    for name, values in times.items():
        print(f"{name:<8} {statistics.median(values):8.2f} s")
    ratio = statistics.median(b / a for a, b in zip(times["cache"], times["prefix"], strict=True))
    print(f"the cache is {ratio:.1f} times as fast")
    cached, read_again = found["cache"], found["prefix"]
    assert (cached.lengths == LENGTH).all()
    assert torch.equal(cached.tokens, read_again.tokens), "the tokens differ"
    torch.testing.assert_close(cached.scores, read_again.scores, rtol=0, atol=1e-4)
    print("both wrote the same tokens, and their scores agree to 1e-4")


if __name__ == "__main__":
    main()
