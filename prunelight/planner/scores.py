"""Scores of a model on disk: plans are made from them in seconds, without the weights.

A directory holds scores.json, tensors.safetensors (the calibration windows and large scores) and
config.json, of which a model without weights is built. What is kept are calls of scoring functions,
see `prunelight.scoring.remembered`: a method finds its own calls among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, split_windows
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.fingerprints import (
    describe_model,
    describe_windows,
    library_versions,
    shape_facts,
    stand_for,
)
from prunelight.pruning.abilities import unloaded_model
from prunelight.runtime.files.atomic_files import atomic_directory, explaining_write_errors
from prunelight.runtime.files.checksums import sealed, unsealed
from prunelight.scoring.block_influence import BlockInfluence
from prunelight.scoring.remembered import Memory, remembering_scores

SCORES, TENSORS = "scores.json", "tensors.safetensors"
FORMAT = 1
_KIND = "prunelight scores"
_WINDOWS, _MASK = "windows", "attention_mask"


@dataclass(frozen=True)
class Scores:
    """What was computed of a model and its calibration windows.

    Attributes:
        model: name, shape facts and fingerprint of the model.
        windows: that the scores were computed on.
        memory: the scores themselves.
        left_out: name of a score -> why this model has none.
        seconds: name of a score -> what it took, with its part of a pass that served several.
        versions: library name -> version that computed them.
        how: dtype, kind of device and attention that they were computed with.
    """

    model: dict[str, Any]
    windows: Windows
    memory: Memory
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=library_versions)
    how: dict[str, str] = field(default_factory=dict)

    def differing(self, other: Scores) -> list[str]:
        """Return in what both differ: model, windows, versions, or how they were computed."""
        facts = [
            {
                "model": x.model,
                "windows": describe_windows(*split_windows(x.windows)),
                "versions": x.versions,
                **x.how,
            }
            for x in (self, other)
        ]
        return [name for name in facts[1] if facts[0].get(name) != facts[1][name]]

    @contextmanager
    def in_place_of(self, directory: Path, *, trust: bool = False) -> Iterator[PreTrainedModel]:
        """Yield a model without weights, of which scores are asked and found; undo it on exit.

        Args:
            directory: that holds the scores.
            trust: run Python code that comes with the model.
        """
        model = unloaded_model(str(directory), trust_remote_code=trust)
        for key, value in shape_facts(model, len(decoder_layers(model))).items():
            if self.model.get(key, value) != value:
                raise ValueError(
                    f"{directory} holds no whole scores (config.json has {key}={value!r}, and the "
                    f"scores are of {self.model[key]!r}); remove it, and score again"
                )
        stand_for(model, self.model["fingerprint"], self.model["name"])
        with remembering_scores(self.memory):
            yield model


def is_scores(name: str) -> bool:
    """Return whether a name is that of a directory of scores, not of a model."""
    return (Path(name).expanduser() / SCORES).is_file()


def write_scores(scores: Scores, model: PreTrainedModel, directory: Path) -> None:
    """Write scores with the config of their model, all of it or nothing.

    Raises:
        TypeError: if the config does not describe the model, so that none can stand for it.
        OSError: if they cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    ids, mask = split_windows(scores.windows)
    entries = [
        {"key": key, "call": scores.memory.calls[key], "seconds": seconds}
        | {"result": _encoded(result, tensors, f"score-{number}")}
        for number, (key, (result, seconds)) in enumerate(scores.memory.scores.items())
    ]
    tensors[_WINDOWS] = ids
    if mask is not None:
        tensors[_MASK] = mask
    facts = {
        "format": FORMAT,
        "kind": _KIND,
        "model": scores.model,
        "calibration": describe_windows(ids, mask),
        "left_out": scores.left_out,
        "seconds": scores.seconds,
        "versions": scores.versions,
        "how": scores.how,
        "scores": entries,
    }
    with explaining_write_errors(directory), atomic_directory(directory) as temporary:
        model.config.save_pretrained(temporary)
        save_file(
            {name: x.contiguous().clone() for name, x in tensors.items()}, temporary / TENSORS
        )
        (temporary / SCORES).write_text(sealed(facts), encoding="utf-8")
        _check_outline(model, temporary)


