"""Commands that are wrong as a whole: misspelt names, odd files, steps that exclude each other."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from runs import VARIED_TEXT, write_model
from warm_command import End, call
from wrong_inputs import Case, config_of


@dataclass(frozen=True)
class Command(Case):
    """A whole command line; `option` says what is wrong, `value` what the error must name."""

    arguments: tuple[str, ...] = ()

    def is_named_in(self, text: str) -> bool:
        """Return whether an error names what it should suggest."""
        return str(self.value) in text


class TinyRun:
    """A tiny model, its text, and the config of a run that is right."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0
        text, model = root / "text.txt", root / "model"
        text.write_text(VARIED_TEXT, encoding="utf-8")
        write_model(model, hidden_size=64, intermediate_size=128)
        self.config: dict[str, Any] = {
            "model": {"name": str(model), "warmup_steps": 0},
            "data": {
                **dict.fromkeys(("train", "validation", "calibration"), str(text)),
                "seq_len": 32,
                "batch_size": 2,
                "num_calibration": 8,
                "num_validation": 3,
            },
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 2,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "logger": False,
            },
        }

    def write(self, config: Any, name: str = "config.yaml") -> str:
        """Write a config, or its text; return the path."""
        path = self.root / name
        text = config if isinstance(config, str) else yaml.safe_dump(config)
        path.write_text(text, encoding="utf-8")
        return str(path)

    def directory(self) -> str:
        """Return the directory of a new run; that of the run before is gone."""
        shutil.rmtree(self.root / f"run{self.count}", ignore_errors=True)
        self.count += 1
        return str(self.root / f"run{self.count}")

    def end_of(self, case: Case) -> End:
        """Run `fit` with one value of one option."""
        config = config_of(case, self.config)
        config["trainer"].setdefault("default_root_dir", self.directory())
        return call(["fit", "--config", self.write(config)])

    def call(self, command: Command) -> End:
        """Run a command in a directory of its own."""
        directory = ["--trainer.default_root_dir", self.directory()]
        verbs = command.arguments[:1]
        return call([*command.arguments, *(directory if verbs != ("families",) else [])])


def _with(tiny: TinyRun, **sections: dict[str, Any]) -> tuple[str, ...]:
    """Return a fit whose config has these settings too."""
    config = {name: {**tiny.config[name], **sections.get(name, {})} for name in tiny.config}
    tiny.count += 1
    return ("fit", "--config", tiny.write(config, f"config{tiny.count}.yaml"))


def _callbacks(tiny: TinyRun, *entries: Any, **sections: dict[str, Any]) -> tuple[str, ...]:
    made = [{"class_path": name, "init_args": arguments} for name, arguments in entries]
    trainer = {"callbacks": made, **sections.pop("trainer", {})}
    return _with(tiny, trainer=trainer, **sections)


def misspellings(tiny: TinyRun) -> Iterator[Command]:
    """Yield commands with a misspelt name, and the name that the error must suggest."""
    given = tuple(_with(tiny))
    for name, near in (
        ("ShortGTP", "ShortGPT"),
        ("shortgpt", "ShortGPT"),
        ("SlicGPT", "SliceGPT"),
        ("prunelight.callbacks.ShortenLlama", "ShortenedLlama"),
        ("WidthPrunning", "WidthPruning"),
        ("ModelChekpoint", "ModelCheckpoint"),
    ):
        yield Command("class", near, False, _callbacks(tiny, (name, {})))
    for made, name, near in (
        ("ShortGPT", "num_layer", "num_layers"),
        ("ShortGPT", "ration", "ratio"),
        ("WeightPruning", "sparsities", "sparsity"),
        ("WidthPruning", "neurons_ratio", "neuron_ratio"),
        ("SliceGPT", "slice_ration", "slice_ratio"),
        ("ModelCheckpoint", "monitr", "monitor"),
    ):
        yield Command("argument", near, False, _callbacks(tiny, (made, {name: 1})))
    for section, name, near in (
        ("model", "nam", "model.name"),
        ("model", "learning_rat", "model.learning_rate"),
        ("model", "quantisation", "model.quantization"),
        ("data", "seqlen", "data.seq_len"),
        ("data", "batchsize", "data.batch_size"),
        ("trainer", "max_step", "trainer.max_steps"),
        ("trainer", "device", "trainer.devices"),
    ):
        yield Command("option", near, False, _with(tiny, **{section: {name: 1}}))
        if not near.startswith(f"{section}.{name}"):  # which argparse takes as an abbreviation
            yield Command("option", near, False, (*given, f"--{section}.{name}", "1"))
    for section, name, value, near in (
        ("model", "dtype", "fp16", "float16"),
        ("model", "dtype", "bf16", "bfloat16"),
        ("model", "loss", "kl", "kd"),
        ("model", "recovery", "lorra", "lora"),
        ("model", "quantization", "nf-4", "nf4"),
        ("model", "lr_scheduler", "cosin", "cosine"),
        ("trainer", "precision", "fp16", "16-mixed"),
        ("trainer", "precision", "bf16-mix", "bf16-mixed"),
    ):
        yield Command("value", near, False, _with(tiny, **{section: {name: value}}))
    yield Command("verb", "fit", False, ("fitt", *given[1:]))
    yield Command("verb", "validate", False, ("valdate", *given[1:]))
    yield Command("config", "quickstart.yaml", False, ("fit", "--config", "quickstrat.yaml"))
    for name, content in (
        ("binary", bytes(range(256))),
        ("utf16", "model: {name: x}".encode("utf-16")),
        ("zeros", b"\0" * 64),
        ("list", b"[1, 2]"),
        ("number", b"3"),
        ("open", b"model: ["),
        ("empty", b""),
        ("deep", b"[" * 3000),
        ("tabs", b"model:\n\tname: x\n"),
        ("model_is_text", b"model: x\n"),
        ("empty_model", b"model: {}\n"),
    ):
        path = tiny.root / f"{name}.yaml"
        path.write_bytes(content)
        yield Command(f"config {name}", "", False, ("fit", "--config", str(path)))
    yield Command("config directory", "", False, ("fit", "--config", str(tiny.root)))


