"""Every command in the README is one that its program takes."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import predict
import spikes
import study
import submit
import train

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
LINES = [line.partition(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line.removeprefix("python ") for line in LINES if line.startswith("python ")]
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "spikes.py": spikes.parse,
    "predict.py": predict.parse,
    "study.py": study.parse,
    "submit.py": submit.make_parser().parse_args,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(
    command: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *args = shlex.split(command)
    if script != "train.py":
        PARSERS[script](args)
        return
    monkeypatch.chdir(trained.parents[2])  # where runs/cifar10_cpu/first is
    args = [a.replace("configs/", f"{ROOT}/configs/") for a in args]
    with pytest.raises(SystemExit) as stop:
        train.main([*args, "--print_config"] if "--help" not in args else args)
    assert not stop.value.code
    assert re.search(r"class_path: .*\bLit", capsys.readouterr().out) or "--help" in args


def test_named_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"`((?:configs|datamodules|docs|benchmarks)/[\w/]+\.\w+)`", text)):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"\]\((docs/[^)#]+)", text):
        assert (ROOT / target).is_file(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in LINES:
        if line.startswith("make "):
            assert f"\n{line.split()[1]}:" in makefile
