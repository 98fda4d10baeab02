"""The windows that a run takes from its data module.

A TextDataModule gives windows by `calibration_windows()` and `validation_windows()`. Any other data
module has dataloaders. The first training batches then become the calibration windows, and the
validation batches become the held-out windows. They are read under a fixed seed: a shuffled
dataloader gives the same windows at every start and on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.losses import IGNORED_LABEL
from prunelight.models.families.config_fields import vocabulary_size

NUM_CALIBRATION = 128  # windows that SparseGPT, Wanda and DLP use

# Values that pad a row to the length of the longest row.
_FILL = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED_LABEL}


def check_data(gives: Callable[[str], bool]) -> None:
    """Check that the data of a run can give calibration windows and held-out windows.

    Args:
        gives: tells whether the data has a method of a name.

    Raises:
        ValueError: if the data has neither the method nor the dataloader for one of them.
    """
    for method, loader in (
        ("calibration_windows", "train_dataloader"),
        ("validation_windows", "val_dataloader"),
    ):
        if not (gives(method) or gives(loader)):
            raise ValueError(
                f"pruning needs data: give the Trainer a TextDataModule, a LightningDataModule "
                f"with {loader}() or a method {method}(), or training and validation dataloaders"
            )


def are_self_written(data: Any) -> bool:
    """Return whether a data module lets the dense model write its calibration windows."""
    return bool(getattr(data, "self_written", False))


def stand_in_windows(model: PreTrainedModel, count: int, seq_len: int) -> Tensor:
    """Return token ids (count, seq_len) in the shape of windows that the model is to write."""
    ids = torch.arange(count * seq_len) % vocabulary_size(model)
    return ids.view(count, seq_len)


def calibration_windows_of(data: Any, model: PreTrainedModel | None = None) -> Windows:
    """Return the windows on which pruning decides.

    Args:
        data: a data module with `calibration_windows()`, or with `train_dataloader()`. From the
            dataloader the first `data.num_calibration` rows are taken, 128 without this attribute.
        model: the dense model, for data that lets it write them.

    Raises:
        ValueError: if there is no batch, or one without token ids.
    """
    if are_self_written(data):
        return checked_windows(data.calibration_windows(model), "calibration_windows")
    if hasattr(data, "calibration_windows"):
        return checked_windows(data.calibration_windows(), "calibration_windows")
    num_rows = getattr(data, "num_calibration", NUM_CALIBRATION)
    if type(num_rows) is not int or num_rows < 1:
        raise ValueError(
            f"num_calibration={num_rows!r} of {type(data).__name__} must be a whole number of at "
            "least 1: the rows that are taken of its train_dataloader()"
        )
    with _fixed_seed():
        batches = _batches_of(_loaders_of(data, "train_dataloader"))
        windows = _windows_of(batches, "train_dataloader", num_rows)
    if isinstance(windows, dict):  # scores count all tokens, with a label or without
        del windows["labels"]
    return windows


def validation_windows_of(data: Any, limit: int | float = 1.0) -> Windows:
    """Return the held-out windows, on which dense, pruned and recovered model are compared.

    Args:
        data: a data module with `validation_windows()`, or with `val_dataloader()`. Of several
            dataloaders the first one counts.
        limit: batches that are taken of each dataloader, or the share of them, as in
            `Trainer(limit_val_batches=)`.

    Raises:
        ValueError: if there is no batch, or one without token ids.
    """
    if hasattr(data, "validation_windows"):
        return checked_windows(data.validation_windows(), "validation_windows")
    with _fixed_seed():
        loaders = named_loaders(_loaders_of(data, "val_dataloader"))
        first = next(iter(loaders.values()), None)
        return _windows_of(_batches_of(first, limit), "val_dataloader", None)


def further_windows_of(data: Any, limit: int | float = 1.0) -> dict[str, Windows]:
    """Return the windows of each held-out text behind the first, by its name.

    Args:
        data: a data module with `further_validation_windows()`, or whose `val_dataloader()` gives
            a list or a mapping of dataloaders.
        limit: as in `validation_windows_of`.

    Raises:
        ValueError: if one gives no batch, or one without token ids.
    """
    if hasattr(data, "validation_windows"):
        if not hasattr(data, "further_validation_windows"):
            return {}
        return {
            name: checked_windows(windows, f"further_validation_windows of {name!r}")
            for name, windows in data.further_validation_windows().items()
        }
    with _fixed_seed():
        loaders = named_loaders(_loaders_of(data, "val_dataloader"))
        return {
            name: _windows_of(_batches_of(loader, limit), f"val_dataloader of {name!r}", None)
            for name, loader in [*loaders.items()][1:]
        }


def further_names_of(data: Any) -> tuple[str, ...]:
    """Return the names of the held-out texts behind the first; reads no text of a TextDataModule.

    A list of dataloaders has the names "1", "2", ... behind the first.
    """
    if hasattr(data, "validation_windows"):
        return tuple(getattr(data, "validation_names", ()))[1:]
    return tuple(named_loaders(_loaders_of(data, "val_dataloader")))[1:]


def named_loaders(loaders: Any) -> dict[str, Any]:
    """Return what a dataloader hook returned by name: keys of a mapping, or places in a list."""
    if loaders is None:
        return {}
    if isinstance(loaders, Mapping):
        return {str(name): loader for name, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)) and all(isinstance(x, DataLoader) for x in loaders):
        return {str(place): loader for place, loader in enumerate(loaders)}
    return {"0": loaders}


def has_validation_batches(data: Any, limit: int | float) -> bool:
    """Return whether `val_dataloader()` of a data module gives a batch within the limit."""
    with _fixed_seed():
        return next(_batches_of(_loaders_of(data, "val_dataloader"), limit), None) is not None


def _batches_of(loaders: Any, limit: int | float = 1.0) -> Iterator[Any]:
    """Yield the batches of what a dataloader hook returned: a dataloader, several, or None.

    Args:
        loaders: an iterable of batches, or a list or mapping of dataloaders.
        limit: batches that are taken of each, or the share of them; 1.0 takes all.
    """
    if loaders is None:
        return
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    are_several = isinstance(loaders, (list, tuple)) and all(
        isinstance(loader, DataLoader) for loader in loaders
    )
    for loader in loaders if are_several else [loaders]:
        if isinstance(limit, int):
            yield from islice(loader, limit)
        else:
            yield from loader if limit == 1 else islice(loader, int(limit * len(loader)))


@contextmanager
def _fixed_seed() -> Iterator[None]:
    """Let the CPU's random numbers begin anew, and go on afterwards where they were."""
    with torch.random.fork_rng(devices=()):  # and those of other devices stay as they are
        torch.default_generator.manual_seed(0)
        yield


