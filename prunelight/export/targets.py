"""What a format of another program must offer to be exported to: `Target`, and `TARGETS`.

A target checks before anything is written, writes, and reads back what it wrote. The logits that
the other program computes are compared with those of transformers in `exporting.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunelight.runtime.arguments import NOT_EMPTY, at_least, check_choice, check_fields

# T tokens of a window, V vocabulary

# Names of dtypes on the command line -> those of torch, for the config of a model.
TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Rounding:
    """How an export that rounds weights by data does it (GPTQ).

    Attributes:
        bits: of a weight, 4 or 8.
        group_size: inputs that share a scale; -1 for one scale a row; None for the largest of 128,
            64 and 32 that divides all widths.
        calibration: text that the rounding looks at, what `prunelight.read_documents` takes.
        num_calibration: windows drawn from it.
        seq_len: tokens of a window, at most the model's context.
        text: on which perplexity is measured before and after.
        num_windows: of it: the first ones.

    Raises:
        ValueError: if a number is out of range.
    """

    bits: int = 4
    group_size: int | None = None
    calibration: str = "sample:calibration"
    num_calibration: int = 32
    seq_len: int = 512
    text: str = "sample:validation"
    num_windows: int = 32

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(
            self,
            num_calibration=at_least(1),
            seq_len=at_least(2),
            num_windows=at_least(2),
            calibration=NOT_EMPTY,
            text=NOT_EMPTY,
        )


@dataclass(frozen=True)
class ExportOptions:
    """What was asked for.

    Attributes:
        dtype: of the weights, one of the target's `dtypes`.
        quantize: a quantization of the engine itself, one of the target's `quantizations`, or None.
        engine_python: Python of an environment that has the engine, or None for this one.
        rounding: how weights are rounded by data; None for targets that do not.
    """

    dtype: str
    quantize: str | None = None
    engine_python: str | None = None
    rounding: Rounding | None = None


@dataclass(frozen=True)
class Bound:
    """How far an export may be from its source.

    Attributes:
        measure: a field of `Proof`.
        value: the most that it may be, in nats.
    """

    measure: Literal["largest_difference", "mean_kl"]
    value: float


@dataclass(frozen=True)
class Rewritten:
    """What an export wrote that is another model than its source.

    Attributes:
        model: in memory, as it was written.
        facts: for the record, JSON values.
        line: what it cost, in a sentence.
    """

    model: PreTrainedModel
    facts: dict[str, Any]
    line: str


@dataclass(frozen=True)
class Reading:
    """What another program computes from an export.

    Attributes:
        engine: name of the program, such as "llama.cpp".
        version: of the program.
        logits: for each window (P, V), or log-probabilities; P = T, or as many as `positions`.
        positions: for each window the indices that were read; None for all.
        note: a limit of this reading, such as "the engine itself did not run"; "" for none.
    """

    engine: str
    version: str
    logits: Sequence[np.ndarray]
    positions: Sequence[Sequence[int]] | None = None
    note: str = ""


class NotReadableError(ImportError):
    """The program that reads an export is not here; the message names its pip line."""


@dataclass(frozen=True)
class Source:
    """The saved model that is exported.

    Attributes:
        directory: what `prunelight.save` or `save_pretrained` wrote.
        config: of the model.
    """

    directory: Path
    config: PretrainedConfig


class Target(Protocol):
    """A format of another program.

    Attributes:
        name: on the command line.
        engine: the program that reads it; a name of `prunelight.models.engines.ENGINES`, if known.
        suffix: of the name of an export: ".gguf" for a file, "" for a directory.
        dtypes: dtype -> how far the export may be from transformers in float32.
        quantizations: of the engine itself; an export in one of them has no bound, but a report.
    """

    name: str
    engine: str
    suffix: str
    dtypes: Mapping[str, Bound]
    quantizations: Collection[str]

    def check(self, source: Source, options: ExportOptions) -> list[str]:
        """Check that the target can hold a model; nothing is written yet, no weight is read.

        Returns:
            Warnings, a sentence each.

        Raises:
            ValueError: if the target cannot hold the model; says what it could take.
            ImportError: if a package is missing that writes the format; names its pip line.
        """

    def longest_text(self, source: Source) -> int | None:
        """Return the tokens of a text that the engine reads as transformers does; None for all."""

    def check_reader(self, source: Source, options: ExportOptions) -> None:
        """Check, without the export, that `read_back` will find a program that reads it.

        Raises:
            NotReadableError: if there is none; names its pip line.
        """

    def write(
        self,
        source: Source,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path,
        options: ExportOptions,
    ) -> Rewritten | None:
        """Write the export, tokenizer included.

        Args:
            source: the saved model, whose weights can be read from its safetensors.
            model: the same in float32 on the CPU; must not be changed.
            tokenizer: of the model.
            out: a path that `exporting.py` renames afterwards: an empty directory, or a file.
            options: what was asked for.

        Returns:
            The model that was written, if weights were rounded by data; None if it is the source.
        """

    def read_back(
        self, source: Source, out: Path, windows: Sequence[Sequence[int]], options: ExportOptions
    ) -> Reading:
        """Let the other program compute the logits of windows of token ids, from the export.

        Raises:
            NotReadableError: if the program is not here; names its pip line.
            RuntimeError: if the program is here and refuses the export; says what it said.
        """


ROUNDS = "gptq"  # the target that rounds weights by data
# Name of a target -> the module and the class.
TARGETS = {
    "gguf": ("prunelight.export.gguf.target", "GgufTarget"),
    "ctranslate2": ("prunelight.export.ctranslate2", "CTranslate2Target"),
    "decilm": ("prunelight.export.decilm.target", "DeciLMTarget"),
    "gptq": ("prunelight.export.gptq", "GPTQTarget"),
}


def find_target(name: str) -> Target:
    """Return a target by its name.

    Raises:
        ValueError: if there is none of this name.
    """
    check_choice("to", name, TARGETS)
    module, kind = TARGETS[name]
    target: Target = getattr(import_module(module), kind)()
    return target
