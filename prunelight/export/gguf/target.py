"""Export to GGUF: what llama.cpp can hold, the file, and what llama.cpp computes from it."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.export.gguf.families import (
    FAMILIES,
    ROPE_TYPES,
    YARN_DEFAULTS,
    GgufFamily,
    model_keys,
    rope_parameters,
)
from prunelight.export.gguf.own_layers import (
    DECI,
    DECI_FAMILIES,
    deci_keys,
    is_uneven,
    with_zero_neurons,
)
from prunelight.export.gguf.reading import (
    PIP_LINE,
    find_llama_cpp,
    read_with_llama_cpp,
    read_with_transformers,
    run_llama_cpp,
    transformers_reads,
)
from prunelight.export.gguf.tensors import gguf_tensors, weights_on_disk
from prunelight.export.gguf.tokenizers import tokenizer_facts, tokenizer_keys
from prunelight.export.gguf.writing import write_gguf
from prunelight.export.targets import Bound, ExportOptions, NotReadableError, Reading, Source
from prunelight.export.widths import block_warnings, parallel_warnings
from prunelight.models.engines import READINGS, ByPlace, OtherWindows, has_windows
from prunelight.models.families.config_fields import head_dim
from prunelight.models.families.own_classes.dropped_sublayers import gap_layers
from prunelight.models.families.own_classes.layer_widths import BIASED
from prunelight.models.families.own_classes.registration import PREFIX, family_of
from prunelight.models.families.own_classes.sliced import PREFIX as SLICED_PREFIX
from prunelight.models.loading import load_tokenizer

ENGINE = "llama.cpp"
_COMMAND = (
    "llama.cpp's own converter may take it: python convert_hf_to_gguf.py {directory} --outfile "
    "MODEL.gguf --outtype f16, in a clone of llama.cpp"
)
# llama.cpp's own quantizations that most people use; its quantizer falls back where a row does not
# divide by 256.
QUANTIZATIONS = ("q2_k", "q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "iq4_xs")


# llama.cpp takes GELU from a table in float16, hence 0.03 in float32 too.
DTYPES = {
    "f32": Bound("largest_difference", 0.03),
    "f16": Bound("mean_kl", 0.002),
    "bf16": Bound("mean_kl", 0.01),
    "q8_0": Bound("mean_kl", 0.05),
}


class GgufTarget:
    """GGUF, which llama.cpp and what is built on it read."""

    name = "gguf"
    engine = ENGINE
    suffix = ".gguf"
    dtypes = DTYPES
    quantizations = QUANTIZATIONS

    def check(self, source: Source, options: ExportOptions) -> list[str]:
        """Check that llama.cpp can hold the model; see `Target.check`."""
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(
                "an export to GGUF needs the package gguf; install it with: "
                "pip install 'prunelight[gguf]'"
            )
        family = check_family(source)
        warnings = check_readings(source)
        check_fields(source, family)
        tokenizer_facts(load_tokenizer(str(source.directory)))
        if options.quantize is not None:
            _check_quantizer(options)
        config = source.config
        widths = [*block_warnings(config, options.quantize), *parallel_warnings(config)]
        return [*warnings, *widths]

    def longest_text(self, source: Source) -> int | None:
        """Return the window, where llama.cpp ignores it; see `Target.longest_text`."""
        return ignored_window(source.config)

    def check_reader(self, source: Source, options: ExportOptions) -> None:
        """Check that llama.cpp or transformers reads the export; see `Target.check_reader`."""
        if find_llama_cpp(options) is None and not transformers_reads(source.config):
            raise NotReadableError(
                "no program is here that reads the export back, to prove it: " + PIP_LINE
            )

    def write(
        self,
        source: Source,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path,
        options: ExportOptions,
    ) -> None:
        """Write the GGUF; see `Target.write`."""
        if options.quantize is None:
            _write(source, model, tokenizer, out, options.dtype)
            return
        llama_cpp = _check_quantizer(options)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            whole = Path(folder) / "whole.gguf"
            _write(source, model, tokenizer, whole, options.dtype)
            job = {"file": str(whole), "output": str(out), "kind": options.quantize}
            run_llama_cpp(llama_cpp, "quantize", job, folder)

    def read_back(
        self, source: Source, out: Path, windows: Sequence[Sequence[int]], options: ExportOptions
    ) -> Reading:
        """Read the GGUF; see `Target.read_back`. Its tokenizer is compared too."""
        llama_cpp = find_llama_cpp(options)
        if llama_cpp is None:
            return read_with_transformers(out, windows)
        tokenizer = load_tokenizer(str(source.directory))
        texts = sample_texts()
        size = source.config.vocab_size
        reading, ids = read_with_llama_cpp(llama_cpp, out, windows, texts, size)
        for text, read in zip(texts, ids, strict=True):
            check_same_tokens(text, tokenizer(text)["input_ids"], read)
        return reading


def check_family(source: Source) -> GgufFamily:
    """Return how llama.cpp keeps the family of a model.

    Raises:
        ValueError: if the family, or the class of our own, cannot be written.
    """
    kind = source.config.model_type
    if kind.startswith(SLICED_PREFIX):
        raise ValueError(
            f"llama.cpp cannot hold a model sliced layer by layer ({kind}); slice it with one "
            "rotation (SliceGPT(rotation='shared')), which leaves a stock model"
        )
    family = family_of(kind)
    if kind.startswith(PREFIX) and family not in DECI_FAMILIES:
        raise ValueError(
            f"llama.cpp holds layers that differ ({kind}) only for {', '.join(DECI_FAMILIES)}, in "
            "its architecture deci; remove whole layers, or narrow all layers alike"
        )
    if gaps := gap_layers(source.config):
        raise ValueError(
            f"llama.cpp has no matrix behind a layer, as behind {gaps} here; heal by 'linear', "
            "which leaves a stock model"
        )
    if biased := getattr(source.config, BIASED, None):
        raise ValueError(
            f"a GGUF with biases of {', '.join(biased)} is not written here: its logits were not "
            "compared with those of llama.cpp; prune with correction=True instead of 'bias'"
        )
    if family not in FAMILIES:
        raise ValueError(
            f"a GGUF of {kind} is not written here: its logits were not compared with those of "
            f"llama.cpp; written are {', '.join(FAMILIES)}. "
            + _COMMAND.format(directory=source.directory)
        )
    return DECI if is_uneven(source.config) else FAMILIES[family]


def check_readings(source: Source) -> list[str]:
    """Return warnings about how llama.cpp reads the family.

    Raises:
        ValueError: if it reads the model otherwise than transformers, and no key cures that.
    """
    config: Any = source.config
    warnings = []
    for reading in READINGS[ENGINE].get(family_of(config.model_type), ()):
        if isinstance(reading, ByPlace) and reading.key is not None:
            continue  # the file lists the kinds of the layers
        if not isinstance(reading, OtherWindows) and (fault := reading.fault(config)):
            raise ValueError(f"llama.cpp {fault}")
    if window := ignored_window(config):
        warnings.append(
            f"llama.cpp ignores the windows of this family; the export's context ends at {window} "
            "tokens, within which nothing differs"
        )
    return warnings


def ignored_window(config: Any) -> int | None:
    """Return the window of a model whose windows llama.cpp ignores; None for none."""
    readings = READINGS[ENGINE].get(family_of(config.model_type), ())
    ignores = any(isinstance(reading, OtherWindows) for reading in readings)
    return int(config.sliding_window) if ignores and has_windows(config) else None


def check_fields(source: Source, family: GgufFamily) -> None:
    """Check that the architecture of llama.cpp computes what the config says.

    Raises:
        ValueError: if it does not; names the field, and what it could be.
    """
    config: Any = source.config
    remedy = _COMMAND.format(directory=source.directory)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    activation = activation or getattr(config, "activation_function", None)
    if activation not in family.activations:
        known = " or ".join(family.activations)
        raise ValueError(f"llama.cpp computes {known} in this family, not {activation!r}; {remedy}")
    for field, values in (family.needs or {}).items():
        if getattr(config, field, values[0]) not in values:
            raise ValueError(
                f"llama.cpp takes {field}={values[0]!r} in this family, and the model has "
                f"{getattr(config, field)!r}; {remedy}"
            )
    if family.head == "tied" and not config.tie_word_embeddings:
        raise ValueError(
            "llama.cpp takes the embedding for the head in this family, and the model has a head "
            f"of its own (tie_word_embeddings=False); {remedy}"
        )
    heads = config.num_attention_heads
    if not family.free_heads and head_dim(config) * heads != config.hidden_size:
        raise ValueError(
            f"llama.cpp takes hidden_size / num_attention_heads = {config.hidden_size} / {heads} "
            f"for the width of a head in this family, and it is {head_dim(config)}; prune neurons "
            "or layers, not heads, for llama.cpp"
        )
    check_rope(source)


def check_rope(source: Source) -> None:
    """Check that llama.cpp rotates queries and keys as the config says.

    Raises:
        ValueError: if it does not; names the parameter, and what it could be.
    """
    rope = rope_parameters(source.config)
    remedy = _COMMAND.format(directory=source.directory)
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"positions rotated with rope_type={kind!r} are not written here, only "
            f"{', '.join(ROPE_TYPES)}; {remedy}"
        )
    fixed = YARN_DEFAULTS if kind == "yarn" else {}
    for name, default in fixed.items():
        if (value := rope.get(name)) not in (None, default):
            raise ValueError(
                f"llama.cpp takes {name}={default} for rope_type='yarn', and the model has "
                f"{value}; use another engine"
            )


def sample_texts() -> list[str]:
    """Return texts that both tokenizers must split alike: prose, numbers, code and odd spaces."""
    prose = files("prunelight.data").joinpath("sample", "validation.txt").read_text("utf-8")
    odd = "It's 3.14, 12345 or 2026?  Don't\tpanic!\n\n  for i in range(10):\n    x += 1  # ü 日本"
    return [prose[:2000].strip(), odd]


def check_same_tokens(text: str, expected: Sequence[int], read: Sequence[int]) -> None:
    """Check that llama.cpp makes the same tokens of a text.

    Raises:
        RuntimeError: if it does not; names the first difference.
    """
    if [*expected] == [*read]:
        return
    pairs = zip(expected, read, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(read)))
    raise RuntimeError(
        f"the export was not kept: llama.cpp makes other tokens of a text, from token {place} on: "
        f"{[*read][place : place + 5]} where the tokenizer makes {[*expected][place : place + 5]} "
        f"({text[:30]!r}...); please report the tokenizer"
    )


def file_name(source: Source, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name that the file gives the model.

    llama.cpp lets tokens take the spaces after them where the name has "phi-3" in it, and fails
    there without Phi-3's tokens. So a model has that in its name if it has these tokens.
    """
    name = re.sub("phi-?3", "phi", source.directory.resolve().name, flags=re.IGNORECASE)
    has_tokens = {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= {*tokenizer.get_vocab()}
    return f"{name} (phi-3)" if source.config.model_type == "phi3" and has_tokens else name


def _check_quantizer(options: ExportOptions) -> Any:
    """Return the Python with llama.cpp's quantizer.

    Raises:
        ImportError: if there is none.
    """
    llama_cpp = find_llama_cpp(options)
    if llama_cpp is None or llama_cpp.package != "llama_cpp":
        raise ImportError(
            f"quantize={options.quantize!r} needs llama.cpp's quantizer; install it with: pip "
            "install llama-cpp-python (it builds llama.cpp), here or in the environment that "
            "--engine_python names"
        )
    return llama_cpp


def _write(
    source: Source,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    dtype: str,
) -> None:
    family, config = check_family(source), model.config
    weights = weights_on_disk(model)
    keys = {"name": file_name(source, tokenizer), **model_keys(config, family)}
    if window := ignored_window(source.config):
        keys["context_length"] = min(window, keys["context_length"])
    if is_uneven(config):
        keys |= deci_keys(config)
        weights = with_zero_neurons(config, weights)
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    keys |= tokenizer_keys(tokenizer, vocabulary)
    write_gguf(out, family.architecture, keys, gguf_tensors(config, weights, family), dtype)
