"""A compiled network learns the same, and its checkpoint is that of any other."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_classification import NUM_CLASSES, Points, model, trainer
from torch import nn

from callbacks import Compile


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with a C++ compiler")
def test_the_weights_are_those_of_an_ordinary_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

    def fit(callbacks: list[Compile]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        lit = model(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, NUM_CLASSES)))
        trainer(tmp_path, max_epochs=2, callbacks=callbacks).fit(lit, Points())
        return lit.state_dict()

    compiled, ordinary = fit([Compile()]), fit([])
    assert compiled.keys() == ordinary.keys()
    torch.testing.assert_close(compiled, ordinary)
    cache = tmp_path / "cache" / "steadyfit" / "inductor"
    assert any(path.is_file() for path in cache.rglob("*"))
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(cache)


def test_cuda_graphs_do_not_accumulate_gradients() -> None:
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer: Any = SimpleNamespace(strategy=strategy, accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException, match="overwrites the gradients"):
        Compile("reduce-overhead").setup(trainer, model(), "fit")


def test_without_a_compiler_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MisconfigurationException, match="Compile needs a C"):
        trainer(tmp_path, max_epochs=1, callbacks=[Compile()]).fit(model(), Points())
