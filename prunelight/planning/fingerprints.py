"""Facts and hexadecimal digests that identify models, windows and libraries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.version import __version__

# About so many evenly spaced elements of each tensor enter a model's fingerprint.
_SAMPLED = 512

# Attribute of a model without weights: the fingerprint of the model that it stands for.
_STANDS_FOR = "_prunelight_stands_for"


def describe_model(model: PreTrainedModel, num_layers: int | None = None) -> dict[str, Any]:
    """Return the name, shape facts and fingerprint by which a plan recognises its model."""
    facts = shape_facts(model, num_layers)
    name = without_folders(model.config._name_or_path)
    return {"name": name, **facts, "fingerprint": model_fingerprint(model)}


def shape_facts(model: PreTrainedModel, num_layers: int | None = None) -> dict[str, Any]:
    """Return the shape facts of a model, which a fine-tuned copy of the model shares.

    Args:
        model: its config says most.
        num_layers: number of decoder layers; None reads it off the config.
    """
    keys = ("model_type", "num_hidden_layers", "hidden_size")
    facts = {key: getattr(model.config, key, None) for key in keys}
    return facts if num_layers is None else {**facts, "num_hidden_layers": num_layers}


def describe_windows(windows: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """Return shape, number of tokens without padding, and fingerprint of windows (N, T)."""
    tokens = windows.numel() if attention_mask is None else int(attention_mask.sum())
    digest = hashlib.sha256(windows.cpu().contiguous().numpy().tobytes())
    if attention_mask is not None:
        digest.update(attention_mask.to(torch.uint8).cpu().contiguous().numpy().tobytes())
    num_samples, seq_len = windows.shape
    return {
        "num_samples": num_samples,
        "seq_len": seq_len,
        "tokens": tokens,
        "fingerprint": digest.hexdigest()[:16],
    }


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hex digits from names, shapes and evenly spaced values of all weights.

    Values are rounded to bfloat16 first, so that a plan made on a bfloat16 copy fits the float32
    model. Reading takes milliseconds per tensor. A change of very few weights can go unnoticed.
    A model that stands for another one has the other's fingerprint, see `stand_for`.
    """
    known: str | None = vars(model).get(_STANDS_FOR)
    if known is not None:
        return known
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        sample = flat[::step].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def stand_for(model: PreTrainedModel, fingerprint: str, name: str) -> None:
    """Let a model without whole weights stand for that of a fingerprint and a name, in place."""
    setattr(model, _STANDS_FOR, fingerprint)
    model.config._name_or_path = name


def fingerprint_of(*parts: Any) -> str:
    """Return 16 hex digits that identify JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def digests_of_files(value: Any) -> dict[str, str]:
    """Return name -> 16 hex digits of the content of each local file that JSON values name.

    A file may change under its name, so that settings that name it do not say what was computed.
    """
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        return {name: digest for one in value for name, digest in digests_of_files(one).items()}
    if not isinstance(value, str) or not _is_file(value):
        return {}
    content = Path(value).expanduser().read_bytes()
    return {value: hashlib.sha256(content).hexdigest()[:16]}


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # no name of a file, or of nobody's home
        return False


def library_versions() -> dict[str, str]:
    """Return the versions of prunelight, torch and transformers."""
    return {
        "prunelight": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def without_folders(name: str) -> str:
    """Return the last part of an absolute path, or any other name as it is (a hub id, say).

    A folder's name may leave this machine, the path to it may not.
    """
    return Path(name).name if Path(name).expanduser().is_absolute() else name
