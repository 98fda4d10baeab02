"""The door of the command line: help and version at once; a verb imports what it needs.

`prunelight fit | prune | validate | test | analyze --config FILE`, and `prunelight families`.
Help and version need the standard library alone. Verbs with a config go to
`prunelight.lightning_cli`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from shutil import get_terminal_size
from textwrap import fill
from threading import Timer

from prunelight.moved import serve_old_names
from prunelight.version import __version__

DESCRIPTION = "Prune causal language models, recover them, and save models that others can load."
VERBS = {
    "fit": "Prune the model, train it, measure it and save it with a report.",
    "prune": "Prune the model and save it with a report; no training.",
    "validate": "Measure perplexity and accuracy on the validation windows.",
    "test": "The same, logged as test/perplexity and test/accuracy.",
    "analyze": "Draw what the model's hidden states look like; nothing is pruned.",
}
# Verbs without a Trainer: the module of each in `prunelight.commands`.
COMMANDS = {
    "score": "Compute the scores that plans are made of, once.",
    "plan": "Make a method's plan without training; show a plan, or the difference of two.",
    "apply": "Carry out a plan on its model, and save the result.",
    "estimate": "Tell what a model takes in memory while it is pruned and recovered.",
    "evaluate": "Measure a model on text and tasks, alone or against the dense one.",
    "compare": "Run a contest of methods at equal size, and draw one page to decide from.",
    "reproduce": "Repeat a paper's table on your model, with the published figures beside it.",
    "report": "Draw the report of a run again.",
    "export": "Write a saved model as GGUF, for CTranslate2 or as DeciLM, and prove the result.",
}
# A verb without a config: it looks at the structure of a model alone.
FAMILIES = {"families [MODEL]": "Say what each kind of pruning can do with a model, by its config."}
# Those that most runs need, with a whole sentence each.
OPTIONS = {
    "--config FILE": "YAML file with any options; an installed one is found by its bare name.",
    "--model.name NAME": "Hub id, directory, GGUF file or bundled name of the model.",
    "--model.recovery KIND": "What is trained: lora for adapters, full for all weights, or none.",
    "--model.quantization KIND": "Bits of the weights under adapters: nf4, fp4, int8 or none.",
    "--model.learning_rate X": "Peak learning rate.",
    "--data.train SOURCE": "Text or instructions to train on; a file, a sample or a dataset.",
    "--data.validation SOURCE": "The same, to measure perplexity on.",
    "--data.calibration SOURCE": "The same, for what pruning looks at.",
    "--data.seq_len N": "Tokens of a window.",
    "--data.batch_size N": "Windows of a batch, for each process.",
    "--trainer.callbacks NAME": "Pruning method of prunelight.callbacks, such as ShortGPT.",
    "--trainer.max_steps N": "Optimizer steps of the training.",
    "--trainer.devices N": "Number of devices, a process each.",
    "--trainer.default_root_dir DIR": "Directory of the run, its models and its report.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        sys.stderr.write(help_text())
        sys.exit(2)
    verbs = {*VERBS, *COMMANDS, "families"}
    if {"-h", "--help"} & set(given) and not verbs & set(given):
        sys.stdout.write(help_text())
    elif given[0] == "families":
        from prunelight.pruning.abilities import show

        show(given[1:])
    elif given == ["--version"]:
        sys.stdout.write(f"prunelight {__version__}\n")
    elif given[0] in COMMANDS:
        with _telling_slow_imports():
            command = import_module(f"prunelight.commands.{given[0]}")
        command.main(given[1:])
    else:
        with _telling_slow_imports():
            from prunelight.lightning_cli import main as run

        run(given, DESCRIPTION, VERBS)


@contextmanager
def _telling_slow_imports() -> Iterator[None]:
    """On a busy or cold machine the imports take long enough to look like a fault."""
    told = Timer(5.0, sys.stderr.write, ["importing torch, transformers and lightning ...\n"])
    told.daemon = True
    told.start()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        told.cancel()


def help_text() -> str:
    """Return what `prunelight --help` shows, in lines that fit the terminal."""
    return f"""usage: prunelight VERB --config FILE [--OPTION VALUE ...]

{DESCRIPTION}

verbs:
{_rows({**VERBS, **COMMANDS, **FAMILIES})}

options that most runs need:
{_rows(OPTIONS)}

other:
{_rows({"VERB --help": "Show all options of a verb.", "--version": "Show the version."})}

example:
  prunelight fit --config quickstart.yaml --trainer.default_root_dir runs/first
"""


def _rows(texts: dict[str, str]) -> str:
    """Return two columns: the names, and their texts in as many lines as these need."""
    indent = max(len(name) for name in texts) + 4
    width = max(get_terminal_size().columns, indent + 30)
    return "\n".join(
        fill(text, width, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
        for name, text in texts.items()
    )


serve_old_names(__name__)

if __name__ == "__main__":
    main()
