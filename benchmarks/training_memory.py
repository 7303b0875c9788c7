"""Memory of a training step of a Transformer, by the way its attention is computed.

    python -m benchmarks.training_memory

UCSB's homework 2 asks for it, problem 3.4: 16 sentences of 512 tokens in float32, plain SGD. Each
row is a step that is really taken, on CUDA if there is one, in up to 4 GiB.
"""

import argparse
import os
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from callbacks.training.training_cost import Cost, training_cost
from lit_models import LitClassifier
from lit_models.networks import Transformer

VOCAB = 4_000


def measure(batch_size: int, length: int, dropout: float, plain: bool, device: str = "cpu") -> Cost:
    """Cost of a step whose attention PyTorch chooses, or which keeps the softmax (``plain``)."""
    torch.manual_seed(0)
    network = Transformer(VOCAB, dropout=dropout, max_length=length)
    for norm in ("encoder_norm", "decoder_norm"):  # the homework has none there
        setattr(network, norm, nn.Identity())
    # which of the tokens follows each one of the target is a classification at every step
    model = LitClassifier(network, partial(torch.optim.SGD, lr=0.1), VOCAB).to(device)
    batch = list(torch.randint(VOCAB, (3, batch_size, length), device=device))
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return training_cost(model, model.configure_optimizers(), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="sentences")
    parser.add_argument("--length", type=int, default=512, help="tokens of source and of target")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"torch {version('torch')}, {name}; {options.batch} sentences of {options.length} tokens")
    print(f"{'attention':<12}{'dropout':>8}{'activations':>14}{'peak':>10}  MiB")
    for plain in (False, True):
        for dropout in (0.0, 0.1):
            cost = measure(options.batch, options.length, dropout, plain, device)
            print(f"{'plain' if plain else 'fused':<12}{dropout:>8}", end="")
            print(f"{cost.activations:>14,.1f}{cost.peak:>10,.1f}")


if __name__ == "__main__":
    main()
