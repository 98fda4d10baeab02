"""`prunelight export DIR --to gguf | ctranslate2 | decilm | gptq`: another format, proven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from jsonargparse import Namespace

from prunelight.export.exporting import export
from prunelight.export.targets import TARGETS, Rounding
from prunelight.verbs import VerbParser, run_verb

# Options of an export that rounds weights by data -> type and help.
_ROUNDING: dict[str, tuple[type, str]] = {
    "bits": (int, "Bits of a weight, 4 or 8; 4 by default."),
    "group_size": (
        int,
        "Inputs that share a scale; -1 for a scale a row. By default the largest of 128, 64 and 32 "
        "that divides all widths.",
    ),
    "calibration": (str, "Text that the rounding looks at; sample:calibration by default."),
    "num_calibration": (int, "Windows drawn from it; 32 by default."),
    "seq_len": (int, "Tokens of a window; 512 by default."),
    "text": (str, "Text of the perplexities; sample:validation by default."),
    "num_windows": (int, "Windows of it; 32 by default."),
}


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    run_verb(_parser(), arguments, _export)


def _export(given: Namespace) -> None:
    export(
        given.directory,
        given.to,
        dtype=given.dtype,
        quantize=given.quantize,
        out=given.out,
        engine_python=given.engine_python,
        unproven=given.unproven,
        rounding=_rounding(given),
    )


def _rounding(given: Namespace) -> Rounding | None:
    """Return how weights are rounded; None if nothing of it was given."""
    named = {field.name: given[field.name] for field in fields(Rounding)}
    changed = {name: value for name, value in named.items() if value is not None}
    return Rounding(**changed) if changed else None


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="prunelight export",
        description="Write a saved model in the format of another program. The program reads the "
        "result back, and its logits must be those of transformers.",
    )
    add = parser.add_argument
    add("directory", type=str, help="Directory of a saved model.")
    add("--to", type=str, required=True, help=f"Format: {', '.join(TARGETS)}.")
    add(
        "--dtype",
        type=str,
        default="auto",
        help="Type of the weights: f32, f16, bf16 or q8_0, as far as the format has it; auto "
        "keeps that of the model.",
    )
    add(
        "--quantize",
        type=str | None,
        default=None,
        help="Quantization of the engine itself, such as q4_k_m of llama.cpp.",
    )
    add(
        "--out",
        type=str | None,
        default=None,
        help="File or directory to write; by default a name beside DIRECTORY.",
    )
    add(
        "--engine_python",
        type=str | None,
        default=None,
        help="Python of another environment, which has the program that reads the format.",
    )
    add(
        "--unproven",
        type=bool,
        default=False,
        help="Write also where no program is here that reads the format.",
    )
    for name, (kind, told) in _ROUNDING.items():
        add(f"--{name}", type=kind | None, default=None, help=f"{told} (--to gptq)")
    return parser
