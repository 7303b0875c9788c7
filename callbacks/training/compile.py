"""The network as compiled code."""

import os
import shutil
from pathlib import Path
from typing import Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn


class Compile(Callback):
    """Compile the network with ``torch.compile`` before training.

    It takes a minute or more, which a long run wins back and a short one does not. What was
    compiled is kept in ``~/.cache/steadyfit``, so that the next run of the same network begins
    sooner. Checkpoints are those of the network that is not compiled.

    Args:
        mode: What torch should strive for. ``reduce-overhead`` records the step as a CUDA graph,
            which helps where issuing it takes longer than computing it: LeNet, recurrent networks;
            ``max-autotune`` tries more kernels, for minutes.

    Raises:
        MisconfigurationException: Training is on a CPU, and there is no C++ compiler; or CUDA
            graphs are to accumulate gradients, which they would overwrite
            (pytorch/pytorch#96693).
    """

    def __init__(
        self,
        mode: Literal[
            "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
        ] = "default",
    ) -> None:
        self.mode = mode

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
            raise MisconfigurationException(
                "Compile needs a C++ compiler to train on a CPU; install g++ or leave Compile out."
            )
        graphs = not on_cpu and self.mode in ("reduce-overhead", "max-autotune")
        if graphs and trainer.accumulate_grad_batches > 1:
            raise MisconfigurationException(
                f"Compile with mode={self.mode} overwrites the gradients that "
                "accumulate_grad_batches keeps; use mode=max-autotune-no-cudagraphs or default."
            )
        # torch's own place is the temporary folder, which does not last
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "steadyfit" / "inductor"))
        network: nn.Module = pl_module.network  # type: ignore[assignment]
        network.compile(mode=self.mode)
