"""The command line: `prunelight fit | validate | test | prune | analyze --config FILE`.

`fit` prunes at its start, recovers, evaluates and saves; `prune` stops after the pruned directory;
`analyze` draws what the model's hidden states look like, and prunes nothing.
Config files are found by name among the installed ones. A fault that prunelight itself reports ends
in one line; set PRUNELIGHT_TRACEBACK=1 to see where it came from.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console

import prunelight.callbacks
from prunelight.callbacks.recovery.checkpoint import RecoveryCheckpoint
from prunelight.evaluation.report.report import summary_table
from prunelight.run.strategies import check_strategy
from prunelight.runtime.atomic_files import check_writable
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule
from prunelight.training.trainer import Trainer

log = logging.getLogger(__name__)

PACKAGES = [Path(__file__).resolve().parent, Path(prunelight.callbacks.__file__).resolve().parent]


class Parser(LightningArgumentParser):
    """LightningCLI's parser, which tells a wrong value in one line, without all options above."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the error."""
        self.exit(2, f"prunelight: error: {parse_error(message)}\n")


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
        """Let the data use the model's own tokenizer."""
        parser.link_arguments("model.name", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    def instantiate_trainer(self, **kwargs: object) -> pl.Trainer:
        """Log to CSV files inside the run's own directory, unless told otherwise."""
        settings = self._get(self.config_init, "trainer", default={})
        if settings.get("logger") is None:
            root = settings.get("default_root_dir") or Path.cwd()
            # A row at a time: those that wait in memory are lost when the process is killed.
            kwargs["logger"] = CSVLogger(root, name="logs", flush_logs_every_n_steps=1)
        given = settings.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        kept = any(isinstance(callback, RecoveryCheckpoint) for callback in given)
        if (
            self.subcommand == "fit"
            and not kept
            and settings.get("enable_checkpointing") is not False
        ):
            kwargs["callbacks"] = [*given, RecoveryCheckpoint()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:  # more devices than there are, ...
            told = str(error).strip().splitlines()[0]
            raise ValueError(f"no Trainer can be made of these settings: {told}") from error

    def before_fit(self) -> None:
        """Refuse a strategy, a directory or a checkpoint before any process is started."""
        settings = self.model.run.settings
        check_strategy(self.trainer, settings.quantization, settings.recovery)
        check_writable(Path(self.trainer.default_root_dir))
        path = self._get(self.config_init, "ckpt_path")
        if path and path not in ("best", "last", "hpc", "registry") and not Path(path).exists():
            raise FileNotFoundError(
                f"ckpt_path={str(path)!r} does not exist; give a checkpoint of an earlier run "
                "(they are in checkpoints/ of its directory)"
            )

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    sys.argv[1:] = find_configs(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s")
    # The first start of a run has no checkpoint to go on from.
    warnings.filterwarnings("ignore", ".*there is no last checkpoint available")
    logging.getLogger("prunelight").setLevel(
        logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.ERROR
    )
    try:
        CLI(
            RecoveryModule,
            TextDataModule,
            trainer_class=Trainer,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "prunelight"},
            auto_configure_optimizers=False,
        )
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)  # not the 0 of a finished run
    except Exception as error:
        ours = our_error(error) or disk_error(error)
        if os.environ.get("PRUNELIGHT_TRACEBACK") or ours is None:
            raise
        sys.exit(f"prunelight: error: {ours}")


def parse_error(message: str) -> str:
    """Return an error of jsonargparse in one line: of a class's arguments, what that class says."""
    own = re.search(
        r"class_path '[\w.]*?(\w+)':\n(.+?)(?=\n +- |\n +Given|\Z)", message, flags=re.DOTALL
    )
    told = f"{own[1]}: {own[2]}" if own else message
    told = re.sub(r'Parser key "([\w.]+)":', r"\1:", " ".join(told.split()))
    return f"{told.replace('a typing.Literal[', 'one of [')} (prunelight fit --help says more)"


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Replace config names that are no file here by the installed config of that name."""
    found = list(arguments)
    for position, argument in enumerate(found):
        option, separator, value = argument.partition("=")
        if option in ("--config", "-c") and separator:
            found[position] = f"{option}={_installed(value)}"
        elif position and found[position - 1] in ("--config", "-c"):
            found[position] = _installed(argument)
    return found


def _installed(name: str) -> str:
    candidate = files("prunelight.configs") / name
    return str(candidate) if not Path(name).exists() and candidate.is_file() else name


def our_error(error: BaseException | None) -> BaseException | None:
    """Return the error in a chain of causes that prunelight raised on purpose, if there is one.

    It is one whose last frame is in our code. jsonargparse wraps errors of constructors in its own.
    """
    expected = (ValueError, TypeError, OSError, ImportError, RuntimeError)
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        folders = Path(frames[-1].filename).resolve().parents if frames else ()
        if isinstance(error, expected) and any(package in folders for package in PACKAGES):
            return error
        error = error.__cause__ or error.__context__
    return None


def disk_error(error: BaseException | None) -> OSError | None:
    """Return an error for a file that a library could not write, such as a logger's, if it is that.

    What prunelight itself writes says more, see `prunelight.files.explaining`.
    """
    expected = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
    while error is not None:
        if isinstance(error, OSError) and error.errno in expected:
            return OSError(
                f"cannot write {error.filename or 'a file of the run'}: {error.strerror}; "
                "checkpoints that were written before are intact. Start the same command again "
                "when there is room"
            )
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
