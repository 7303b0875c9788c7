"""What damaged or forged files of a run do:  python -m benchmarks.mutated_files

Changes one thing at a time in the checkpoint, the configuration or the record of a prediction, by
a seed, and lets ``predict.py``, ``train.py test``, ``train.py fit`` and ``submit.py`` read the
result. What may come of it is a sentence, or the result of the file as it was where the change is
in a part of the trainer that a test or a prediction leaves out, or a setting that is not there has
its default. Counted are tracebacks, imports of modules that are not of this project, its libraries
or what those import for a file as it was, and changed values that were taken.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import track

# in this process, since each of their own would take seconds to begin
MAIN = {name: import_module(name).main for name in ("predict", "submit", "train")}
RUN = Path(__file__).parents[1] / "tests" / "old_runs" / "mnist_lenet" / "old"
FORGED: list[Any] = [
    {"class_path": "evil.Net"},
    "evil.Net",
    {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "evil/evil", "model": "x"}},
    {"class_path": "torch.utils.cpp_extension.load_inline", "init_args": {"name": "evil"}},
    [
        {
            "class_path": "lightning.pytorch.callbacks.LambdaCallback",
            "init_args": {"on_fit_start": "evil.run"},
        }
    ],
    [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": "/tmp/evil"},
        }
    ],
    "../../evil.yaml",
]
OTHER_TYPES: dict[type, list[Any]] = {
    int: ["three", 1.5, [1], {"a": 1}, float("nan"), -(10**9)],
    float: ["half", [0.5], {"a": 1}, float("nan"), float("inf")],
    bool: ["perhaps", 7.5, [True], {"a": 1}],
    str: [[1], {"a": 1}, 1.5, "\0"],
    list: ["list", {"a": 1}, 1.5, [float("nan")]],
    dict: ["mapping", [1], 1.5],
    torch.Tensor: [None, 1.0, "tensor", [1.0]],
}


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every setting below, with where it is."""
    parts = value.items() if isinstance(value, dict) else ()
    for key, part in parts:
        yield (*place, key), part
        yield from places(part, (*place, key))


