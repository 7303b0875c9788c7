r"""Parameters, operations and memory of a training step of every shipped config, as Markdown.

    python -m benchmarks.network_costs
    python -m benchmarks.network_costs configs/temporal_order_lstm.yaml \
        --model.network.rnn=lit_models.networks.GatedRNN

Of the first training batch, in float32; nothing is trained. A config whose data are not there is
left out and says why. A step is really taken, in up to 10 GiB; ``callbacks.training.training_cost``
tells what is counted.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import torch

from callbacks.training.training_cost import training_cost, units_of
from core.errors import ErrorScope, UserError, exit_on_user_error
from datamodules.base import BaseDataModule
from lit_models.base import LitModel
from pipeline.parser import Parser, link_data_arguments
from pipeline.studies.grid import DEFAULTS, read_yaml

COLUMNS = ["config", "network", "parameters", "batch", "MFLOP"]
COLUMNS += ["weights", "gradients", "optimizer", "activations", "peak"]


def built(config: Path, overrides: list[str]) -> tuple[LitModel, BaseDataModule]:
    """Model and data of a config, without its schedule, which would ask how long training is."""
    settings = read_yaml(config)
    if not settings.keys() >= {"model", "data"}:
        raise UserError("it is no experiment: it needs a model and data.")
    settings["model"]["init_args"].pop("lr_scheduler", None)
    parser = Parser()
    parser.add_subclass_arguments(LitModel, "model")
    parser.add_subclass_arguments(BaseDataModule, "data")
    link_data_arguments(parser)
    defaults = parser.parse_object({key: settings[key] for key in ("model", "data")})
    made = parser.instantiate(parser.parse_args(overrides, defaults))
    return made.model, made.data


def row(config: Path, overrides: list[str]) -> str:
    model, data = built(config, overrides)
    data.setup("fit")
    batch = data.training_batch(0, 0)
    cost = training_cost(model, model.configure_optimizers(), batch)
    core = getattr(model.network, "rnn", None)
    network = type(model.network).__name__ + (f" of {type(core).__name__}" if core else "")
    _, units = units_of(batch)  # samples, or tokens
    flops = cost.forward_flops * units / cost.samples
    memory = cost.weights, cost.gradients, cost.optimizer_state, cost.activations, cost.peak
    cells = [config.stem, network, f"{cost.parameters:,}", f"{cost.samples:,}"]
    cells += [f"{flops / 1e6:,.3f}", *(f"{x:,.2f}" for x in memory)]
    return f"| {' | '.join(cells)} |"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network_costs",
        description="Print what a training step of each config costs. Flags of model and data, "
        "such as --data.data_dir=DIR, are those of train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="*", type=Path, help="default: all in configs/")
    options, overrides = parser.parse_known_args(args)
    with exit_on_user_error():
        found = sorted(path for path in DEFAULTS.parent.glob("*.yaml") if path != DEFAULTS)
        print(f"torch {version('torch')}; MFLOP of the forward pass of an example, memory in MiB\n")
        print(f"| {' | '.join(COLUMNS)} |")
        print("| --- | --- |" + " ---: |" * (len(COLUMNS) - 2))
        missing = []
        for config in options.configs or found:
            torch.manual_seed(0)
            try:
                print(row(config, overrides), flush=True)
            except Exception as error:
                if (mistake := ErrorScope(setting_up=True).user_error(error)) is None:
                    raise
                missing.append(f"\nWithout {config.stem}: {mistake}")
        print("".join(missing))


if __name__ == "__main__":
    main()
