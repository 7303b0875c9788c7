"""``steadyfit`` by itself: what pip installs, in other people's training loops."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import callbacks
import steadyfit
import steadyfit.pytorch_lightning

ROOT = Path(__file__).parent.parent
README = (ROOT / "steadyfit" / "README.md").read_text()
BARE, WITH_LIGHTNING = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# refuses packages by name, as if they were not installed
REFUSING = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {folder!r})
"""
OURS = ["core", "pipeline", "lit_models", "datamodules", "callbacks", "metrics", "train"]

TRAIN = """
import torch
from {package} import LightningModule, Trainer
from {package}.loggers import CSVLogger
from steadyfit{of} import GradientSpikeMonitor, UpdateClipping

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=1e-3)

torch.manual_seed(0)
batches = torch.randn(60, 16, 4)
batches[40] *= 1000
monitor, clipping = GradientSpikeMonitor(), UpdateClipping()
trainer = Trainer(
    accelerator="cpu", max_epochs=1, logger=CSVLogger({folder!r}), enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor, clipping],
)
trainer.fit(Model(), torch.utils.data.DataLoader(batches, batch_size=None))
print("spiked at", [r.step for r in monitor.records if r.spiked], clipping.acted)
"""


def python(code: str, cwd: Path) -> str:
    """What a process prints that sees neither this folder nor the environment's paths."""
    command = [sys.executable, "-I", "-W", "error::SyntaxWarning", "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("steadyfit", "core"):  # another package lies beside it, as in a clone
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    [found] = folder.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    """``pip wheel .`` failed: "Multiple top-level packages discovered"."""
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    version = steadyfit.__version__
    assert {name.parts[0] for name in names} == {"steadyfit", f"steadyfit-{version}.dist-info"}
    own = {p.relative_to(ROOT) for p in (ROOT / "steadyfit").rglob("*") if p.is_file()}
    own = {path for path in own if "__pycache__" not in path.parts}
    assert {name for name in names if name.parts[0] == "steadyfit"} == own


@pytest.mark.slow
def test_installed_it_works_in_a_bare_loop_with_torch_alone(
    installed: Path, tmp_path: Path
) -> None:
    refused = [*OURS, "lightning", "pytorch_lightning", "lightning_fabric", "matplotlib"]
    refusing = REFUSING.format(refused=refused, folder=str(installed))
    where = "import steadyfit\nprint(steadyfit.__file__)\nprint(shortened.amin().item() < 1)\n"
    spike, file, acted = python(refusing + BARE + where, tmp_path).splitlines()
    assert spike.startswith("step 80: gradient norm")
    assert Path(file).is_relative_to(installed)
    assert acted in ("True", "False")
    missing = f"{refusing}\ntry:\n"
    missing += "    from steadyfit import GradientSpikeMonitor\n"
    missing += "except ImportError as error:\n    print(error)\n"
    assert "pip install 'steadyfit[lightning]'" in python(missing, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "of"), [("lightning.pytorch", ""), ("pytorch_lightning", ".pytorch_lightning")]
)
def test_installed_it_works_in_either_lightning(
    package: str, of: str, installed: Path, tmp_path: Path
) -> None:
    code = REFUSING.format(refused=OURS, folder=str(installed))
    code += TRAIN.format(package=package, of=of, folder=str(tmp_path))
    printed = python(code, tmp_path)
    assert "spiked at [40" in printed
    assert (tmp_path / "lightning_logs" / "version_0" / "spikes.jsonl").exists()


@pytest.mark.slow
def test_the_folder_works_where_it_is_copied_to(tmp_path: Path) -> None:
    """``clipping.py`` could not even be copied beside ``gradient_spikes.py``, as it said."""
    shutil.copytree(ROOT / "steadyfit", tmp_path / "theirs" / "vendored" / "steadyfit")
    code = REFUSING.format(refused=[*OURS, "lightning"], folder=str(tmp_path))
    code += BARE.replace("from steadyfit import", "from theirs.vendored.steadyfit import")
    assert python(code, tmp_path).startswith("step 80: gradient norm")


def test_the_lightning_example_is_right() -> None:
    names: dict[str, object] = {}
    exec(WITH_LIGHTNING.replace("Trainer(", "Trainer(logger=False, accelerator='cpu', "), names)
    assert isinstance(names["trainer"].callbacks[0], steadyfit.GradientSpikeMonitor)  # type: ignore[attr-defined]


def test_there_is_one_class_of_each_name() -> None:
    """Two would make the short name on the command line ambiguous."""
    for name in ("GradientSpikeMonitor", "UpdateClipping"):
        assert getattr(callbacks, name) is getattr(steadyfit, name)


def test_both_lightnings_have_the_same_callbacks() -> None:
    """The two ``Callback`` classes differ; what is derived from them must not."""
    from lightning.pytorch.callbacks import Callback as Ours
    from pytorch_lightning.callbacks import Callback as Theirs

    assert Ours is not Theirs
    for name in ("GradientSpikeMonitor", "UpdateClipping"):
        one, other = getattr(steadyfit, name), getattr(steadyfit.pytorch_lightning, name)
        assert issubclass(one, Ours)
        assert issubclass(other, Theirs)
        assert one.__doc__ == other.__doc__
        own = [set(dir(one)) - set(dir(Ours)), set(dir(other)) - set(dir(Theirs))]
        assert own[0] == own[1]


def loop(limit_first: bool, **limits: Any) -> tuple[torch.Tensor, Any]:
    """Parameters of a short training with and without a limit of the updates."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.RMSprop([parameter], lr=0.1)
    limit = steadyfit.clip_updates(optimizer, **limits)
    probe = steadyfit.StepProbe.of(optimizer)
    for step in range(3):
        loss = parameter.square().sum()
        optimizer.zero_grad()
        loss.backward()
        if limits.get("max_decrease"):
            limit.loss = loss
        update = probe.snapshot(500 + step, "limit") if limit_first else None
        optimizer.step()
        assert update is None or update is probe.update
    assert probe.update.factors is not None
    return parameter.detach(), probe.update.factors


def test_a_limit_leaves_the_probe_to_who_has_armed_it() -> None:
    """A monitor that counts steps in its own way lost what the update did."""
    for one, other in zip(loop(True), loop(False), strict=True):
        assert torch.equal(one, other)


def test_a_promise_is_limited_only_with_its_loss() -> None:
    """Without a loss, or with that of an earlier step, the limit did nothing or the wrong thing."""
    _, factors = loop(False, max_rms=None, max_decrease=0.01)
    assert factors.max() < 1
    optimizer = torch.optim.SGD([parameter := torch.nn.Parameter(torch.ones(1))], lr=0.1)
    limit = steadyfit.clip_updates(optimizer, max_decrease=0.5)
    for loss in (4.0, None):
        parameter.grad = torch.ones(1)
        if loss:
            limit.loss = torch.tensor(loss)
            optimizer.step()
        else:
            with pytest.raises(ValueError, match="max_decrease needs the loss"):
                optimizer.step()


def test_a_name_that_it_does_not_have() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Monitor'"):
        _ = steadyfit.Monitor
