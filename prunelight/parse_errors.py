"""What the parser of the command line refuses, in one line with the nearest valid name.

jsonargparse tells of a union of types in ten lines, and names neither the option nor a way out for
a misspelt one. Here its message becomes "option=value must be ...; did you mean ...?". The texts
that are read stand in `tests/reliability/test_inputs.py`, which says if jsonargparse changes
them.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import lightning.pytorch.callbacks
import lightning.pytorch.loggers

import prunelight.callbacks
from prunelight.runtime.arguments import did_you_mean
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "dict": "a mapping",
}


_EXAMPLES = {"callbacks": "ShortGPT", "logger": "CSVLogger", "optimizer": "torch.optim.AdamW"}


def parse_error(
    message: str, command: str = "prunelight fit", options: Sequence[str] | None = None
) -> str:
    """Return an error of jsonargparse in one line: value, rule and remedy.

    Args:
        message: what jsonargparse says, often in many lines.
        command: whose help says more.
        options: of a command that takes no classes; None for those of a fit.
    """
    message = re.sub(
        r"'\w+' object has no attribute 'keys'", "init_args must be a mapping", message
    )
    own = re.search(
        r"class_path '[\w.]*?(\w+)':\n(.+?)(?=\n +- |\n +Given|\Z)", message, flags=re.DOTALL
    )
    known = option_names() if options is None else options
    told = _no_section(message, known) or _unknown_name(message, known) or _wrong_value(message)
    if told is None:
        text = f"{own[1]}: {own[2]}" if own else message
        told = re.sub(r'Parser key "([\w.]+)":', r"\1:", " ".join(text.split()))
    return f"{' '.join(told.split())} ({command} --help says more)"


def _no_section(message: str, options: Sequence[str]) -> str | None:
    """Return the error of a plain value for an argument that holds settings, such as `lora`."""
    key = _key_of(message)
    value = re.search(r"Unable to load config '([^']*)'|Given value: ([^{\[\n]+)\Z", message)
    if key is None or value is None:
        return None
    names = [name.removeprefix(f"{key}.") for name in options if name.startswith(f"{key}.")]
    names = names or names_within(key)
    if not names:
        return None
    given = _short(value[1] or value[2])
    return f"{key}={given} must be a mapping with some of {', '.join(names)}, or a file of it"


def _unknown_name(message: str, options: Sequence[str]) -> str | None:
    """Return the error of a name that is not known: of an option, a verb or a class."""
    verb = re.search(r"invalid choice: '(\S+)' \(choose from (.+)\)", message)
    if verb:
        known = re.findall(r"\w+", verb[2])
        near = did_you_mean(verb[1], known)
        return f"there is no verb {verb[1]}{near}; the verbs are {', '.join(known)}"
    option = re.search(
        r"(?:option '|Option ')([^']+)' ?(?:is not accepted)?$|unrecognized arguments: (\S+)",
        message.strip(),
    )
    if option:
        given = option[1] or option[2].partition("=")[0]
        name = given.lstrip("-")
        of_the_command = "." in name or name != given or "Subcommand" in message
        if name == "class_path" or name.partition(".")[0] in class_names():
            return (
                "a class is given as class_path: NAME and its arguments as init_args: {...}, both "
                "in one mapping"
            )
        names = options if of_the_command else argument_names()
        return f"there is no option {name}{did_you_mean(name, names)}"
    missing = (
        r"import path string: ([\w.]+)",
        r"module '[\w.]+' has no attribute '(\w+)'",
        r"class_path '([\w.]+)':\s+No module named",
    )
    wrong_class = next((match for text in missing if (match := re.search(text, message))), None)
    if wrong_class:
        near = did_you_mean(wrong_class[1].rpartition(".")[2], class_names())
        key = _key_of(message)
        if key and wrong_class[1] in class_names():
            return f"{key}: {wrong_class[1]} is no class for this option"
        return f"{key}: there is no class {wrong_class[1]}{near}" if key else None
    return None


def _wrong_value(message: str) -> str | None:
    """Return the error of a value that is none of an option's."""
    key = _key_of(message)
    if key == "model.name" and re.search(r"value: None\s*\Z", message):
        return "model.name is missing; name a model, such as model.name: smollm2-135m"
    if key == "config":
        return f"the config is no valid YAML: {message.partition(':')[2]}"
    value = re.search(r"(?:Given value|Got value): (.*)\Z", message, flags=re.DOTALL)
    rules = re.search(r"Subtypes: \[(.*)\]$", message, flags=re.MULTILINE) or re.search(
        r"Expected an? (.*?)\. Got value", message, flags=re.DOTALL
    )
    if key is None or value is None or rules is None or "<class 'prunelight" in rules[1]:
        return None
    if "lightning.pytorch" in rules[1] or "Callable" in rules[1]:
        if "Problem with given" in message:  # what the class itself says
            return None
        example = _EXAMPLES.get(key.rpartition(".")[2])
        words = "a class_path with init_args" + (f", such as {example}" if example else "")
        return f"{key}={_short(value[1])} must be {words}; see --{key}.help"
    literals = re.findall(r"Literal\[(.*?)\]", rules[1])
    choices = [str(choice) for text in literals for choice in ast.literal_eval(f"[{text}]")]
    rest = re.sub(r"typing\.Literal\[.*?\]", "", rules[1])
    lists = [f"a list of {name}" for name in re.findall(r"list\[(\w+)\]", rest)]
    rest = re.sub(r"list\[\w+\]", "", rest)
    kinds = [_WORDS.get(name, name) for name in re.findall(r"<class '(?:[\w.]*\.)?(\w+)'>", rest)]
    near = did_you_mean(value[1], choices) if choices else ""
    one_of = [f"one of {', '.join(dict.fromkeys(choices))}"] if choices else []
    rule = " or ".join([*one_of, *kinds, *lists])
    if rule == _WORDS["str"]:
        rule += "; put it in quotes"
    return f"{key}={_short(value[1])} must be {rule}{near}" if rule else None


