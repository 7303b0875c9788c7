"""What travels to Kaggle's machine."""

import shutil
import subprocess
from pathlib import Path

import pytest
from kaggle_server import KEY, KaggleServer
from test_on_kaggle import unpacked

from core.errors import UserError
from pipeline.kaggle import parcel


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with what must stay at home."""
    root = tmp_path / "repository"
    names = ["train.py", "core/__init__.py", "core/x.py", "configs/a.yaml", "requirements.txt"]
    names += [".env", "kaggle.json", "core/key.pem", "runs/x/config.yaml", "data/names/a.txt"]
    for name in [*names, "untracked.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    git = ["git", "-C", str(root)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", *names], check=True)
    monkeypatch.setattr(parcel, "ROOT", root)
    return root


CODE = ["configs/a.yaml", "core/__init__.py", "core/x.py", "requirements.txt", "train.py"]


def test_code_travels_and_nothing_else(repository: Path) -> None:
    args, code = parcel.pack(["fit", "--run=x"], [])
    assert list(unpacked(code)) == CODE
    assert args == ["fit", "--run=x"]
    assert parcel.pack(args, [])[1] == code
    shutil.rmtree(repository / ".git")
    assert list(unpacked(parcel.pack(args, [])[1])) == sorted([*CODE, "untracked.py"])


def test_files_that_arguments_name_travel(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1\n")
    typed = [f"--config={repository}/untracked.py", f"--data.exclude={tmp_path}/ids.txt"]
    args, code = parcel.pack(typed, [])
    assert args == ["--config=untracked.py", "--data.exclude=given/ids.txt"]
    assert {"untracked.py", "given/ids.txt"} <= unpacked(code).keys()


def test_a_key_in_the_code_is_refused(
    repository: Path, kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "another-secret")
    for secret in (KEY, "another-secret"):
        (repository / "core/x.py").write_text(f"key = '{secret}'")
        with pytest.raises(UserError, match=r"core/x\.py holds a key or"):
            parcel.pack([], [KEY])
