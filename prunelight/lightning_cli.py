"""The verbs of the command line: `prunelight fit | validate | test | prune | analyze`.

`fit` prunes at its start, recovers, evaluates and saves; `prune` stops after the pruned directory;
`analyze` draws what the model's hidden states look like, and prunes nothing.
Config files are found by name among the installed ones. A fault that prunelight itself reports ends
in one line; set PRUNELIGHT_TRACEBACK=1 to see where it came from.

`prunelight.cli` is the door: it answers help and version without the imports of this file.
Private names of argparse stand in `Parser.format_help` and `show_usual_options` alone:
`_action_groups` and `_group_actions`, tested with Python 3.11. `CLI._parse_ckpt_path` takes the
place of a private method of Lightning, tested with 2.6.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import lightning.pytorch as pl
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console

import prunelight.callbacks
from prunelight.callbacks.base import PruningCallback
from prunelight.callbacks.recovery.checkpoint import RecoveryCheckpoint
from prunelight.callbacks.recovery.progress import TrainingProgress
from prunelight.config_files import find_configs
from prunelight.evaluation.report.report import summary_table
from prunelight.one_line_errors import (
    missing_package,
    one_line_error,
    our_error,
)
from prunelight.parse_errors import our_callbacks, parse_error, settings_of
from prunelight.quiet_libraries import quiet_libraries
from prunelight.run.preflight import FinishedRunError, check_root
from prunelight.run.strategies import check_strategy
from prunelight.runtime.arguments import between, checked_value
from prunelight.runtime.files.atomic_files import check_writable, newest_checkpoint
from prunelight.runtime.files.checkpoint_files import CHECKPOINT_WORDS, check_checkpoint_path
from prunelight.runtime.measuring import process_age
from prunelight.runtime.progress import BesideBars
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule
from prunelight.training.trainer import Trainer

log = logging.getLogger(__name__)

TRAINER_TITLE = "All other options of Lightning's Trainer"
# Options of the Trainer that most runs need; help shows them before the others.
USUAL = (
    "callbacks",
    "max_steps",
    "max_epochs",
    "accelerator",
    "devices",
    "strategy",
    "precision",
    "default_root_dir",
)

IMPORTED = time.perf_counter()  # when the imports of this file were done


class Parser(LightningArgumentParser):
    """LightningCLI's parser; help shows the Trainer's options last, and an error is one line."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help, with the many options of Lightning's Trainer at the end."""
        groups: list[Any] = self._action_groups  # type: ignore[assignment]  # a Sequence for mypy
        for group in groups:
            if any(action.dest == "ckpt_path" for action in group._group_actions):
                group.title = (
                    "Options of this verb"  # of Lightning's docstrings only a line is shown
                )
        groups.sort(key=lambda group: group.title == TRAINER_TITLE)
        return super().format_help(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the error."""
        self.exit(2, f"prunelight: error: {parse_error(message)}\n")


class SaveConfig(SaveConfigCallback):
    """Writes the settings of a run as config.yaml beside its logs, over no file of others.

    Without a logger that is the run's own directory, where the user's config may be.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file, if it is not there yet or was written by a run.

        Raises:
            FileExistsError: if there is a file of another origin.
        """
        file = Path(str(trainer.log_dir or trainer.default_root_dir), self.config_filename)
        if file.is_file() and not file.read_bytes().startswith(b"# lightning.pytorch=="):
            raise FileExistsError(
                f"{file} exists, and the run would write its settings there; move it, or set "
                "trainer.logger or another trainer.default_root_dir"
            )
        super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """LightningCLI with prunelight's verbs and the tokenizer linked to the model."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the verbs, and the arguments of each that the command line does not ask for."""
        verbs = LightningCLI.subcommands()
        verbs.pop("predict")
        both = {"model", "datamodule"}
        return {**verbs, "prune": both, "analyze": both}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return the parser of the command, or of a verb; LightningCLI calls it."""
        self.parser_class = Parser
        return super().init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data use the model's own tokenizer; order the help.

        For an argument that may be an object jsonargparse reads a text that names a file or a URL
        as a config, and imports the classes in it. Here the tokenizer is a name and nothing else.
        The attribute is private, tested with jsonargparse 4.53.
        """
        tokenizer: Any = next(a for a in parser._actions if a.dest == "data.tokenizer")
        tokenizer._typehint = str
        parser.link_arguments("model.name", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")
        show_usual_options(parser)

    def instantiate_trainer(self, **kwargs: object) -> pl.Trainer:
        """Log inside the run's own directory, see `loggers_of`."""
        settings = self._get(self.config_init, "trainer", default={})
        check_root(settings.get("default_root_dir"))
        root = Path(settings.get("default_root_dir") or Path.cwd())
        kwargs["logger"] = loggers_of(settings.get("logger"), root)
        given = settings.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        kept = any(isinstance(callback, RecoveryCheckpoint) for callback in given)
        added: list[Any] = []
        if (
            self.subcommand == "fit"
            and not kept
            and settings.get("enable_checkpointing") is not False
        ):
            added.append(RecoveryCheckpoint())
        barred = any(isinstance(callback, ProgressBar) for callback in given)
        if not barred and settings.get("enable_progress_bar") is not False:
            added.append(TrainingProgress())
        if settings.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False  # our log says what is trained
        kwargs["callbacks"] = [*given, *added]
        try:
            return super().instantiate_trainer(**kwargs)
        except Exception as error:  # more devices than there are, ...
            if our_error(error):
                raise
            told = " ".join(str(missing_package(error) or error).split())
            given = ", ".join(
                f"{name}={value}"
                for name, value in vars(settings).items()
                if name not in ("callbacks", "logger") and value is not None
                if value != signature(pl.Trainer).parameters[name].default
            )
            raise ValueError(
                f"no Trainer can be made of these settings ({given}): {told}"
            ) from error

    def _set_seed(self) -> None:
        """Set the seed; LightningCLI calls it.

        Raises:
            ValueError: if it is out of the range that numpy takes.
        """
        seed = self._get(self.config, "seed_everything")
        if isinstance(seed, int) and not isinstance(seed, bool):
            checked_value("seed_everything", seed, int, between(0, 2**32 - 1))
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuse what jsonargparse passes: null anywhere, and plain values for a section.

        Raises:
            TypeError: naming the option.
        """
        trainer = self._get(self.config, "trainer")
        for name, hint in get_type_hints(pl.Trainer.__init__).items():
            if trainer.get(name, "") is None:
                checked_value(f"trainer.{name}", None, hint)
        check_sections("model", RecoveryModule, self._get(self.config, "model"))
        given = trainer.get("callbacks") or []
        known = {made.__name__: made for made in our_callbacks()}
        for entry in given if isinstance(given, list) else [given]:
            name = entry.class_path.rpartition(".")[2]
            if name in known:
                check_sections(name, known[name], entry.get("init_args") or {})

    def before_prune(self) -> None:
        """Count the time since Python started."""
        self._start_clock()

    def before_fit(self) -> None:
        """Refuse a strategy, a directory or a checkpoint before any process is started."""
        self._start_clock()
        self._check_checkpoint()
        settings = self.model.run.settings
        check_strategy(self.trainer, settings.quantization, settings.recovery)
        check_writable(Path(self.trainer.default_root_dir))

    def before_validate(self) -> None:
        """Refuse a checkpoint before any process is started."""
        self._check_checkpoint()

    before_test = before_validate

    def _check_checkpoint(self) -> None:
        """Check `ckpt_path`.

        Raises:
            ValueError: if it is a word that stands for nothing here, or no checkpoint file.
            FileNotFoundError: if it is a file that does not exist.
        """
        path, verb = self._get(self.config_init, "ckpt_path"), str(self.subcommand)
        if path == "":
            raise ValueError("ckpt_path='' must be the file of a checkpoint, last, or null")
        if not path or (path == "last" and verb == "fit"):  # fit starts anew where there is none
            return
        callbacks = self.trainer.checkpoint_callbacks
        places = [Path(self.trainer.default_root_dir) / "checkpoints"]
        places += [Path(place) for c in callbacks if (place := getattr(c, "dirpath", None))]
        newest = newest_checkpoint(*places)
        if path == "last" and newest is not None:
            log.info("ckpt_path=last is %s", newest)
            self.config_init[verb].ckpt_path = path = str(newest)
        if str(path).partition(":")[0] in CHECKPOINT_WORDS:
            example = f", such as {newest}" if newest else ""
            raise ValueError(
                f"ckpt_path={path} stands for no file that {verb} knows; give the file of a "
                f"checkpoint{example}"
            )
        check_checkpoint_path(path)

    def _parse_ckpt_path(self) -> None:
        """Take no arguments of the model from a checkpoint, as LightningCLI would.

        They could name classes, and switch on trust_remote_code.
        """

    def _start_clock(self) -> None:
        """Let the cost table begin where Python began."""
        run, reading = self.model.run, time.perf_counter() - IMPORTED
        run.start_clock()
        run.phases.add("start Python and import", process_age() - reading)
        run.phases.add("read the config", reading)

    def after_fit(self) -> None:
        """Show the result."""
        self._show()

    def after_prune(self) -> None:
        """Show the result."""
        self._show()

    @rank_zero_only
    def _show(self) -> None:
        record = self.model.record
        if record is not None:
            console = Console()
            console.print(summary_table(record))
            console.print(f"Report and models: {Path(self.trainer.default_root_dir).resolve()}")


def main(arguments: Sequence[str], description: str, verbs: Mapping[str, str]) -> None:
    """Run the command line.

    Args:
        arguments: what follows the name of the command.
        description: shown by help, as the texts of the verbs are.
        verbs: each verb with a sentence.
    """
    # Lightning lets configs come from other machines; they name classes, which are imported.
    set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)
    handler = BesideBars()
    logging.basicConfig(format="%(message)s", handlers=[handler])
    quiet_libraries(handler)
    # Python hides warnings of this kind, and a config may name an old class path.
    warnings.filterwarnings("default", r"prunelight\..* is now ", DeprecationWarning)
    logging.getLogger("prunelight").setLevel(
        logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.ERROR
    )
    try:
        sys.argv[1:] = find_configs(arguments)
        seed = default_seed()
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"prunelight: error: {error}\n")
        sys.exit(2)
    try:
        CLI(
            RecoveryModule,
            TextDataModule,
            trainer_class=Trainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs=parser_settings(description, verbs),
            auto_configure_optimizers=False,
            seed_everything_default=seed,
        )
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)  # not the 0 of a finished run
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        sys.exit(128 + signal.SIGINT)  # Lightning's is 1; what is saved was told
    except KeyboardInterrupt:
        sys.stderr.write("prunelight: stopped; the same command starts again\n")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        ours = one_line_error(error) or settings_error(error)
        if isinstance(ours, FinishedRunError):
            sys.stderr.write(f"prunelight: {ours}\n")
            sys.exit(0)  # a loop that starts a killed run again ends here
        if os.environ.get("PRUNELIGHT_TRACEBACK") or ours is None:
            raise
        sys.exit(f"prunelight: error: {ours}")


def default_seed() -> int:
    """Return the seed that the environment gives, 0 without one.

    Raises:
        ValueError: if it is no number.
    """
    text = os.environ.get("PL_GLOBAL_SEED", "0")
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(
            f"PL_GLOBAL_SEED={text!r} in the environment must be a whole number"
        ) from error


def loggers_of(given: Logger | list[Logger] | bool | None, root: Path) -> list[Logger] | bool:
    """Return the loggers of a run: CSV files always, TensorBoard if it is installed.

    Args:
        given: `trainer.logger`: what logs beside the CSV files; true or null is the default, false
            logs nothing.
        root: directory of the run.
    """
    if given is False:
        return False
    # A row at a time: those that wait in memory are lost when the process is killed.
    table = CSVLogger(root, name="logs", flush_logs_every_n_steps=1)
    if given is None or given is True:
        names = ("tensorboard", "tensorboardX")
        if not any(find_spec(name) for name in names):
            return [table]
        # One directory for all starts of a run, so that its curves go on after a resume.
        board = TensorBoardLogger(root, name="", version="tensorboard", default_hp_metric=False)
        return [table, board]
    loggers = given if isinstance(given, list) else [given]
    return loggers if any(isinstance(x, CSVLogger) for x in loggers) else [*loggers, table]


def check_sections(owner: str, made: type, values: Mapping[str, Any] | Namespace) -> None:
    """Check that each argument that is a section of settings got a mapping.

    Raises:
        TypeError: naming the argument and what it may hold.
    """
    for name, within in settings_of(made).items():
        value = values.get(name)
        if not (value is None or isinstance(value, Namespace | dict)):
            raise TypeError(
                f"{owner}.{name}={value!r} must be a mapping with some of {', '.join(within)}; "
                "leave it out for the defaults"
            )


def parser_settings(description: str, verbs: Mapping[str, str]) -> dict[str, Any]:
    """Return what LightningCLI makes the parser of the command and of each verb with."""
    settings = {
        verb: {
            "description": text,
            "usage": f"prunelight {verb} --config FILE [--OPTION VALUE ...]",
        }
        for verb, text in verbs.items()
    }
    return {"prog": "prunelight", "description": description, **settings}


def show_usual_options(parser: LightningArgumentParser) -> None:
    """Put the options of the Trainer that most runs need into a group of their own."""
    (trainer,) = (
        group
        for group in parser._action_groups
        if any(action.dest == "trainer" for action in group._group_actions)
    )
    trainer.title = TRAINER_TITLE
    usual = parser.add_argument_group(
        "Pruning methods, and the options of Lightning's Trainer that most runs need",
        f"Pruning methods for --trainer.callbacks: {', '.join(pruning_methods())}. "
        "--trainer.callbacks.help NAME shows the arguments of one.",
    )
    names = [f"trainer.{name}{ending}" for name in USUAL for ending in ("", ".help")]
    actions = {action.dest: action for action in trainer._group_actions}
    usual._group_actions.extend(actions.pop(name) for name in names if name in actions)
    trainer._group_actions[:] = actions.values()


def pruning_methods() -> list[str]:
    """Return the names of the pruning methods in prunelight.callbacks."""
    exported = {name: getattr(prunelight.callbacks, name) for name in prunelight.callbacks.__all__}
    methods = [name for name, made in exported.items() if issubclass(made, PruningCallback)]
    return sorted(name for name in methods if not name.endswith("Callback"))


def settings_error(error: BaseException | None) -> BaseException | None:
    """Return an error that Lightning raised for its own settings, if it is that."""
    while error is not None:
        if isinstance(error, MisconfigurationException):
            told = " ".join(str(error).split())
            return ValueError(f"the settings of the Trainer do not fit this run: {told}")
        error = error.__cause__ or error.__context__
    return None
