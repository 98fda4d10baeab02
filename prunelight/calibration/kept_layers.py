"""Layers that a step has finished, in files: they take no memory, and a killed run finds them.

While a layer is worked on, its weights have memory of their own, so that what they were mapped from
stays clean. Then those that changed are written, and mapped from the new file.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunelight.models.placement import Home, assign_memory
from prunelight.runtime.files.atomic_files import (
    atomic_replacement,
    explaining_write_errors,
    write_text,
)
from prunelight.runtime.files.checksums import sealed, unsealed

log = logging.getLogger(__name__)

_IDENTITY = "identity.json"


class KeptLayers:
    """The finished layers of one step, each in a safetensors file.

    A file has the form of a shard of the saved model, so that it can become one.

    Attributes:
        facts: index of a finished layer -> what the step did there, as JSON values.

    Args:
        directory: of this step alone; made if it is missing. Layers there that another computation
            finished are removed.
        identity: JSON values that say all that the layers depend on: model, step, windows.
        layers_path: dotted path of the decoder layers, which names of weights begin with.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], layers_path: str) -> None:
        self.directory, self._layers_path = directory, layers_path
        self.facts: dict[int, dict[str, Any]] = {}
        if differing := _differing(directory, identity):
            log.warning(
                "%s holds layers of another computation (%s): they are removed",
                directory,
                ", ".join(differing),
            )
        if differing or not (directory / _IDENTITY).is_file():
            shutil.rmtree(directory, ignore_errors=True)
            write_text(directory / _IDENTITY, sealed(identity))
        while (facts := self._read_facts(len(self.facts))) is not None:
            self.facts[len(self.facts)] = facts
        if self.facts:
            log.info("layers 0-%d are finished: read from %s", len(self.facts) - 1, directory)

    @contextmanager
    def holding(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Give a layer's weights other memory inside; then changed ones are mapped from a file.

        A finished layer gets its changed weights from its file. Any other gets copies of its
        weights, and is written on exit, but not on errors. A weight that did not change gets its
        old memory back. What is on a GPU is read and written too, and stays there.
        """
        finished = index in self.facts
        homes = {name: Home(weight) for name, weight in layer.named_parameters()}
        if finished:
            for name, stored in self._mapped(index):
                homes[name].leave(stored.to(homes[name].data.device, copy=True))
        else:
            for home in homes.values():
                home.leave(home.data.clone())
        yield
        weights = dict(layer.named_parameters())  # a step may replace some
        if not finished:
            same = {name for name, home in homes.items() if not home.changed}
            same = {name for name in same if homes[name].tensor is weights.get(name)}
            for name in same:
                homes[name].take_back()
            self._write(index, {name: weights[name] for name in weights if name not in same})
        for name, stored in self._mapped(index):
            if weights[name].is_cpu:
                assign_memory(weights[name], stored)

    def note(self, index: int, outcome: Any) -> None:
        """Note what the step did to the layer that is held: a dataclass of JSON values."""
        self.facts[index] = asdict(outcome)

    def _file(self, index: int) -> Path:
        return self.directory / f"layer-{index:05d}.safetensors"

    def _write(self, index: int, weights: Mapping[str, Tensor]) -> None:
        facts = {"format": "pt", "facts": json.dumps(self.facts.setdefault(index, {}))}
        stored = {
            self._begin(index) + name: weight.detach().cpu().contiguous()
            for name, weight in weights.items()
        }
        facts["checksum"] = _checksum(stored)
        file = self._file(index)
        with explaining_write_errors(file), atomic_replacement(file) as temporary:
            save_file(stored, temporary, facts)

    def _begin(self, index: int) -> str:
        return f"{self._layers_path}.{index}."

    def _mapped(self, index: int) -> Iterator[tuple[str, Tensor]]:
        with safe_open(self._file(index), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name.removeprefix(self._begin(index)), tensors.get_tensor(name)

    def _read_facts(self, index: int) -> dict[str, Any] | None:
        """Return what was done to a layer; None if it is not finished, or its file is damaged."""
        file = self._file(index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as tensors:
                metadata = tensors.metadata()
                stored = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            if metadata["checksum"] != _checksum(stored):
                raise ValueError("its bytes are not those that were written")
            facts: dict[str, Any] = json.loads(metadata["facts"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("%s is damaged (%s): the layer is computed anew", file, error)
            return None
        return facts


def holding(kept: KeptLayers | None, index: int, layer: nn.Module) -> AbstractContextManager[None]:
    """Hold a layer if layers are kept, see `KeptLayers.holding`."""
    return nullcontext() if kept is None else kept.holding(index, layer)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of the numbers of some tensors on the CPU, eight hex digits."""
    checksum = 0
    for name in sorted(tensors):
        numbers = tensors[name].reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(numbers.data, checksum)
    return f"{checksum:08x}"


def _differing(directory: Path, identity: Mapping[str, Any]) -> list[str]:
    """Return the names of the values by which a directory's layers are of another computation."""
    try:
        found = unsealed((directory / _IDENTITY).read_text(encoding="utf-8"), must=True)
    except FileNotFoundError:
        return []
    except ValueError:
        return ["unreadable"]
    return [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