def read_scores(directory: Path) -> Scores:
    """Return the scores of a directory; what they lack is then an error, see `Memory.source`.

    Raises:
        FileNotFoundError: if it holds none.
        ValueError: if a file is damaged, or of a newer format.
    """
    if not is_scores(str(directory)):
        raise FileNotFoundError(
            f"there are no scores in {directory}; prunelight score MODEL --out DIR writes some"
        )
    try:
        facts = unsealed((directory / SCORES).read_text(encoding="utf-8"), must=True)
        if facts.get("kind") != _KIND or facts.get("format") != FORMAT:
            raise ValueError(f"format={facts.get('format')!r} must be {FORMAT}")
        tensors = load_file(directory / TENSORS)
        ids, mask = tensors[_WINDOWS], tensors.get(_MASK)
        windows: Windows = ids if mask is None else {"input_ids": ids, "attention_mask": mask}
        if describe_windows(ids, mask) != facts["calibration"]:
            raise ValueError("the windows are not those of the scores")
        memory = Memory(source=str(directory))
        for entry in facts["scores"]:
            memory.scores[entry["key"]] = _decoded(entry["result"], tensors), entry["seconds"]
            memory.calls[entry["key"]] = entry["call"]
        named = {name: facts[name] for name in ("model", "left_out", "seconds", "versions", "how")}
        return Scores(windows=windows, memory=memory, **named)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{directory} holds no whole scores ({reason}); remove it, and score again"
        ) from error


def _check_outline(model: PreTrainedModel, directory: Path) -> None:
    """Check that the written config describes the model in memory.

    Raises:
        TypeError: if it describes other weights.
    """
    trust = type(model).__module__.startswith("transformers_modules")
    outline = unloaded_model(str(directory), trust_remote_code=trust)
    shapes = [
        {name: tuple(parameter.shape) for name, parameter in each.named_parameters()}
        for each in (model, outline)
    ]
    if shapes[0] != shapes[1] or len(decoder_layers(outline)) != len(decoder_layers(model)):
        raise TypeError(
            f"the config of {model.config.model_type} does not describe the weights of this model, "
            "so that no plan can be made without them; plan from the model itself: prunelight plan "
            "MODEL"
        )


def _encoded(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return a result as JSON values; tensors go into `tensors`, under names that begin so."""
    if isinstance(value, Tensor):
        same = next((known for known, tensor in tensors.items() if tensor is value), name)
        tensors[same] = value
        return {"tensor": same}
    if isinstance(value, BlockInfluence):
        return {"block_influence": [value.mean, value.first_token]}
    if isinstance(value, Mapping):
        pairs = [
            [key, _encoded(inner, tensors, f"{name}.{number}")]
            for number, (key, inner) in enumerate(value.items())
        ]
        return {"mapping": pairs}
    if isinstance(value, (list, tuple)):
        inner = [_encoded(one, tensors, f"{name}.{number}") for number, one in enumerate(value)]
        return {"tuple": inner} if isinstance(value, tuple) else inner
    return value


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the result that `_encoded` wrote."""
    if isinstance(value, list):
        return [_decoded(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "block_influence":
        return BlockInfluence(*inner)
    if kind == "mapping":
        return {key: _decoded(one, tensors) for key, one in inner}
    return tuple(_decoded(inner, tensors))


def describe_scored(model: PreTrainedModel) -> dict[str, Any]:
    """Return name, shape facts and fingerprint of a model that is scored."""
    return describe_model(model, len(decoder_layers(model)))


def windows_like(windows: Windows) -> Windows:
    """Return windows as scores keep them: ids alone where nothing is padding."""
    ids, mask = split_windows(windows)
    if mask is None:
        return ids
    return {"input_ids": ids, "attention_mask": mask.to(torch.int64)}
