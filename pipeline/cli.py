"""The command line of training: every run gets a folder, and explains itself."""

import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

import callbacks  # noqa: F401  short class names in configs are those that were imported
import datamodules  # noqa: F401
import lit_models  # noqa: F401
from callbacks.run.checkpoints import BestCheckpoint, LastCheckpoint, is_last_checkpoint
from callbacks.run.run_folder import RunRecord
from callbacks.run.wandb_run import WandbSummary
from callbacks.training.averaging import CurrentUntilAveraged
from core.errors import ErrorScope, UserError, exit_on_user_error
from core.hosts import Hosts, job_name
from core.provenance import command, provenance
from core.runs import OF_TRAINING, ROOT, Run, data_state, is_file, load_checkpoint
from datamodules.base import BaseDataModule
from datamodules.exclusion import excluded_ids
from lit_models.base import LitModel
from pipeline.admission import admit, read_config
from pipeline.arguments import normalize_argv, subcommands
from pipeline.continuing import refuse_changes
from pipeline.history import update
from pipeline.parser import Parser, instantiating, link_data_arguments
from pipeline.refusals import KnownMonitors, refuse_other_part, refuse_settings, refuse_val_size
from pipeline.studies.grid import DEFAULTS, PointRecord, Study
from pipeline.trainer import (
    prepare_trainer,
    quiet_libraries,
    resolve_trainer_config,
    resolve_wandb_config,
)

PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau"


