"""Records of runs as a report reads them, and the report they give as text."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from prunelight.evaluation.report.record import Cost, RunRecord, Stage
from prunelight.evaluation.report.report import summary_table, write_report

PNG = b"\x89PNG\r\n\x1a\n"
REMOVED = [5, 6, 8]


def make_plan(**changes: Any) -> dict[str, Any]:
    plan = {
        "format": 1,
        "method": "ShortGPT",
        "arguments": {"num_layers": 3},
        "model": {"name": "org/tiny", "model_type": "llama", "num_hidden_layers": 10},
        "calibration": {"num_samples": 4, "seq_len": 64, "seed": 0},
        "scores": {
            "block_influence": [0.9, 0.3, 0.2, 0.2, 0.1, 0.03, 0.04, 0.1, 0.05, 0.3],
            "block_influence_first_token": [0.8, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.7654],
        },
        "versions": {},
        "steps": [{"kind": "remove_layers", "layers": REMOVED}],
    }
    return plan | changes


def make_record(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "model": "org/tiny",
        "device": "cpu (test)",
        "dtype": "float32",
        "fingerprint": "abc123",
        "plans": [make_plan()],
        "stages": [
            Stage("dense", 10, 134_500_000, 269_000_000, 20.0, 0.5, 1000.0, 20.0),
            Stage("pruned", 7, 113_300_000, 226_600_000, 300.0, 0.25, 1240.0, 25.0),
            Stage(
                *("recovered", 7, 113_300_000, 226_600_000, 25.0, 0.45, 1240.0, 25.0),
                factors={
                    "prefill_tokens_per_second": [1.24, 1.2, 1.3],
                    "decode_tokens_per_second": [1.25, 0.9, 1.4],
                },
            ),
        ],
        "costs": [
            Cost("score and plan", 2.2, 1.1, 600, reused=True),
            Cost("recovery", 30.0, 15.0, 900),
        ],
        "checkpoint_bytes": 300,
        "layer_bytes": 30,
        "recovery": {"mode": "lora", "r": 8, "tokens_seen": 1000},
        "evaluation": {"text": "held-out text", "windows": 8},
        "verification": {"pruned-abc123": "logits equal", "final": "reloaded, logits equal"},
        "versions": {"torch": "2.13"},
        "warnings": ["Only 8 windows were measured."],
        "forward_seconds": 2.0,
    }
    return RunRecord(**(values | changes))


PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def make_sparse(
    shares: list[float], *, pattern: str | None = None, **changes: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A DLP plan with one share for all seven projections of a layer, and what Wanda made of it."""
    names = [[f"model.layers.{i}.{name}" for name in PROJECTIONS] for i in range(len(shares))]
    planned = {name: share for row, share in zip(names, shares, strict=True) for name in row}
    step = {"kind": "sparsify", "sparsity": planned, "solver": "wanda", "pattern": pattern}
    arguments = {"sparsity": None if pattern else 0.7, "pattern": pattern, "alpha": 0.15}
    plan = make_plan(
        method="DLP",
        arguments=arguments | {"sparsegpt": {"dampening": 0.01}},
        model={"name": "org/tiny", "model_type": "llama", "num_hidden_layers": len(shares)},
        scores={"median": [0.01 * (i + 1) for i in range(len(shares))], "sparsity": list(shares)},
        steps=[step | {"options": {}}],
    )
    outcome = {
        "sparsity": {name: math.floor(576 * share + 1e-6) / 576 for name, share in planned.items()},
        "layer_sparsity": [math.floor(576 * share + 1e-6) / 576 for share in shares],
        "reconstruction_error": [0.02 + 0.01 * i for i in range(len(shares))],
        "notes": ["Layer 3 saw 500 tokens, fewer than the 1,536 inputs of down_proj."],
    }
    return plan | changes, outcome


UNSTRUCTURED = make_sparse([0.55 + 0.3 * i / 29 for i in range(30)])
MIXED = make_sparse([0.625] * 5 + [0.75] * 20 + [0.875] * 5, pattern="2:8")


def make_sparse_record(made: tuple[dict, dict] = UNSTRUCTURED, **changes: Any) -> RunRecord:
    sizes = (30, 134_500_000, 269_000_000)
    stages = [
        Stage("dense", *sizes, 20.0, 0.5, 1000.0, 20.0, 0.00001, 0.0),
        Stage("pruned", *sizes, 90.0, 0.25, 1000.0, 20.0, 0.552, 0.6997),
        Stage("recovered", *sizes, 31.0, 0.45, 1000.0, 20.0, 0.552, 0.6997),
    ]
    values: dict[str, Any] = {"plans": [made[0]], "outcomes": [made[1]], "stages": stages}
    return make_record(**(values | changes))


def printed(record: RunRecord) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(summary_table(record))
    return console.file.getvalue()


def markdown(directory: Path, record: RunRecord) -> str:
    write_report(directory, record)
    return (directory / "report.md").read_text(encoding="utf-8")


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
