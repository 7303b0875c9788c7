"""The parser of the command line, whose complaints are one sentence."""

import enum
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from core.errors import UserError, is_constructor_error
from pipeline.history import refuse_gone, update
from pipeline.names import in_full, nearest, own_classes, report_ambiguous_class

_SEE_HELP = "; see --help for what is known."
# how jsonargparse passes on what a constructor raises
_WRAPPED = re.compile("Does not validate against any of the Union|Problem with given class_path")


_load_yaml = get_loader("yaml")
yaml.SafeDumper.add_multi_representer(  # Lightning's Timer has one among its defaults
    enum.Enum, lambda dumper, member: dumper.represent_data(member.value)
)
set_loader("yaml", lambda text: in_full(update(_load_yaml(text))), (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """A parser whose complaint is one sentence instead of the whole usage.

    It reads configurations of earlier versions as well, see :mod:`pipeline.history`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        # argparse would take --trainer.max_epoch for --trainer.max_epochs
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        said = _reword_parser_error(
            shorten_parser_error(message).rstrip("."), list(self._option_string_actions)
        )
        raise UserError(said if said.endswith("?") else f"{said}{_SEE_HELP}")

    def add_class_arguments(self, *args: Any, **options: Any) -> Any:
        # else a value for a class may be the path of a file, which nobody admits
        return super().add_class_arguments(*args, **options | {"sub_configs": False})

    def add_function_arguments(
        self, function: Any, *args: Any, linked_targets: Any = None, **options: Any
    ) -> Any:
        # as a network may be a function of torchvision.models, which jsonargparse 4.53 links to
        # nothing; who calls this makes what is linked no longer required
        return super().add_function_arguments(function, *args, **options | {"sub_configs": False})

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        if args is not None:  # classes by their former paths, which the YAML loader does not see
            pairs = [argument.partition("=") for argument in args]
            for name, _, value in pairs:
                refuse_gone(name, value)
                if in_full(value, name) != value:
                    report_ambiguous_class(value)
            foreign = any(name == "--data" and _is_foreign(value) for name, _, value in pairs)
            args = [
                f"{name if foreign else update(name)}{equals}{in_full(update(value), name)}"
                for name, equals, value in pairs
            ]
            args = [part for argument in args for part in _with_folder(argument)]
        return super().parse_args(args, *others, **options)


def _is_foreign(data: str) -> bool:
    """Tell whether this is the path of a class of somebody else, whose options are its own."""
    return "." in data and in_full(update(data), "data") not in own_classes().values()


def _with_folder(argument: str) -> list[str]:
    """Add to a logger of Lightning's the folder that it asks for, which is the run's."""
    name, _, value = argument.partition("=")
    asking = value.endswith(("CSVLogger", "TensorBoardLogger"))
    if name.rstrip("+") == "--trainer.logger" and asking:
        return [argument, "--trainer.logger.save_dir=."]
    return [argument]


def shorten_parser_error(message: str) -> str:
    """Return the one line of a jsonargparse error that says what is wrong, after its key.

    The errors of nested classes arrive inside those of the outer ones, already shortened.
    """
    lines = [line.strip().removesuffix(_SEE_HELP) for line in message.splitlines()]
    allowed = [
        x for line in lines for x in re.findall(r"^- Expected a typing.Literal\[(.*)\]", line)
    ]
    if allowed and (given := re.search(r"Given value: (.*)", message)):
        lines = [lines[0], f"- {given[1]} is none of {', '.join(allowed)}".replace("'", "")]
    # what is left of "a class, or else a file, or else nothing" is the part about the class
    lines = [
        # the reason of an import that fails stands on a line of its own
        f"{line} {after}" if line.startswith("- ") and line.endswith(":") else line
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
    ]
    causes = [line.removeprefix("- ") for line in lines if line.startswith(("- ", "Expected a"))]
    causes = [cause for cause in causes if not re.search(r"NoneType|Expected a path|Union", cause)]
    key = re.match(r'Parser key "([\w.]+)"', message)
    sentence = f"{key[1]}: {causes[0]}" if key and causes else " ".join(lines)
    sentence = re.sub(r"Parser key \"([\w.]+)\"", r"\1", sentence)
    return re.sub(
        r"Expected a dot import path string: (\S+)",
        r"\1 is neither a class of this project nor an import path",
        sentence,
    )


def _reword_parser_error(said: str, options: list[str]) -> str:
    """Say in our words what users do most, with the name that was meant."""
    names = [option.removeprefix("--") for option in options]
    if said.endswith("?"):  # of an inner parser
        return said
    if match := re.search(r"((?:\w+: )*).*module '([\w.]+)' has no attribute '(\w+)'", said):
        near = nearest(match[3], dir(sys.modules.get(match[2]))).replace(
            "mean ", f"mean {match[2]}."
        )
        return f"{match[1]}there is no {match[2]}.{match[3]}{near}"
    if match := re.search(r"(.*)Option 'folds?' is not accepted$", said):
        return f"{match[1]}only a set of labelled samples that are always the same has folds"
    if match := re.search(r"(.*)Option '([\w.]+)' is not accepted$", said):
        near = nearest(match[2], names)
        return f"{match[1]}there is no {match[2]}{near}"
    if match := re.match(r"unrecognized arguments: --([\w.]+)", said):
        near = nearest(match[1], names).replace("mean ", "mean --")
        return f"there is no --{match[1]}{near}"
    if match := re.search(r"(\w+) is neither a class", said):
        return f"{said}{nearest(match[1], own_classes())}"
    if match := re.search(r"(.*)Expected a typing.Literal\[(.*)\]. Got value: (.*)", said):
        return f"{match[1]}{match[3]} is none of {match[2]}".replace("'", "")
    if match := re.search(r"(.*)Expected a <class '(\w+)'>. Got value: (.*)", said):
        return f"{match[1]}{match[3]} is no {match[2]}"
    if "the following arguments are required: " in said and "fit.model" in said:
        names_of = {path.stem for path in Path("configs").glob("*.yaml")} - {"defaults"}
        known = ", ".join(sorted(names_of))
        there = f"; in configs/ there are {known}" if known else ""
        return f"say what to train: --config FILE, or --model CLASS and --data CLASS{there}"
    if match := re.search(r"File does not exist: '(.*)'", said):
        near = nearest(Path(match[1]).name, [path.name for path in Path("configs").glob("*.yaml")])
        return f"{match[1]} does not exist{near.replace('mean ', 'mean configs/')}"
    return said


@contextmanager
def instantiating() -> Iterator[None]:
    """Raise what a constructor refuses in its own words instead of those of all its callers.

    jsonargparse makes a ValueError of whatever a constructor raises, a bug of ours included, which
    is taken out again and keeps its traceback.
    """
    try:
        yield
        return
    except (TypeError, ValueError) as error:
        raised: BaseException = error
        while _WRAPPED.search(str(raised)) and raised.__cause__:
            raised = raised.__cause__
        if isinstance(raised, ValueError) or is_constructor_error(raised):
            raise UserError(shorten_parser_error(str(raised))) from error
    raise raised  # out here, or it would be the context of its own context


def link_data_arguments(parser: LightningArgumentParser) -> None:
    """Link what the data knows to the model: it is typed nowhere else."""
    for fact in ("num_classes", "vocab_size"):
        for target in ("model.init_args", "model.init_args.network.init_args"):
            parser.link_arguments(f"data.{fact}", f"{target}.{fact}", apply_on="instantiate")
