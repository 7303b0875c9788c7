"""Commands of the README and the pages are ones that their programs take."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import callbacks
import predict
import spikes
import study
import submit
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [page.read_text() for page in PAGES]
BLOCKS = [b for text in TEXTS for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
LINES = [
    line.partition(" #")[0].strip()
    for block in BLOCKS
    for line in re.sub(r"\\\n *", "", block).splitlines()
]
COMMANDS = sorted({line.removeprefix("python ") for line in LINES if line.startswith("python ")})
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "spikes.py": lambda args: (
        spikes.parse_why(args[1:]) if args[0] == "why" else spikes.parse(args)
    ),
    "predict.py": predict.parse,
    "study.py": study.parse,
    "submit.py": submit.make_parser().parse_args,
}
EXAMPLES = {"configs/nuclei.yaml", "configs/studies/NAME.yaml"}  # not in the repository


def trains_otherwise(command: str) -> bool:
    """Return True if a command of train.py does more than to fit a config under a name.

    tests/test_configs.py fits each config as it is; CONFIG and nuclei.yaml stand for a file.
    """
    plain = r"--config configs/[\w/]+\.yaml|--run \S+|--test=true|--print_config=skip_default"
    flags = re.sub(plain, "", command).split()
    is_config = "nuclei" not in command and "CONFIG" not in command
    return command.startswith("train.py") and is_config and flags != ["train.py", "fit"]


TRAININGS = sorted({c.replace(" --on kaggle", "") for c in COMMANDS if trains_otherwise(c)})


@pytest.mark.parametrize("command", TRAININGS)
def test_training_command_parses(
    command: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command.startswith(("train.py test", "train.py validate")):
        command = re.sub(r"--run \S+", "--run cifar10_cpu/first", command)
    _, *args = shlex.split(command)
    monkeypatch.chdir(trained.parents[2])  # where runs/cifar10_cpu/first is
    args = [a.replace("configs/", f"{ROOT}/configs/") for a in args]
    with pytest.raises(SystemExit) as stop:
        train.main([*args, "--print_config"] if "--help" not in args else args)
    assert not stop.value.code
    assert re.search(r"class_path: .*\bLit", capsys.readouterr().out) or "--help" in args


def test_other_commands_parse() -> None:
    for command in COMMANDS:
        script, *args = shlex.split(command)
        if script in PARSERS:
            PARSERS[script](args)


def test_named_files_exist() -> None:
    named = {name for text in TEXTS for name in re.findall(r"\bconfigs/[\w/]+\.yaml", text)}
    for name in named - EXAMPLES:
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"python -m benchmarks\.(\w+)", "".join(TEXTS)):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name
    for target in {line.split()[1] for line in LINES if line.startswith("make ")}:
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_every_callback_is_in_the_table() -> None:
    [table] = re.findall(r"## Callbacks\n(.*?)\n## ", README, re.DOTALL)
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"\w+", cell)} == set(callbacks.__all__)


def test_readme_is_short() -> None:
    assert len(README.split()) <= 1400