def whole_runs(tiny: TinyRun) -> Iterator[Command]:
    """Yield runs whose parts exclude each other, each part being right; and runs that are right."""
    depth = ("ShortGPT", {"num_layers": 4})
    gradual = {"sparsity": 0.5, "schedule": {"start_step": 0, "end_step": 2}}
    for name, callbacks in {
        "4 + 4 of 6 layers": [depth, ("SLEB", {"num_layers": 4})],
        "5 + 1 of 6 layers": [("ShortGPT", {"num_layers": 5}), ("ShortGPT", {"num_layers": 1})],
        "protected of too few": [depth, ("ShortGPT", {"num_layers": 1, "protected": [3]})],
        "6 of 6 layers": [("ShortGPT", {"num_layers": 6})],
        "all layers protected": [("ShortGPT", {"num_layers": 1, "protected": [*range(6)]})],
        "two gradual DLPs": [("DLP", gradual), ("DLP", gradual)],
        "two different gradual DLPs": [("DLP", gradual), ("DLP", {**gradual, "alpha": 0.1})],
        "slice after zeros": [("DLP", {"sparsity": 0.5}), ("SliceGPT", {"slice_ratio": 0.25})],
        "slice twice": [("SliceGPT", {"slice_ratio": 0.25}), ("SliceGPT", {"slice_ratio": 0.5})],
        "budget after pruning": [depth, ("TokenBudget", {"tokens": 64})],
    }.items():
        yield Command(name, "", False, _callbacks(tiny, *callbacks))
    for name, callbacks in {
        "two depth methods": [("ShortGPT", {"num_layers": 2}), ("SLEB", {"num_layers": 2})],
        "depth and width": [depth, ("WidthPruning", {"neuron_ratio": 0.25, "multiple": 8})],
        "depth and zeros": [depth, ("DLP", {"sparsity": 0.5})],
    }.items():
        yield Command(name, "", True, _callbacks(tiny, *callbacks))


def random_config(tiny: TinyRun, draw: random.Random) -> Command:
    """Return a fit whose config has a few random edits in its text."""
    parts = [
        ":",
        "-",
        "[",
        "]",
        "{",
        "}",
        "\t",
        "\n",
        "  ",
        "#",
        "&a",
        "*a",
        "!!python/name:os",
        "?",
    ]
    parts += [
        "null",
        ".nan",
        ".inf",
        "1e999",
        '"',
        "'",
        "\0",
        "\u2028",
        "é",
        "- - -",
        "<<",
        "%",
        "@",
    ]
    config = {**tiny.config}
    entry = {"class_path": "ShortGPT", "init_args": {"num_layers": 2, "protected": [0]}}
    config["trainer"] = {**config["trainer"], "callbacks": [entry]}
    text = yaml.safe_dump(config)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(text))
        cut = draw.choice([0, 0, 1, 5, 20])
        text = text[:place] + draw.choice(parts) + text[place + cut :]
    return Command("edit", "", False, ("fit", "--config", tiny.write(text, "edited.yaml")))
