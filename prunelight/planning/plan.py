"""The plan: what will be done to which layer, and why; JSON that holds decisions, no tensors.

A plan can be read, edited, diffed and applied later. All layer indices are those of the model that
the plan was made for. `steps.py` defines the steps; the folder `pruning` carries them out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from prunelight.planning.fingerprints import describe_model, library_versions, shape_facts
from prunelight.planning.steps import (
    MergeLayers,
    RemoveLayers,
    SliceHidden,
    Sparsify,
    Step,
    layer_of,
    renumbered,
    step_from_dict,
)
from prunelight.runtime.files.atomic_files import atomic_replacement

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Decisions of one pruning method for one model.

    Attributes:
        method: name of the callback that made the plan.
        arguments: arguments of that callback, JSON values.
        model: name, model_type, num_hidden_layers, hidden_size and fingerprint of the dense model.
        calibration: num_samples, seq_len and fingerprint of the windows; empty without data.
        scores: score name -> one number a layer (or a window of layers); None where a layer was
            not scored.
        found: other results of the method, such as a threshold; JSON values.
        steps: the steps to carry out, in order.
        versions: library name -> version that made the plan.
    """

    method: str
    arguments: dict[str, Any]
    model: dict[str, Any]
    steps: tuple[Step, ...]
    calibration: dict[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: library_versions())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        # The round trip through JSON turns tuples into lists.
        steps = [{"kind": x.kind, **json.loads(json.dumps(asdict(x)))} for x in self.steps]
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "steps"}
        return {"format": FORMAT, **values, "steps": steps}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Plan:
        """Build a plan from its JSON form.

        Raises:
            ValueError: if keys are missing or unknown, a value has the wrong type, or the format
                is newer than this version.
        """
        keys = dict(value)
        version = keys.pop("format", None)
        if version != FORMAT:
            raise ValueError(f"format={version!r} must be {FORMAT}; use the version that wrote it")
        unknown = set(keys) - {f.name for f in fields(cls)}
        missing = {"method", "arguments", "model", "steps"} - set(keys)
        if unknown or missing:
            raise ValueError(f"missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
        kinds = {"method": str, "steps": list}  # all others are objects
        wrong = [k for k, v in keys.items() if not isinstance(v, kinds.get(k, dict))]
        if wrong:
            raise ValueError(f"keys {sorted(wrong)} hold values of the wrong type")
        for name in ("num_samples", "seq_len"):
            if not isinstance(number := keys.get("calibration", {}).get(name, 0), int):
                raise ValueError(f"calibration: {name}={number!r} must be a whole number")
        steps = []
        for position, step in enumerate(keys.pop("steps")):
            try:
                steps.append(step_from_dict(step))
            except (ValueError, TypeError) as error:
                raise ValueError(f"steps[{position}]: {error}") from error
        return cls(steps=tuple(steps), **keys)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; an interrupted write leaves no partial file."""
        with atomic_replacement(Path(path)) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            ValueError: if the file is not JSON or not a plan; the message names the file.
            PermissionError: if it may not be read.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except PermissionError as error:
            raise PermissionError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a valid plan: {error}") from error

    def check(
        self, model: PreTrainedModel, *, strict: bool = True, num_layers: int | None = None
    ) -> None:
        """Check that the plan was made for this model and that every step can be carried out.

        Args:
            model: the dense model.
            strict: also require the same weights; False lets a plan be applied to a fine-tuned
                model of the same shape.
            num_layers: number of decoder layers; None reads it off the config, which is wrong for
                an encoder-decoder.

        Raises:
            ValueError: naming the fact that differs, or the step that does not fit and why.
        """
        known = describe_model if strict else shape_facts
        facts = known(model, num_layers)
        total: int = facts["num_hidden_layers"]
        for key, value in facts.items():
            if key != "name" and key in self.model and self.model[key] != value:
                raise ValueError(
                    f"the plan was made for another model: {key} is {self.model[key]!r} in the "
                    f"plan and {value!r} in {model.config._name_or_path or 'this model'}; plan "
                    "again" + (" or pass strict=False" if key == "fingerprint" else "")
                )
        removed: tuple[int, ...] = ()
        for position, step in enumerate(self.steps):
            already_removed = sorted({*step.named} & {*removed})
            removed += step.removed
            try:
                step.check(total)
                RemoveLayers(removed).check(total)
                if already_removed:
                    raise ValueError(f"layers={already_removed} are gone after an earlier step")
            except ValueError as error:
                raise ValueError(f"steps[{position}] ({step.kind}): {error}") from error


def planned_sparsity(
    plans: Sequence[Plan], layers_path: str, *, of: Plan | None = None
) -> dict[str, float]:
    """Return which matrices of the final model have planned zeros: name -> share of zeros.

    Args:
        plans: in the order in which they were carried out.
        layers_path: dotted path of the model's decoder layers, see
            `prunelight.models.families.layers.layers_path`.
        of: the one of the plans whose zeros count; None counts those of all.
    """
    sparsity: dict[str, float] = {}
    for plan in plans:
        for step in plan.steps:
            if isinstance(step, Sparsify):
                sparsity |= step.sparsity if of is None or plan is of else {}
            elif isinstance(step, MergeLayers) and step.merge not in ("top", "released"):
                # A sum or mean of zeros and other weights is not zero, and the lowest layer's
                # share of zeros is not that of the highest, whose name it takes.
                mixed = {n for n in sparsity if layer_of(n, layers_path) in step.named}
                sparsity = {name: share for name, share in sparsity.items() if name not in mixed}
            elif isinstance(step, SliceHidden):  # rotations fill zeros
                sparsity = {}
        removed = {i for step in plan.steps for i in step.removed}
        sparsity = renumbered(sparsity, layers_path, removed)
    return sparsity
