"""What a reference predicts at a few positions, kept so that later models are compared with it.

A fit has no dense model in memory any more when it measures the pruned one. Its log-probabilities
at a seeded choice of positions take (positions x vocabulary) float32 numbers in one file.
"""

# N windows, T tokens, V vocabulary, M chosen positions

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import first_own_window, group_of, share_windows
from prunelight.calibration.windows import (
    Windows,
    check_readable,
    first_windows,
    micro_batches,
    next_token_labels,
    split_windows,
)
from prunelight.evaluation.quality.batch_logits import batch_logits
from prunelight.evaluation.quality.divergence import (
    FOUND,
    check_same_vocabulary,
    compare_tokens,
    divergence_of,
)
from prunelight.evaluation.quality.results import Divergence
from prunelight.evaluation.quality.token_losses import CHUNK, EVALUATION_TOKENS
from prunelight.losses import IGNORED_LABEL
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.planning.fingerprints import model_fingerprint
from prunelight.runtime.files.atomic_files import atomic_replacement, explaining_write_errors
from prunelight.runtime.finite import check_is_model
from prunelight.runtime.processes import ProcessGroup

NUM_POSITIONS = 256  # 50 MB for a vocabulary of 49,152
NUM_WINDOWS = 8


@dataclass(frozen=True)
class ReferenceLogits:
    """Log-probabilities of a reference at chosen positions of windows.

    Attributes:
        input_ids: (N, T), the windows.
        labels: (N, T), IGNORED_LABEL where no token counts.
        attention_mask: (N, T), 0 on padding.
        rows: (M,), the window of each position.
        columns: (M,), the position in its window; it predicts the label at column + 1.
        log_probabilities: (M, V), float32.
        fingerprint: of the reference.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    rows: Tensor
    columns: Tensor
    log_probabilities: Tensor
    fingerprint: str

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        reference: PreTrainedModel,
        windows: Windows,
        *,
        num_positions: int = NUM_POSITIONS,
        num_windows: int = NUM_WINDOWS,
        seed: int = 0,
    ) -> ReferenceLogits:
        """Keep what a reference predicts.

        Args:
            reference: usually the dense model, in any mode and dtype.
            windows: the first `num_windows` of them are read.
            num_positions: that are kept, as many of each window as of any other.
            num_windows: that are read.
            seed: of the choice of positions.

        Raises:
            ValueError: if a number is below 1, no token counts, or the model cannot read the
                windows.
        """
        for name, value in (("num_positions", num_positions), ("num_windows", num_windows)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_is_model(reference)
        taken = first_windows(windows, num_windows)
        check_readable(reference, taken)
        ids, mask = split_windows(taken)
        labels = next_token_labels(taken)
        rows, columns = _choose(labels, -(-num_positions // len(ids)), seed)
        size = (len(rows), vocabulary_size(reference))
        kept = cls(
            ids.cpu(),
            labels.cpu(),
            (torch.ones_like(ids) if mask is None else mask).cpu(),
            rows,
            columns,
            torch.empty(size),
            model_fingerprint(reference),
        )
        for chosen, logits in kept._logits(reference, kept._windows, "the reference's predictions"):
            kept.log_probabilities[chosen] = logits.float().log_softmax(-1).cpu()
        return kept

    @torch.no_grad()
    def divergence_at(
        self, model: PreTrainedModel, *, group: ProcessGroup | None = None
    ) -> Divergence:
        """Return how far a model is from the reference at the chosen positions.

        Args:
            model: in any mode and dtype.
            group: processes that share the windows, each with the same model; None for this one
                alone.

        Raises:
            ValueError: if the model has another vocabulary or cannot read the windows.
        """
        check_is_model(model)
        check_same_vocabulary(vocabulary_size(model), self.log_probabilities.shape[1])
        check_readable(model, self.input_ids)
        group = group or ProcessGroup()
        enough = len(self.input_ids) >= group.size  # else each process measures all
        windows = share_windows(self._windows, group if enough else ProcessGroup())
        parts: list[tuple[Tensor, Tensor]] = []
        for chosen, logits in self._logits(model, windows, "divergence from the reference"):
            log_p = self.log_probabilities[chosen].to(logits.device)
            target = self._targets[chosen].to(logits.device)
            parts.append((chosen, compare_tokens(logits.float(), log_p, target).cpu().double()))
        gathered = [part for parts in group_of(windows).gather(parts) for part in parts]
        return divergence_of(self._by_window(gathered))

    def save(self, path: str | Path) -> None:
        """Write all of it as a safetensors file, whole or not at all.

        Raises:
            OSError: if the file cannot be written.
        """
        path = Path(path)
        tensors = {name: getattr(self, name).clone() for name in _TENSORS}
        with explaining_write_errors(path), atomic_replacement(path) as temporary:
            save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path) -> ReferenceLogits:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is damaged or was not written by `save`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                fingerprint = file.metadata()["fingerprint"]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no predictions of a reference ({error}); remove it, so that it is "
                "written again"
            ) from error
        return cls(**tensors, fingerprint=fingerprint)

    @property
    def _windows(self) -> Windows:
        windows = {"input_ids": self.input_ids, "labels": self.labels}
        return {**windows, "attention_mask": self.attention_mask}

    @property
    def _targets(self) -> Tensor:
        return self.labels[self.rows, self.columns + 1]

    def _logits(
        self, model: PreTrainedModel, windows: Windows, label: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield indices of chosen positions and a model's logits there, a few at a time."""
        first, size = first_own_window(windows), EVALUATION_TOKENS
        with batch_logits(model, windows, tokens=size, label=label) as compute:
            batches = micro_batches(model, windows, tokens=size, label=label)
            for number, batch in enumerate(batches):
                logits = compute(number, batch)
                inside = (self.rows >= first) & (self.rows < first + len(logits))
                for chosen in inside.nonzero()[:, 0].split(CHUNK):
                    yield chosen, logits[self.rows[chosen] - first, self.columns[chosen]]
                first += len(logits)

    def _by_window(self, parts: list[tuple[Tensor, Tensor]]) -> np.ndarray:
        """Return what was found of positions, (6, m) each, as (N, 6, T - 1), NaN elsewhere."""
        count, length = self.input_ids.shape
        placed = torch.full((count, len(FOUND), length - 1), torch.nan, dtype=torch.float64)
        for chosen, found in parts:
            placed[self.rows[chosen], :, self.columns[chosen]] = found.T
        return placed[self.rows.unique()].numpy()


_TENSORS = ("input_ids", "labels", "attention_mask", "rows", "columns", "log_probabilities")


def _choose(labels: Tensor, num_positions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return window and position of up to `num_positions` tokens that count, of each window.

    Raises:
        ValueError: if no token counts.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = [], []
    for row, counted in enumerate(labels[:, 1:].cpu() != IGNORED_LABEL):
        positions = counted.nonzero()[:, 0]
        order = torch.randperm(len(positions), generator=generator)[:num_positions]
        chosen = positions[order].sort().values
        columns.append(chosen)
        rows.append(torch.full_like(chosen, row))
    if not sum(map(len, rows)):
        raise ValueError("no token of the windows counts; give windows of two tokens or more")
    return torch.cat(rows), torch.cat(columns)