def check_training_batch(data: Any) -> None:
    """Check the first training batch of a data module that is no TextDataModule.

    Raises:
        ValueError: if there is none, or it lacks something that a RecoveryModule trains on.
    """
    with _fixed_seed():
        batch = next(_batches_of(_loaders_of(data, "train_dataloader")), None)
    if batch is None:
        raise ValueError("train_dataloader() gives no batch; at least one is needed")
    check_batch(batch)


def check_batch(batch: Any, number: int = 0) -> None:
    """Check that a RecoveryModule can train on a batch.

    Raises:
        ValueError: if it is no mapping of input_ids and labels, LongTensors (B, T).
    """
    if _fields_of(batch, number, "train_dataloader")[2] is None:
        raise ValueError(
            f"train_dataloader() gives batches of {sorted(batch)}, without the labels that are "
            "learned; add labels (B, T): the input_ids, with -100 where a token does not count"
        )


def _fields_of(batch: Any, number: int, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return input_ids, attention_mask and labels of a batch, each (B, T)."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"{name}() gives batches of {keys}; prunelight reads mappings with input_ids "
            "(B, T), as transformers' collators give"
        )
    place = f"batch {number} of {name}()"
    ids = _token_tensor(batch["input_ids"], "input_ids", place)
    mask, labels = (
        None if batch.get(key) is None else _token_tensor(batch[key], key, place, ids.shape)
        for key in ("attention_mask", "labels")
    )
    return ids, mask, labels


