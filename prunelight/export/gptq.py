"""Export to GPTQ: the weights of the decoder layers in 4 or 8 bits, in compressed-tensors' form.

transformers and vLLM load the directory. The rounding changes the model, so the record says what
it costs: the divergence from the source, and the perplexity of both on a text. What is read back
must be what was rounded in memory.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from prunelight.data.corpora import is_corpus
from prunelight.data.corpus_reading import characters_of
from prunelight.data.sources import read_documents
from prunelight.data.token_windows import calibration_windows
from prunelight.evaluation.quality.text_quality import text_quality
from prunelight.evaluation.quality.text_windows import TextWindows, text_windows
from prunelight.export.decilm.reading import find_vllm, read_with_vllm
from prunelight.export.proving import source_logits
from prunelight.export.targets import (
    TORCH_DTYPES,
    Bound,
    ExportOptions,
    Reading,
    Rewritten,
    Rounding,
    Source,
)
from prunelight.models import saving
from prunelight.models.families.own_classes.registration import PREFIX
from prunelight.models.loading import quiet_transformers
from prunelight.models.packed.grids import check_package, quiet_package
from prunelight.models.saving import save
from prunelight.models.sizes import longest_sequence
from prunelight.pruning.rounding.gptq import GPTQ
from prunelight.pruning.rounding.quantize import check_quantizable, quantize_gptq
from prunelight.runtime.files import atomic_files

ENGINE = "vLLM"
# From what was rounded in memory. transformers computes the same, vLLM in another order.
DTYPES = {
    "f32": Bound("mean_kl", 1e-4),
    "f16": Bound("mean_kl", 2e-3),
    "bf16": Bound("mean_kl", 1e-2),
}


class GPTQTarget:
    """A directory of packed weights."""

    name = "gptq"
    engine = ENGINE
    suffix = ""
    dtypes = DTYPES
    quantizations = ()

    def check(self, source: Source, options: ExportOptions) -> list[str]:
        """Check that the model can be quantized; see `Target.check`."""
        check_package("an export to GPTQ")
        config = source.config
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{source.directory} is quantized already; export the model in full precision"
            )
        settings, given = _settings(options), options.rounding
        assert given is not None
        self._texts = _documents(given)
        with torch.device("meta"), quiet_transformers():
            check_quantizable(AutoModelForCausalLM.from_config(config), settings)
        if config.model_type.startswith(PREFIX):
            return [
                f"{config.model_type} is a class of prunelight's own: transformers loads the "
                "export where prunelight is imported, and vLLM does not load it"
            ]
        return []

    def longest_text(self, source: Source) -> int | None:
        """No limit; see `Target.longest_text`."""
        return None

    def check_reader(self, source: Source, options: ExportOptions) -> None:
        """Check that vLLM is there, where it is asked for; see `Target.check_reader`."""
        if options.engine_python is not None:
            find_vllm(options)

    def write(
        self,
        source: Source,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path,
        options: ExportOptions,
    ) -> Rewritten:
        """Quantize a copy of the model, and save it; see `Target.write`."""
        given, dtype = options.rounding, getattr(torch, TORCH_DTYPES[options.dtype])
        assert given is not None
        limit = longest_sequence(model) or given.seq_len
        seq_len = min(given.seq_len, limit)
        windows = calibration_windows(tokenizer, self._texts, given.num_calibration, seq_len)
        text = _held_out(tokenizer, given.text, seq_len, given.num_windows)
        rounded = copy.deepcopy(model)
        done = quantize_gptq(rounded, windows, _settings(options), dtype=dtype)
        rounded = rounded.to(dtype)
        with _without_lines():  # of a directory that is renamed
            save(rounded, tokenizer, out)
        before, after = text_quality(model, text), text_quality(rounded, text)
        facts: dict[str, Any] = {
            "bits": done.bits,
            "group_size": done.group_size,
            "share_of_parameters": done.share,
            "zeros_kept": done.zeros,
            "calibration": f"{len(windows)} windows of {seq_len} tokens of {given.calibration}",
            "text": text.text,
            "protocol": text.protocol,
            "perplexity": {"source": vars(before.perplexity), "gptq": vars(after.perplexity)},
            "notes": done.notes,
        }
        line = (
            f"perplexity on {text.text}, {len(text.ids)} windows of {seq_len} tokens: "
            f"{before.perplexity.value:.2f} before, {after.perplexity.value:.2f} in {done.bits} "
            f"bits; {done.zeros:,} weights that were zero are zero"
        )
        return Rewritten(rounded, facts, line)

    def read_back(
        self, source: Source, out: Path, windows: Sequence[Sequence[int]], options: ExportOptions
    ) -> Reading:
        """Compute the logits of windows with transformers, or vLLM; see `Target.read_back`."""
        if options.engine_python is not None:
            dtype = "float16" if options.dtype == "f16" else "bfloat16"
            size = source.config.vocab_size
            return read_with_vllm(find_vllm(options), out, windows, size, dtype=dtype)
        with quiet_transformers(), quiet_package(AutoConfig.from_pretrained(out)):
            model = AutoModelForCausalLM.from_pretrained(out)
            logits = source_logits(model, windows)
        return Reading("transformers", transformers.__version__, logits)


@contextmanager
def _without_lines() -> Iterator[None]:
    """Silence what is logged of saved files inside."""
    loggers = [logging.getLogger(module.__name__) for module in (saving, atomic_files)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _settings(options: ExportOptions) -> GPTQ:
    given = options.rounding
    assert given is not None
    return GPTQ(given.bits, given.group_size)


def _documents(given: Rounding) -> list[str]:
    """Return the documents of the calibration text.

    Raises:
        ValueError: if it holds instructions.
    """
    enough = characters_of(given.num_calibration * given.seq_len)
    rows = read_documents(given.calibration, split="train", enough=enough)
    if any("text" not in row for row in rows):
        raise ValueError(
            f"calibration={given.calibration!r} must hold text; it has rows without a field text, "
            f"such as {sorted(rows[0])}"
        )
    return [str(row["text"]) for row in rows]


def _held_out(
    tokenizer: PreTrainedTokenizerBase, source: str, seq_len: int, num_windows: int
) -> TextWindows:
    split = "test" if is_corpus(source) else "train"
    return text_windows(tokenizer, source, seq_len, max_windows=num_windows, split=split)