def _key_of(message: str) -> str | None:
    key = re.search(r'Parser key "([\w.]+)":', message)
    return key[1] if key else None


def _short(value: str) -> str:
    """Return a value as it was given, or its start where it is long."""
    return value if len(value) <= 60 else value[:57] + "..."


def class_names() -> list[str]:
    """Return the classes that a config may well name: callbacks and loggers."""
    modules: tuple[Any, ...] = (
        prunelight.callbacks,
        lightning.pytorch.callbacks,
        lightning.pytorch.loggers,
    )
    return [name for module in modules for name in module.__all__]


def option_names() -> list[str]:
    """Return the options of the verbs, with the settings of each section."""
    names = ["config", "seed_everything", "ckpt_path", "verbose", "kernel", "ignore_first_tokens"]
    names += ["model", "data", "trainer"]
    for section, made in (
        ("model", RecoveryModule),
        ("data", TextDataModule),
        ("trainer", lightning.pytorch.Trainer),
    ):
        within = settings_of(made)
        for argument in inspect.signature(made).parameters:
            names.append(f"{section}.{argument}")
            names += [f"{names[-1]}.{name}" for name in within.get(argument, ())]
    return names


def argument_names() -> list[str]:
    """Return the arguments of all classes that a config may name, and of their settings."""
    names = ["class_path", "init_args"]
    for module in (prunelight.callbacks, lightning.pytorch.callbacks):
        for made in (getattr(module, name) for name in module.__all__):
            names += [*inspect.signature(made).parameters]
    for made in our_callbacks():
        names += [name for within in settings_of(made).values() for name in within]
    return [*dict.fromkeys(names)]


def names_within(argument: str) -> list[str]:
    """Return the settings that an argument of our callbacks holds, such as `sparsegpt`."""
    sections = map(settings_of, our_callbacks())
    return next((within[argument] for within in sections if argument in within), [])


def our_callbacks() -> list[type]:
    """Return the classes of `prunelight.callbacks`."""
    return [getattr(prunelight.callbacks, name) for name in prunelight.callbacks.__all__]


def settings_of(made: type) -> dict[str, list[str]]:
    """Return the names inside each argument of a class that is a dataclass of settings."""
    hints = get_type_hints(made.__init__)  # type: ignore[misc]
    within = {
        name: [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        for name, hint in hints.items()
    }
    return {
        name: [field.name for part in parts for field in fields(part)]
        for name, parts in within.items()
        if parts
    }
