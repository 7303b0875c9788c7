"""What sinusoidal positions do to attention: a product that depends on the distance alone.

    python -m benchmarks.positional_encoding --output docs/positional_encoding.png

Prints p(t) . p(s) at some distances, by its formula and by the table of the Transformer, and draws
it beside the attention of an untrained head to a sentence that repeats its words, with and without
positions. Dimensions: T tokens, D features.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from core.errors import UserError, exit_on_user_error
from core.files import atomic_write
from lit_models.networks.attention import Attention, Block
from lit_models.networks.transformer import sinusoidal_positions
from steadyfit.panels import BLUE, VERMILION, heading

LAGS = (0, 1, 2, 5, 10, 50, 100, 500)
START = 7  # any: the product of positions START and START + lag is the same


def product(lags: Tensor, dim: int) -> Tensor:
    """p(t) . p(t + lag) = sum of cos(w_k lag) over the D / 2 frequencies w_k, in float64."""
    w = 10_000 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (lags.double()[:, None] * w).cos().sum(1)


def of_table(lags: Tensor, dim: int) -> Tensor:
    """The same by the vectors that the Transformer adds to its tokens."""
    table = sinusoidal_positions(START + int(lags.max()) + 1, dim)
    return table[START + lags] @ table[START]


def sentence(dim: int, words: int = 6, length: int = 24) -> Tensor:
    """Embedded tokens (T, D) of about unit variance, the same few words again and again."""
    return torch.randn(words, dim)[torch.arange(length) % words]


def attention(x: Tensor) -> Tensor:
    """Weights (T, T) of one untrained head that asks with the tokens (T, D) themselves.

    Query and key begin as one matrix, an orthogonal one, so that a token looks for its like: what
    is seen is the product of two tokens, and not the chance of two random matrices.
    """
    dim = x.shape[1]
    layer = Attention(Block(dim, 1, 0, 0.0, bias=False, norm=False))
    nn.init.orthogonal_(layer.query.weight)
    layer.key_value.weight.data[:dim] = layer.query.weight
    query, keys = layer.split(layer.query(x[None])), layer.keys_values(x[None]).keys
    return (query @ keys.transpose(2, 3) / math.sqrt(dim)).softmax(3)[0, 0].detach()


def picture(dim: int) -> Figure:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, *others = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    lags = torch.arange(max(LAGS) + 1)
    left.plot(lags.numpy(), product(lags, dim).numpy(), color=BLUE, label="sum of cosines")
    left.plot(
        LAGS,
        of_table(torch.tensor(LAGS), dim).numpy(),
        "o",
        color=VERMILION,
        label="table of the network",
    )
    left.set_xscale("symlog", linthresh=1)
    left.set_xticks(LAGS, LAGS)
    left.minorticks_off()
    left.set_xlabel("distance t - s")
    left.set_ylabel("p(t) . p(s)")
    left.grid(alpha=0.3)
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    heading(left, f"Product of two positions, D = {dim}", lines=0)
    x = sentence(dim)
    maps = {
        "Attention without positions": attention(x),
        "with positions": attention(x + sinusoidal_positions(*x.shape)),
    }
    for axes, (title, weights) in zip(others, maps.items(), strict=True):
        image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("token that is seen")
        axes.set_ylabel("token that asks")
        heading(axes, title, lines=0)
    figure.colorbar(image, ax=others, label="weight")
    return figure


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.positional_encoding",
        description="Print and draw what sinusoidal positions do to attention.",
        allow_abbrev=False,
    )
    parser.add_argument("--dim", type=int, default=64, help="features D, an even number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("positional_encoding.png"))
    options = parser.parse_args(args)
    with exit_on_user_error():
        if options.dim < 2 or options.dim % 2:
            raise UserError(f"--dim must be even and positive, got {options.dim}.")
        torch.manual_seed(options.seed)
        lags = torch.tensor(LAGS)
        print(f"{'distance':>8}{'formula':>12}{'table':>12}")
        for row in zip(LAGS, product(lags, options.dim), of_table(lags, options.dim), strict=True):
            print("{:>8}{:>12.6f}{:>12.6f}".format(*row))
        with atomic_write(options.output) as file:
            picture(options.dim).savefig(file, format="png", dpi=100)
        print(f"The picture is in {options.output}.")


if __name__ == "__main__":
    main()
