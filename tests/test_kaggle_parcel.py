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
    names += ["core/x.toml"]
    names += [".env", "kaggle.json", "core/key.pem", "runs/x/config.yaml", "data/names/a.txt"]
    for name in [*names, "untracked.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    git = ["git", "-C", str(root)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", *names], check=True)
    monkeypatch.setattr(parcel, "ROOT", root)
    return root


CODE = [
    "configs/a.yaml",
    "core/__init__.py",
    "core/x.py",
    "core/x.toml",
    "requirements.txt",
    "train.py",
]


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
    assert args[0] == "--config=untracked.py"
    assert unpacked(code)["untracked.py"] == b"x"
    assert unpacked(code)[args[1].removeprefix("--data.exclude=")] == b"1\n"


def test_files_of_one_name_and_names_with_an_equals_sign_travel(
    repository: Path, tmp_path: Path
) -> None:
    """The second file took the place of the first, and ``fold=0/`` was taken for a flag."""
    for name in ("a", "fold=0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.yaml").write_text(name)
    paths = [f"{tmp_path}/a/x.yaml", f"{tmp_path}/fold=0/x.yaml"]
    args, code = parcel.pack(["--config", paths[0], f"--config={paths[1]}"], [])
    names = [args[1], args[2].removeprefix("--config=")]
    assert [unpacked(code)[name] for name in names] == [b"a", b"fold=0"]


def test_a_copy_inside_another_repository_travels(repository: Path) -> None:
    """Git knows no file of it, and nothing travelled."""
    (repository / ".git").rename(repository.parent / ".git")
    subprocess.run(["git", "-C", str(repository.parent), "read-tree", "--empty"], check=True)
    code = parcel.pack([], [])[1]
    assert {"train.py", "core/x.py", "requirements.txt"} <= unpacked(code).keys()
    (repository / "wandb_key.txt").write_text("x")
    assert "wandb_key.txt" not in unpacked(parcel.pack([], [])[1])


def test_a_key_in_the_code_is_refused(
    repository: Path, kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "another-secret")
    monkeypatch.setenv("TEAM_TOKEN", "of-a-file-of-secrets\n")
    for secret in (KEY, "another-secret", "of-a-file-of-secrets"):
        (repository / "core/x.py").write_text(f"key = '{secret}'")
        with pytest.raises(UserError, match=r"core/x\.py holds a key or"):
            parcel.pack([], [KEY])