def _loaders_of(data: Any, name: str) -> Any:
    """Return what a dataloader hook gives, to be read more than once.

    Raises:
        ValueError: if it is an iterator that is used up by reading it.
    """
    hook = getattr(data, name)
    loaders = hook()
    if isinstance(loaders, Iterator) and hook() is loaders:
        raise ValueError(
            f"{name} is a {type(loaders).__name__}, which can be read only once, and pruning reads "
            "batches before the training does; give a DataLoader, or a method that makes a new one"
        )
    return loaders


def checked_windows(windows: Any, name: str) -> Windows:
    """Return the windows that a method of a data module gave.

    Raises:
        ValueError: if they are neither token ids (N, T) nor a mapping that holds them.
    """
    if isinstance(windows, Tensor):
        return _token_tensor(_as_long(windows), "the tensor", f"{name}()")
    if not isinstance(windows, Mapping) or "input_ids" not in windows:
        raise ValueError(
            f"{name}() gives {type(windows).__name__}; it must give token ids, a LongTensor (N, T),"
            " or a mapping with input_ids and attention_mask, as TextDataModule does"
        )
    ids = _token_tensor(_as_long(windows["input_ids"]), "input_ids", f"{name}()")
    others = {key: windows.get(key) for key in ("attention_mask", "labels")}
    checked = {
        key: _token_tensor(value, key, f"{name}()", ids.shape)
        for key, value in others.items()
        if value is not None
    }
    return {**windows, "input_ids": ids, **checked}


def _as_long(values: Any) -> Any:
    """Return whole numbers of fewer bits as 64-bit ones, and anything else as it is."""
    is_whole = isinstance(values, Tensor) and not values.is_floating_point()
    return values.long() if is_whole and values.dtype != torch.bool else values


def _token_tensor(values: Any, key: str, place: str, shape: torch.Size | None = None) -> Tensor:
    """Return a field of a batch on the CPU, LongTensor (B, T).

    Raises:
        ValueError: if it is no tensor of whole numbers of that shape.
    """
    if not isinstance(values, Tensor):
        kind = type(values).__name__
    elif values.dtype != torch.long and key != "attention_mask":
        kind = f"of type {values.dtype}"
    elif values.ndim != 2 or (shape is not None and values.shape != shape):
        kind = f"of shape {tuple(values.shape)}"
    elif values.is_meta:
        kind = "on the meta device"
    else:
        return values.long().cpu()
    wanted = "(B, T)" if shape is None else f"{tuple(shape)}, as input_ids is"
    raise ValueError(f"{place}: {key} is {kind}; it must be a LongTensor {wanted}")


def _windows_of(loader: Iterable[Any], name: str, num_rows: int | None) -> Windows:
    """Return the first rows of a dataloader, or all, as windows padded on the right."""
    rows: dict[str, list[Tensor]] = {key: [] for key in _FILL}
    for number, batch in enumerate(loader):
        ids, mask, labels = _fields_of(batch, number, name)
        mask = torch.ones_like(ids) if mask is None else mask
        labels = ids.masked_fill(mask == 0, IGNORED_LABEL) if labels is None else labels
        for key, values in (("input_ids", ids), ("attention_mask", mask), ("labels", labels)):
            rows[key].extend(values)
        if num_rows is not None and len(rows["input_ids"]) >= num_rows:
            break
    if not rows["input_ids"]:
        raise ValueError(
            f"{name}() gives no batch; at least one is needed, and a trainer.limit_val_batches "
            "above 0"
        )
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
