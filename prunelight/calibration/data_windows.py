"""The windows that a run takes from its data: from methods made for it, or from the dataloaders.

A TextDataModule has `calibration_windows()` and `validation_windows()`. Any other data module has
dataloaders: the first training batches then give the calibration windows, and the validation
batches those held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunelight.calibration.windows import Windows
from prunelight.losses import IGNORED_LABEL

NUM_CALIBRATION = 128  # windows, of SparseGPT, Wanda and DLP
# What fills a row that is shorter than the longest of all batches.
_FILL = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED_LABEL}


def check_data(data: Any) -> None:
    """Check that data can give calibration and held-out windows.

    Raises:
        ValueError: if it has neither the methods nor the dataloaders; names what is missing.
    """
    for method, loader in (
        ("calibration_windows", "train_dataloader"),
        ("validation_windows", "val_dataloader"),
    ):
        if not (hasattr(data, method) or hasattr(data, loader)):
            raise ValueError(
                f"pruning needs data: give the Trainer a TextDataModule, or a LightningDataModule "
                f"with {loader}() or a method {method}()"
            )


def calibration_windows_of(data: Any) -> Windows:
    """Return the windows that pruning looks at.

    Args:
        data: with `calibration_windows()`, or with `train_dataloader()`, of which the first
            `num_calibration` rows are taken (an attribute of the data; 128 without it).

    Raises:
        ValueError: if a batch has no token ids.
    """
    if hasattr(data, "calibration_windows"):
        windows: Windows = data.calibration_windows()
        return windows
    most = getattr(data, "num_calibration", NUM_CALIBRATION)
    windows = _windows_of(data.train_dataloader(), "train_dataloader", most)
    if isinstance(windows, dict):  # which tokens the loss counts is nothing to the scores
        del windows["labels"]
    return windows


def validation_windows_of(data: Any) -> Windows:
    """Return the held-out windows, on which dense, pruned and recovered model are compared.

    Args:
        data: with `validation_windows()`, or with `val_dataloader()`, of which all rows are taken.

    Raises:
        ValueError: if a batch has no token ids.
    """
    if hasattr(data, "validation_windows"):
        windows: Windows = data.validation_windows()
        return windows
    return _windows_of(data.val_dataloader(), "val_dataloader", None)


def _windows_of(loader: Iterable[Any], name: str, most: int | None) -> Windows:
    """Return the first rows of a dataloader as windows, padded on the right to one length."""
    rows: dict[str, list[Tensor]] = {key: [] for key in _FILL}
    for batch in loader:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"{name}() gives batches of {keys}; pruning needs mappings with input_ids (B, T), "
                "as transformers' collators give"
            )
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        labels = batch.get("labels", ids.masked_fill(mask == 0, IGNORED_LABEL))
        for key, values in (("input_ids", ids), ("attention_mask", mask), ("labels", labels)):
            rows[key].extend(values)
        if most is not None and len(rows["input_ids"]) >= most:
            break
    if not rows["input_ids"]:
        raise ValueError(f"{name}() gives no batch; pruning needs at least one window")
    width = max(len(row) for row in rows["input_ids"][:most])
    windows = {
        key: torch.stack([pad(row, (0, width - len(row)), value=fill) for row in rows[key][:most]])
        for key, fill in _FILL.items()
    }
    whole = bool(windows["attention_mask"].all())
    plain = whole and torch.equal(windows["labels"], windows["input_ids"])
    return windows["input_ids"] if plain else windows