class CLI(LightningCLI):
    """LightningCLI that gives every run a folder and lets a run explain itself.

    Args:
        argv: The arguments as typed.
        errors: Knows until when any ValueError is the user's.
        exit_stack: Releases the run folder when the program ends.
        hosts: The processes that train together.
    """

    study: Study | None = None  # that the run is a point of

    def __init__(
        self, argv: list[str], errors: ErrorScope, exit_stack: ExitStack, hosts: Hosts
    ) -> None:
        self.argv = argv
        self.hosts = hosts
        self.errors = errors
        self.exit_stack = exit_stack
        self.flags = normalize_argv(argv)
        super().__init__(args=self.flags, **_cli_options(argv))

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # it is called on self
        skipped = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders"}
        return {name: skipped for name in subcommands(self.argv)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run",
            type=str,
            help="fit: name of the run, started or continued; validate, test: the run to use.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            help="fit: the run or checkpoint whose weights a new run begins with.",
        )
        parser.add_argument(
            "--test",
            type=bool,
            default=False,
            help="fit: test the best checkpoint as well, when training is done.",
        )
        parser.add_argument(
            "--study",
            type=str | None,
            help="fit: the study this run is a point of; its folder is runs/STUDY/POINT/.",
        )
        parser.add_argument(
            "--trust",
            action="store_true",
            help="import whatever a run names: only for runs of people you trust.",
        )
        parser.add_argument(
            "--debug", action="store_true", help="show the traceback of a mistake as well."
        )
        link_data_arguments(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        # Lightning must not see it before classes are instantiated: the hyperparameters in the
        # checkpoint would override what was typed (Lightning-AI/pytorch-lightning#21455)
        self.ckpt_path = self.config[self.config.subcommand].pop("ckpt_path")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.ckpt_path = self.ckpt_path
        self._resolve(config)
        self.study = Study.load(config.study) if config.study else None
        # once, so that a file that is edited meanwhile changes nothing
        self.point = self.study.record(self.argv[1:]) if self.study else {}
        self.record = RunRecord(self.config_text())
        if config.trainer.fast_dev_run and self.subcommand == "fit":
            return
        run = self.run_folder(config)
        if self.hosts.leads and self.subcommand == "fit":
            self.resume(config, run)
        elif self.hosts.leads:
            config.ckpt_path = config.ckpt_path or str(run.checkpoint())
        folder, config.ckpt_path = self.hosts.agree(run.folder, config.ckpt_path)
        run = Run(folder)
        if self.subcommand != "fit":
            self.evaluate(config)
        if not config.trainer.fast_dev_run:
            self.write_into(config, run)

    def _resolve(self, config: Namespace) -> None:
        """Fill in what follows from other settings, and refuse what cannot act."""
        data, trainer = config.data.init_args, config.trainer
        if (exclude := data.get("exclude")) is not None:
            # the ids go into the record: the file may change, and what was left out does not
            data.exclude = excluded_ids(exclude)
        if data.get("folds") is not None:
            refuse_val_size(config, self.flags)
            data.val_size = 0
        self.root = Path(trainer.default_root_dir or ROOT)
        resolve_trainer_config(trainer)
        refuse_settings(trainer, self.subcommand)
        schedule = config.model.init_args.get("lr_scheduler")
        if schedule and schedule.class_path == PLATEAU:  # it follows the model's own measure
            schedule.init_args.mode = "max"
        if self.subcommand == "fit" and config.test and trainer.enable_checkpointing is False:
            raise UserError(
                "--test=true tests the best checkpoint, and there will be none; leave "
                "--trainer.enable_checkpointing=false out."
            )

    def resume(self, config: Namespace, run: Run) -> None:
        """Train from the run's last checkpoint, if there is one."""
        last = run.last_checkpoint
        if config.ckpt_path is None and last.is_file():
            config.ckpt_path = str(last)
        if config.ckpt_path:
            checkpoint = Path(config.ckpt_path)
            if last.is_file() and not (
                is_file(checkpoint) and checkpoint.parent.samefile(last.parent)
            ):
                raise UserError(
                    f"{run.folder} goes on from its own checkpoints; to go on from {checkpoint}, "
                    "choose another name with --run."
                )
            self.compare(checkpoint, run)
        if self.study and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            point = PointRecord(run.folder)
            if not point.is_finished(self.point):
                point.write(self.point, finished=False)

    def evaluate(self, config: Namespace) -> None:
        """Validate or test a checkpoint; what training measured stays recorded."""
        self.shows_metrics, config.verbose = config.verbose, False  # a line each, not as a table
        checkpoint = load_checkpoint(Path(config.ckpt_path))
        learned = data_state(checkpoint, config.data.class_path)
        if "merges" in learned:  # subwords need no books again; classes are read and compared
            config.data.init_args["merges"] = learned["merges"]
        if config.data.init_args.get("speller"):
            config.data.init_args["speller"] = learned.get("speller", True)
        trainer, validating = config.trainer, self.subcommand == "validate"
        if validating:
            trained = update(read_config(checkpoint["config"], config.ckpt_path))
            refuse_other_part(config.data, trained["data"])
        limit = trainer.limit_val_batches if validating else trainer.limit_test_batches
        partly = limit not in (None, 1.0) or isinstance(limit, int)  # 1 is one batch
        if validating or partly:
            trainer.logger = False
        if partly:
            rank_zero_only(print)("A part of the data: nothing of it is recorded.")
            kept = [c for c in trainer.callbacks or [] if c.class_path.endswith("ProgressBar")]
            trainer.callbacks = kept

    def write_into(self, config: Namespace, run: Run) -> None:
        """Let everything be written into the run's folder."""
        config.trainer.default_root_dir = str(run.folder)
        for logger in config.trainer.logger or []:
            settings = logger.init_args
            if settings.get("save_dir") in (None, "."):
                settings.save_dir = str(run.folder)
            if logger.class_path.endswith("WandbLogger"):
                resolve_wandb_config(settings, config, run, str(self.subcommand))

    def compare(self, checkpoint: Path, run: Run) -> None:
        """Refuse to go on from a checkpoint with settings that make another run of it."""
        saved = load_checkpoint(checkpoint)
        if missing := [name for name in OF_TRAINING if name not in saved]:
            raise UserError(f"{checkpoint} is not whole: it has no {missing[0]} to go on with.")
        recorded = update(read_config(saved["config"], checkpoint))
        now = self.settings(self.config)
        if not self.config.fit.trust:
            admit(recorded, checkpoint, typed=now)
        whole = self.parser.parse_object({"subcommand": "fit", "fit": recorded})
        branches = not run.last_checkpoint.is_file()
        changes = self.settings(whole), now, str(run.folder)
        for warning in refuse_changes(*changes, branches=branches):
            rank_zero_warn(warning)

    def instantiate_classes(self) -> None:
        with instantiating():
            super().instantiate_classes()
        source = self.config[self.subcommand].init_from
        if source and self.subcommand == "fit" and not self.config.fit.ckpt_path:
            if self.hosts.leads:
                path = Path(source)
                named = path.suffix == ".ckpt"
                self.model.init_from(path if named else Run.find(path, self.root).checkpoint())
            self.model.has_weights = True  # DDP hands those of the first process to the others

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self.config_init[self.subcommand].trainer
        if not trainer.fast_dev_run:
            kwargs["callbacks"] = self.with_required_callbacks(trainer)
        try:
            made = super().instantiate_trainer(**kwargs)
        except (AttributeError, ImportError, OSError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]  # Lightning, of what its arguments may be together
            raise UserError(f"the trainer cannot be made: {reason}") from error
        prepare_trainer(made, self.errors, termination=not trainer.fast_dev_run)
        return made

    def with_required_callbacks(self, trainer: Namespace) -> list[Callback]:
        """Return the callbacks of a configuration, and those that it may not do without."""
        given: list[Callback] = trainer.callbacks or []
        # the record in front, so that what it flushes reaches the pictures; last.ckpt after all
        # others, so that it holds what they have learned
        needed = [] if trainer.enable_checkpointing is False else [BestCheckpoint, LastCheckpoint]
        kept = [callback for callback in given if not is_last_checkpoint(callback)]
        kinds = {type(callback) for callback in kept}
        before = [CurrentUntilAveraged(c) for c in kept if isinstance(c, WeightAveraging)]
        added = [KnownMonitors(), *(kind() for kind in needed if kind not in kinds)]
        summary = WandbSummary(tells_end=self.study is None)
        return [self.record, summary, *before, *kept, *added]

    def run_folder(self, config: Namespace) -> Run:
        root = self.root
        if self.subcommand != "fit":
            return Run.find(config.run, root)
        file = Path(config.config[0].relative) if config.config else Path("unnamed")
        parent = root / self.study.name if self.study else Run.parent(file, root)
        given = job_name() if config.run is None else config.run
        name = given if self.study or given is None else Run.name(given, parent)
        # rank 0 claims the folder; the others learn it from it, or from Lightning
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return Run(parent / (name or "unknown"))
        run = Run.claim(parent, name)
        self.exit_stack.enter_context(run.lock())
        self.exit_stack.enter_context(run.tidy())  # before the lock is let go
        return run

    def config_text(self) -> str:
        """Return the resolved configuration as YAML, under its command and versions."""
        settings = self.settings(self.config)
        if not settings["init_from"]:
            del settings["init_from"]
        origin = yaml.safe_dump({"command": command(), **provenance()}, sort_keys=False)
        header = "".join(f"# {line}\n" for line in origin.splitlines())
        return header + yaml.safe_dump(settings, sort_keys=False)

    def settings(self, config: Namespace) -> dict[str, Any]:
        """Return the sections of a whole configuration that decide on a run."""
        text = self.parser.dump(config, skip_unset=False, skip_validation=True)
        written = yaml.safe_load(text)[self.subcommand]
        kept = ("seed_everything", "init_from", "trainer", "model", "data")
        return {key: value for key, value in written.items() if key in kept}

    def before_fit(self) -> None:
        network = self.model.network
        count = sum(p.numel() for p in network.parameters())
        say = rank_zero_only(print)
        say(f"{type(network).__name__} with {count:,} parameters")
        if not self.datamodule.validates:
            say("No validation part: the last checkpoint takes the place of the best.")

    def after_fit(self) -> None:
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # asked on all ranks: Lightning broadcasts the answer
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        if self.config.fit.test:
            # weights go from the first process to all; other hosts need not have the file
            best = Run(folder).checkpoint() if self.hosts.leads else None
            # loading a checkpoint, Lightning's averaging brings back the weights of training
            kept = [c for c in self.trainer.callbacks if not isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
            self.trainer.callbacks = kept  # type: ignore[attr-defined]
            self.trainer.test(self.model, self.datamodule, ckpt_path=best, verbose=False)
        if not self.trainer.is_global_zero:
            return
        if self.study:
            PointRecord(folder).write(self.point, finished=True)
        if self.record.done and self.trainer.global_step == self.record.done:
            print(f"{folder} was already finished after {self.record.done} steps.")
        _print_metrics(self.trainer.callback_metrics)
        kinds = {
            "metrics.csv": "metrics.csv",
            "*.png": "pictures (*.png)",
            "*/*.ckpt": "checkpoints/",
        }
        found = [name for pattern, name in kinds.items() if any(folder.glob(pattern))]
        print(f"The run is in {folder}{': ' if found else ''}{', '.join(found)}")
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger) and not logger.experiment.disabled:
                offline = logger.experiment.offline
                place = logger.experiment.dir if offline else logger.experiment.url
                print(f"W&B run: {Path(place).parent if offline else place}")
        if kinds["*/*.ckpt"] in found:
            self.print_next_command("predict.py" if self.config.fit.test else "train.py test --run")

    def after_test(self) -> None:
        if self.trainer.is_global_zero:
            if self.shows_metrics:
                _print_metrics(self.trainer.callback_metrics)
            self.print_next_command("predict.py")

    after_validate = after_test

    def print_next_command(self, command: str) -> None:
        """Print the command that comes after this one, if there is something to predict."""
        predicts = type(self.datamodule).read_predict is not BaseDataModule.read_predict
        if command != "predict.py" or (predicts and self.model.outputs):
            print(f"Next: python {command} {shlex.quote(self.trainer.default_root_dir)}")


def _print_metrics(metrics: Mapping[str, Tensor]) -> None:
    """Print each metric on a line."""
    for name, value in sorted(metrics.items()):
        if name == "step" or name.startswith("lr-"):  # of the checkpoint, and of the last step
            continue
        print(f"{name:>24}  {value.item():.4f}")


def run(args: list[str]) -> None:
    """Run the subcommand that the arguments name."""
    with exit_on_user_error(debug="--debug" in args) as errors, ExitStack() as exit_stack:
        errors.setting_up = True  # until training starts
        if os.getcwd() not in sys.path:  # where an own network may be, which a flag names
            sys.path.append(os.getcwd())
        agent = "WANDB_SWEEP_ID" in os.environ  # which finds its runs on the server
        os.environ.setdefault("WANDB_MODE", "online" if agent else "offline")
        quiet_libraries()
        CLI(args, errors, exit_stack, exit_stack.enter_context(Hosts()))


def _cli_options(argv: list[str]) -> dict[str, Any]:
    """Return the arguments of LightningCLI for this project."""
    defaults = {"default_config_files": [str(DEFAULTS)]}
    return {
        "model_class": LitModel,
        "datamodule_class": BaseDataModule,
        "subclass_mode_model": True,
        "subclass_mode_data": True,
        "save_config_callback": None,
        "parser_class": Parser,
        "parser_kwargs": {
            "description": "Train a network, validate it, test it.",
            **{name: dict(defaults) for name in subcommands(argv)},
        },
        "seed_everything_default": 0,
        "auto_configure_optimizers": False,
        "load_from_checkpoint_support": False,
    }
