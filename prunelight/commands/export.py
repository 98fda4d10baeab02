"""`prunelight export DIR --to gguf | ctranslate2 | decilm`: another program's format, proven."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from prunelight.commands.running import VerbParser, run_verb
from prunelight.export.exporting import export
from prunelight.export.targets import TARGETS


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
    )


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
    return parser
