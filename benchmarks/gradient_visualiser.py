"""The states of a recurrent network and the gradients by them, step by step, before any training.

    python -m benchmarks.gradient_visualiser --nonlinearity identity tanh --weight_scale 1 2 4

Dimensions: T time steps.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from callbacks.pictures.hidden_gradients import Trace, trace
from core.errors import UserError, exit_on_user_error
from core.files import atomic_write
from datamodules.sequences.running_mean import running_mean
from lit_models.networks import Recurrent, VanillaRNN
from lit_models.networks.unrolled import ACTIVATIONS
from steadyfit.panels import LINES, heading, legend


def untrained(
    nonlinearity: str, weight_scale: float, bias_scale: float, steps: int, loss: str, seed: int
) -> Trace:
    """The states of an untrained network that shall tell the mean of all numbers so far.

    One sequence x (1, T, 1) from N(0, 1), 16 units, mean squared error; of Berkeley CS182,
    homework 6, "Implementing RNNs". The same numbers are drawn for all settings.

    Args:
        nonlinearity: Of the units.
        weight_scale: Factor on the recurrent matrix as it was drawn.
        bias_scale: Factor on the bias as it was drawn.
        steps: Length T.
        loss: ``last`` step or ``every`` step.
        seed: Of the numbers.
    """
    torch.manual_seed(seed)
    core = VanillaRNN(1, 16, nonlinearity=nonlinearity, weight_scale=weight_scale)  # type: ignore[arg-type]
    for name, parameter in core.named_parameters():
        parameter.data *= bias_scale if name.endswith("bias") else 1
    network = Recurrent(core, 1, read=loss)  # type: ignore[arg-type]
    x = torch.randn(1, steps, 1)
    target = running_mean(x[:, :, 0])[:, :, None]  # (1, T, 1)
    target = target[:, -1] if loss == "last" else target
    (layer,) = trace(network, lambda: (network(x) - target).square().mean()).values()
    return layer.of_batch()


def curves(columns: Mapping[str, Mapping[str, Trace]]) -> Figure:
    """|h[t]| and |dL/dh[t]| against t, as the gradient visualiser of Berkeley CS182 shows them.

    Args:
        columns: The lines of each column by their label; norms of the batch (T,).
    """
    size = (max(6.0, 3.6 * len(columns)), 6.0)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for (above, below), (title, lines) in zip(grid.T, columns.items(), strict=True):
        heading(above, title, lines=0)
        for colour, (label, line) in zip(LINES, lines.items(), strict=False):
            time = 1 + np.arange(len(line.states))
            above.plot(time, line.states, ".-", color=colour, label=label)
            below.plot(time, line.gradients, ".-", color=colour)
        below.set_xlabel("time step t")
    for row, label, limits in zip(
        grid, ("|h(t)|", "|dL / dh(t)|"), ((1e-3, 1e5), (1e-6, 1e5)), strict=True
    ):
        row[0].set_ylabel(label)
        for axes in row:
            axes.set_yscale("log")
            axes.set_ylim(*limits)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    legend(figure, grid)
    return figure


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradient_visualiser",
        description="Draw |h(t)| and |dL/dh(t)| of a recurrent network that is to tell the running "
        "mean, a column for each nonlinearity and a line for each scale of the recurrent weights.",
        allow_abbrev=False,
    )
    parser.add_argument("--nonlinearity", nargs="+", choices=[*ACTIVATIONS], default=["tanh"])
    parser.add_argument("--weight_scale", nargs="+", type=float, default=[1.0], metavar="FACTOR")
    parser.add_argument("--bias_scale", type=float, default=1.0, metavar="FACTOR")
    parser.add_argument("--steps", type=int, default=10, metavar="T", help="default: 10")
    parser.add_argument("--loss", choices=["last", "every"], default="last", help="of which step")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--output", type=Path, default=Path("gradients.png"))
    options = parser.parse_args(args)
    with exit_on_user_error():
        if options.steps < 1:
            raise UserError(f"--steps must be at least 1, got {options.steps}.")
        columns: dict[str, dict[str, Trace]] = {}
        for nonlinearity in options.nonlinearity:
            for scale in options.weight_scale:
                seen = untrained(
                    nonlinearity,
                    scale,
                    options.bias_scale,
                    options.steps,
                    options.loss,
                    options.seed,
                )
                label = f"W_h x {scale:g}, |eigenvalue| {seen.radius:.2f}"
                columns.setdefault(nonlinearity, {})[label] = seen
                first, last = seen.gradients[0], seen.gradients[-1]
                print(f"{nonlinearity}, {label}: |dL/dh(1)| {first:.3g}, |dL/dh(T)| {last:.3g}")
        with atomic_write(options.output) as file:
            curves(columns).savefig(file, format="png", dpi=120)
        print(f"The picture is in {options.output}.")


if __name__ == "__main__":
    main()
