"""How far each later stage of a run is from its dense model, which is in memory no more.

The dense model's log-probabilities at a few positions of the held-out windows, and of one long
bundled text up to the context that the model reads, are kept in files of the run. The long text
shows what short windows hide: a model that reads no further than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.windows import Windows
from prunelight.data.sources import read_documents
from prunelight.evaluation.probes.rows import first_tokens
from prunelight.evaluation.quality.reference_logits import (
    NUM_POSITIONS,
    NUM_WINDOWS,
    ReferenceLogits,
)
from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.report.record import Stage
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.sizes import longest_sequence
from prunelight.planning.fingerprints import fingerprint_of
from prunelight.runtime.processes import ProcessGroup

HELD_OUT, LONG_TEXT = "held_out.safetensors", "long_text.safetensors"
LONG_TOKENS = 2048
LONG_POSITIONS = 128
_MOST_LOGITS = 2**28  # of the long text: 1 GiB in float32
_CHARACTERS = 40_000  # that are read of the bundled text


class DenseDivergence:
    """Compares each stage with the dense one, at positions that are kept in files; on rank 0.

    Args:
        directory: returns where the files lie, which a later start of the run finds again.
        windows: returns the held-out windows.

    Attributes:
        examines: the name of the answer in a stage.
    """

    examines = "divergence"

    def __init__(self, directory: Callable[[], Path], windows: Callable[[], Windows]) -> None:
        self.directory, self.windows = directory, windows

    def check_examination(self, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Check nothing: there are no settings."""

    def describe_examination(self) -> Json:
        """Return at how many positions stages are compared, and what the files hold.

        Where they are gone, damaged, or of another model or text, the dense model is asked again.
        """
        kept = _identity(self.directory() / HELD_OUT)
        return {"positions": NUM_POSITIONS, "windows": NUM_WINDOWS, "dense_model": kept}

    def examine(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        earlier: Sequence[Stage],
        group: ProcessGroup,
    ) -> Json:
        """Keep what the dense model predicts, or return how far a later model is from it.

        Returns:
            Fields of `Divergence`, on the held-out windows, and "long_text": tokens of it, and the
            mean KL by position. For the dense model itself what was kept; {"note": why not} where
            nothing can be compared.
        """
        examine = self._compare if earlier else self._keep
        answer: Json = group.run_on_rank_zero(partial(examine, model, tokenizer))
        return answer

    def _keep(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Json:
        self.directory().mkdir(parents=True, exist_ok=True)
        kept = ReferenceLogits.of(model, self.windows())
        kept.save(self.directory() / HELD_OUT)
        told: Json = {"positions": len(kept.rows), "bytes": _bytes(kept)}
        long = _long_text(model, tokenizer)
        if long is None:
            (self.directory() / LONG_TEXT).unlink(missing_ok=True)
            return told
        predictions = ReferenceLogits.of(
            model, long, num_windows=1, num_positions=min(LONG_POSITIONS, long.shape[1] - 1)
        )
        predictions.save(self.directory() / LONG_TEXT)
        told["bytes"] += _bytes(predictions)
        return told | {"long_text_tokens": long.shape[1]}

    def _compare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Json:
        file, long_file = self.directory() / HELD_OUT, self.directory() / LONG_TEXT
        if _identity(file) is None:
            return {"note": f"{file.name} of the dense model is gone or damaged"}
        kept = ReferenceLogits.load(file)
        if kept.log_probabilities.shape[1] != vocabulary_size(model):
            return {"note": "the dense model has another vocabulary"}
        told: Json = asdict(kept.divergence_at(model))
        if _identity(long_file) is not None:
            long = ReferenceLogits.load(long_file)
            found = long.divergence_at(model)
            by_position = [list(pair) for pair in found.kl_by_position]
            told["long_text"] = {"tokens": long.input_ids.shape[1], "kl_by_position": by_position}
        return told


def _identity(file: Path) -> str | None:
    """Return a fingerprint of model and text of kept predictions; None without a whole file."""
    try:
        with safe_open(file, framework="pt") as kept:
            return fingerprint_of(kept.metadata(), kept.get_tensor("input_ids").tolist())
    except (OSError, SafetensorError):
        return None


def _long_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """Return the beginning of a bundled text, (1, T); None where the model does not read it."""
    size = vocabulary_size(model)
    limit = min(longest_sequence(model) or LONG_TOKENS, LONG_TOKENS, _MOST_LOGITS // size)
    (document,) = read_documents("sample:validation")
    text = document["text"][:_CHARACTERS]
    ids = [*first_tokens(tokenizer), *tokenizer.encode(text, add_special_tokens=False)][:limit]
    return torch.tensor([ids]) if len(ids) > 1 and max(ids) < size else None


def _bytes(kept: ReferenceLogits) -> int:
    return kept.log_probabilities.numel() * kept.log_probabilities.element_size()