def put(whole: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        whole = whole[key]
    if value is Ellipsis:
        del whole[place[-1]]
    else:
        whole[place[-1]] = value


def change_config(config: dict[str, Any], draw: random.Random) -> str:
    """Another value somewhere in a configuration; returns what was done."""
    known = [(p, v) for p, v in places(config) if v is not None and p[-1] != "default_root_dir"]
    place, value = draw.choice(known)
    if draw.random() < 0.4:
        # where a class or a text may be, what imports; a number stands for itself
        place, value = draw.choice([(p, v) for p, v in known if isinstance(v, dict | list | str)])
        new = draw.choice(FORGED)
    else:
        new = draw.choice([..., *OTHER_TYPES[type(value)]])
    put(config, place, new)
    return f"{'.'.join(map(str, place))} = {new!s:.60}"


def change_checkpoint(checkpoint: dict[str, Any], draw: random.Random) -> str:
    """Another value somewhere in a checkpoint; returns what was done."""
    read = ("config", "state_dict", "metrics", "epoch", "global_step")
    name = draw.choice(read)
    if name == "config" and draw.random() < 0.8:
        config = yaml.safe_load(checkpoint["config"])
        done = change_config(config, draw)
        checkpoint["config"] = yaml.safe_dump(config)
        return f"config: {done}"
    place: tuple[Any, ...] = (name,)
    if name in ("state_dict", "metrics") and draw.random() < 0.8:
        place = (name, draw.choice(list(checkpoint[name])))
    value: Any = checkpoint
    for key in place:
        value = value[key]
    kind = dict if isinstance(value, dict) else type(value)
    choices = [..., *OTHER_TYPES[kind]]
    if isinstance(value, torch.Tensor):
        choices += [value[:1] if value.ndim else value[None], value * torch.nan, value.to_sparse()]
    new = draw.choice(choices)
    put(checkpoint, place, new)
    return f"{'.'.join(map(str, place))} = {str(new)[:40]}"


def change_record(record: dict[str, Any], draw: random.Random) -> str:
    """Another value in what predict.py recorded; returns what was done."""
    read = ("sha256", "competition", "sample", "labels", "runs", "sendable")
    name = draw.choice([name for name in read if record[name] is not None])
    new = draw.choice([..., *OTHER_TYPES[type(record[name])]])
    if name == "sendable" and new is ...:
        new = None  # earlier versions did without
    put(record, (name,), new)
    return f"{name} = {str(new)[:40]}"


class Imports:
    """The modules that are imported, their packages alone."""

    def __init__(self) -> None:
        self.packages: set[str] = set()
        self.listening = False
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.listening and event == "import":
            self.packages.add(args[0].partition(".")[0])


def outcome(command: str, run: Path) -> tuple[str, str]:
    """``sentence``, ``taken`` or ``traceback``, and what was said."""
    flags = ["--data=DigitsDataModule"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if command == "predict":
                MAIN["predict"]([str(run), *flags, "--accelerator=cpu"])
            elif command == "submit":
                MAIN["submit"]([str(run), "--dry_run"])
            else:
                quick = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"]
                MAIN["train"]([command, f"--run={run}", *flags, *quick])
        except SystemExit as stop:
            last = said.getvalue().strip().splitlines()[-1]
            one = stop.code == 1 and last.startswith("error: ")
            return ("sentence" if one else "traceback"), last
        except BaseException as error:
            return "traceback", f"{type(error).__name__}: {error}"[:200]
    return "taken", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="changed files (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first change (default: 0)")
    options = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    imports = Imports()
    counts: Counter[str] = Counter()
    found: list[str] = []
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        Path("evil.py").write_text("raise SystemError('imported')\ndef run(*args): pass\n")
        sys.path.insert(0, home)
        whole = Path("runs/mnist_lenet/old")
        shutil.copytree(RUN, whole)
        commands = ("predict", "test", "fit", "submit")
        imports.listening = True
        for command in commands:  # as it was: these imports are the libraries' own
            kind, said = outcome(command, whole)
            if command != "submit" and kind != "taken":
                raise RuntimeError(f"{command} of the file as it was: {said}")
        usual = set(imports.packages)
        for seed in track(range(options.seed, options.seed + options.count), transient=True):
            draw = random.Random(seed)
            run = Path("runs/mnist_lenet", f"changed{seed}")
            shutil.copytree(whole, run)
            kind = draw.choice(["config.yaml", "checkpoint", "record"])
            if kind == "config.yaml":
                command = draw.choice(["fit", "test"])
                config = yaml.safe_load((run / kind).read_text())
                done = change_config(config, draw)
                (run / kind).write_text(yaml.safe_dump(config))
            elif kind == "checkpoint":
                command = "predict"
                path = run / "checkpoints" / "best.ckpt"
                checkpoint = torch.load(path, weights_only=True)
                done = change_checkpoint(checkpoint, draw)
                torch.save(checkpoint, path)
            else:
                command = "submit"
                path = run / "submission.json"
                record = json.loads(path.read_text())
                done = change_record(record, draw)
                path.write_text(json.dumps(record))
            imports.packages.clear()
            result, said = outcome(command, run)
            foreign = {p for p in imports.packages - usual if p not in sys.stdlib_module_names}
            of_trainer = done.removeprefix("config: ").startswith("trainer.")
            if result == "taken" and command != "fit" and of_trainer:
                result = "left out"
            if result == "taken" and done.endswith("Ellipsis"):
                result = "not there, and its default taken"
            counts[result] += 1
            counts["foreign imports"] += bool(foreign)
            if result in ("taken", "traceback") or foreign:
                found.append(f"{seed:4} {command:8} {done}: {result} {said} {sorted(foreign)}")
            shutil.rmtree(run)
    print("\n".join(found))
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
