"""How a verb without a Trainer runs: a parser whose errors are one line, logs, exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from prunelight.one_line_errors import one_line_error
from prunelight.quiet_libraries import quiet_libraries
from prunelight.runtime.progress import BesideBars


class VerbParser(ArgumentParser):
    """jsonargparse's parser; an error is one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the error in one line."""
        from prunelight.parse_errors import parse_error  # it takes seconds: it imports lightning

        options = [*self.get_defaults().keys()]
        self.exit(2, f"prunelight: error: {parse_error(message, self.prog, options)}\n")


def run_verb(
    parser: VerbParser, arguments: Sequence[str], verb: Callable[[Namespace], Any]
) -> None:
    """Parse arguments and run a verb; an error that is no fault of ours ends in one line.

    Args:
        parser: of the verb.
        arguments: what follows the verb on the command line.
        verb: is called with what was parsed.
    """
    handler = BesideBars()
    logging.basicConfig(format="%(message)s", handlers=[handler])
    quiet_libraries(handler)
    first = int(os.environ.get("RANK", "0")) == 0  # torchrun starts several
    logging.getLogger("prunelight").setLevel(logging.INFO if first else logging.ERROR)
    parser.allow_abbrev = False  # verbs look at what was given, under whole names
    given = parser.parse_args([*arguments])
    try:
        verb(given)
    except KeyboardInterrupt:
        sys.stderr.write("prunelight: stopped; the same command starts again\n")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        ours = one_line_error(error)
        if os.environ.get("PRUNELIGHT_TRACEBACK") or ours is None:
            raise
        sys.exit(f"prunelight: error: {ours}")


def add_place(parser: VerbParser) -> None:
    """Add the options that say how weights are stored and where a model computes."""
    add: Any = parser.add_argument
    add("--dtype", type=str, default="auto", help="auto, float32, bfloat16 or float16.")
    add("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    add(
        "--attn_implementation",
        type=str | None,
        default=None,
        help="transformers' attention: sdpa, eager, flash_attention_2 and others; by default its "
        "own choice.",
    )


def add_offload(parser: VerbParser) -> None:
    """Add the option that keeps a model off the device, whose layers then go there one by one."""
    _add_switch(
        parser,
        "--offload",
        "Keep the model off the device, with one layer there at a time; a model that does not fit "
        "is treated so anyway.",
    )


def add_trust(parser: VerbParser) -> None:
    """Add the option that allows code of a model's authors."""
    _add_switch(
        parser,
        "--trust_remote_code",
        "Run Python code that comes with the model; only of authors whom you trust.",
    )


def _add_switch(parser: VerbParser, name: str, help_text: str) -> None:
    """Add an option that is false unless it is given."""
    add: Any = parser.add_argument
    add(name, type=bool, default=False, help=help_text)
