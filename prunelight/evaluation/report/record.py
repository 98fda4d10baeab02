"""The record of one run: all that its report says, as plain data.

This module needs neither torch nor lightning, so it reads a report.json on any machine.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field

from prunelight.evaluation.report.plan_facts import Json

FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """One measured state of the model; accuracy is next-token accuracy in [0, 1].

    `sparsity` is the share of zeros among all parameters, `linear_sparsity` that among the weights
    of decoder layers that can be sparsified.
    """

    # "dense", with which the others are compared, "pruned", "quantized", "recovered"
    name: str
    num_layers: int
    parameters: int
    size_bytes: int  # of the weights on disk
    perplexity: float
    accuracy: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    sparsity: float = 0.0
    linear_sparsity: float = 0.0
    # Generation by a timing protocol, where asked for: mean and deviation of one, tokens/s.
    latency_seconds: float | None = None
    latency_deviation: float | None = None
    throughput: float | None = None
    # Speed -> median, low and high of its factor against the dense model, measured in turn.
    factors: dict[str, list[float]] = field(default_factory=dict)
    # Name of an examiner (tasks, probes, divergence, ...) -> what it found, as JSON.
    examined: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What one phase of the run cost; peak memory is process RSS on CPU, allocated on CUDA."""

    name: str
    seconds: float
    forwards: float  # seconds in units of F
    peak_bytes: int
    reused: bool = False  # taken from an earlier run with the same fingerprint
    earlier_seconds: float = 0.0  # of `seconds`: taken by earlier starts of the same training


@dataclass
class RunRecord:
    """All that a report says about one run.

    `plans` holds `Plan.to_dict()` of each callback. `outcomes` holds what each of their sparsify
    and slice steps did, in order, as `prunelight.apply` gives it.
    """

    model: str
    device: str
    dtype: str
    fingerprint: str  # of the pruned base
    checkpoint_bytes: int  # of the dense model
    layer_bytes: int  # of one dense decoder layer
    evaluation: Json
    versions: dict[str, str]
    plans: list[Json] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    recovery: Json = field(default_factory=dict)
    # Directory -> how it was verified; the last one is the result.
    verification: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    forward_seconds: float = math.nan  # F on this device
    outcomes: list[Json] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)  # title -> Markdown, of studies
    loads_in: dict[str, str] = field(default_factory=dict)  # program -> whether it reads the result
    date: str = ""  # of the report, in UTC
    command: str = ""  # without folders of the machine
    machine: Json = field(default_factory=dict)
    seed: int | None = None
    data: Json = field(default_factory=dict)  # role -> source
    # Name of a curve -> [optimizer step, value] of each point.
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def to_dict(self) -> Json:
        """Return strict JSON data: NaN and infinities become "NaN", "Infinity" and "-Infinity".

        JSON has no such numbers, and null would not say which number it was. `float()` reads these
        strings.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, default=str)
        return json.loads(text, parse_constant=str)

    @classmethod
    def from_dict(cls, data: Json) -> RunRecord:
        """Return the record of what `to_dict` gave.

        Raises:
            ValueError: for a record of another format.
        """
        if data.get("format") != FORMAT:
            raise ValueError(
                f"report format={data.get('format')!r} must be {FORMAT}; read it with the version "
                "of prunelight that wrote it"
            )
        text = re.sub(r'"(NaN|-?Infinity)"(?!:)', r"\1", json.dumps(data))
        values = {key: value for key, value in json.loads(text).items() if key != "format"}
        values["stages"] = [Stage(**stage) for stage in values["stages"]]
        values["costs"] = [Cost(**cost) for cost in values["costs"]]
        return cls(**values)
