"""The windows that a run takes from its data module.

A TextDataModule gives windows by `calibration_windows()` and `validation_windows()`. Any other data
module has dataloaders. The first training batches then become the calibration windows, and the
validation batches become the held-out windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunelight.calibration.windows import Windows
from prunelight.losses import IGNORED_LABEL

NUM_CALIBRATION = 128  # windows that SparseGPT, Wanda and DLP use

# Values that pad a row to the length of the longest row.
_FILL = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED_LABEL}


def check_data(data: Any) -> None:
    """Check that a data module can give calibration windows and held-out windows.

    Raises:
        ValueError: if the data module has neither the method nor the dataloader for one of them.
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
    """Return the windows on which pruning decides.

    Args:
        data: a data module with `calibration_windows()`, or with `train_dataloader()`. From the
            dataloader the first `data.num_calibration` rows are taken, 128 without this attribute.

    Raises:
        ValueError: if a batch has no token ids.
    """
    if hasattr(data, "calibration_windows"):
        windows: Windows = data.calibration_windows()
        return windows
    num_rows = getattr(data, "num_calibration", NUM_CALIBRATION)
    windows = _windows_of(data.train_dataloader(), "train_dataloader", num_rows)
    if isinstance(windows, dict):  # scores count all tokens, with a label or without
        del windows["labels"]
    return windows


def validation_windows_of(data: Any) -> Windows:
    """Return the held-out windows, on which dense, pruned and recovered model are compared.

    Args:
        data: a data module with `validation_windows()`, or with `val_dataloader()`, whose rows are
            all taken.

    Raises:
        ValueError: if a batch has no token ids.
    """
    if hasattr(data, "validation_windows"):
        windows: Windows = data.validation_windows()
        return windows
    return _windows_of(data.val_dataloader(), "val_dataloader", None)


def _windows_of(loader: Iterable[Any], name: str, num_rows: int | None) -> Windows:
    """Return the first rows of a dataloader, or all, as windows padded on the right."""
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
        if num_rows is not None and len(rows["input_ids"]) >= num_rows:
            break
    if not rows["input_ids"]:
        raise ValueError(f"{name}() gives no batch; pruning needs at least one window")
    width = max(len(row) for row in rows["input_ids"][:num_rows])
    windows = {
        key: torch.stack(
            [pad(row, (0, width - len(row)), value=fill) for row in rows[key][:num_rows]]
        )
        for key, fill in _FILL.items()
    }
    unpadded = bool(windows["attention_mask"].all())
    only_ids = unpadded and torch.equal(windows["labels"], windows["input_ids"])
    return windows["input_ids"] if only_ids else windows
